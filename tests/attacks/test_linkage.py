from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx_models import linear_model
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from attacks.base import Capability, Observation
from attacks.linkage import Linkage, LinkageOptions, _HeldOut
from bench.plugins import make_defense

SIZE = 16
TINY = {
    "method": "distil",
    "widths": (8, 16),
    "blocks": 1,
    "embedding_size": 16,
    "batch_size": 24,
    "augmentation": 0.3,
    "teacher_steps": 60,
    "teacher_learning_rate": 5e-3,
    "steps": 60,
    "learning_rate": 5e-3,
    "state_faces": 60,
    "validation": 0.2,
}
#: So few steps that only bookkeeping can be tested.
BRIEF = TINY | {"teacher_steps": 6, "steps": 6}


def people(count, *, seed=0, each=3):
    """uint8 (count * each, 3, 16, 16): pictures of ``count`` people, ``each`` in a row, that differ a little."""
    generator = torch.Generator().manual_seed(seed)
    person = torch.rand(count, 1, 3, 4, 4, generator=generator)
    picture = torch.rand(count, each, 3, 4, 4, generator=generator)
    light = torch.rand(count, each, 1, 1, 1, generator=generator)
    coarse = (0.75 * person + 0.25 * picture + 0.2 * (light - 0.5)).flatten(0, 1)
    return functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


PUBLIC, UNSEEN = people(40), people(20, seed=1)


def pair_auc(left, right):
    """AUC over all pairs of different pictures in UNSEEN, one side from each set of embeddings."""
    person = torch.arange(len(left)) // 3
    first, second = torch.triu_indices(len(left), len(left), offset=1)
    return roc_auc_score(person[first] == person[second], (left[first] * right[second]).sum(dim=1))


def linked(attack, defense, faces=UNSEEN, seed=9):
    """Embeddings of ``faces`` intercepted and plain."""
    sent = defense.protect(faces / 255, torch.Generator().manual_seed(seed)).representation
    return attack.embed_representations(sent), attack.embed_faces(faces / 255)


def fit(adversary, **options):
    attack = Linkage(LinkageOptions(**TINY | options))
    return attack, attack.learn(adversary)


@pytest.fixture(scope="module")
def projections(plain):
    class Projections(plain):
        """Forty fixed random projections of the face, linear ones or their squares."""

        squared = False

        @property
        def representation_shape(self):
            return (40, 1, 1)

        def transform(self, faces, state, generator):
            matrix = torch.randn(3 * SIZE * SIZE, 40, generator=torch.Generator().manual_seed(0))
            sent = (faces.flatten(1) @ matrix)[:, :, None, None]
            return sent.square() if self.squared else sent

    return Projections


@pytest.fixture(scope="module")
def on_plain(make_adversary, plain):
    """An attack fitted where faces are sent as they are, and its report."""
    return fit(make_adversary(plain(image_size=SIZE), faces=PUBLIC))


@pytest.fixture(scope="module")
def on_pick(make_adversary, pick):
    return fit(make_adversary(pick(), faces=PUBLIC), hints=1.0)


def test_faces_sent_as_they_are_are_linked_as_well_as_plain_ones(on_plain, plain):
    attack, _ = on_plain
    intercepted, faces = linked(attack, plain(image_size=SIZE))
    ceiling = pair_auc(faces, faces)
    assert ceiling > 0.85
    assert pair_auc(intercepted, faces) > ceiling - 0.03
    assert (intercepted * faces).sum(dim=1).mean() > 0.9


def test_a_defence_that_lets_nothing_through_is_not_linked(make_adversary, plain):
    class Nothing(plain):
        def transform(self, faces, state, generator):
            return torch.rand(faces.shape, generator=generator)

    defense = Nothing(image_size=SIZE)
    attack, report = fit(make_adversary(defense, faces=PUBLIC))
    intercepted, faces = linked(attack, defense)
    assert 0.4 < pair_auc(intercepted, faces) < 0.6
    assert pair_auc(faces, faces) > 0.85
    assert report.details["validation_loss"] > 0.9 * report.details["floor_loss"]


def test_maps_of_secretly_chosen_channels_are_linked(on_pick, pick):
    attack, report = on_pick
    intercepted, faces = linked(attack, pick())
    assert pair_auc(intercepted, faces) > 0.75
    assert report.details["states_inferred"] is True
    assert report.details["validation_loss"] < 0.7 * report.details["floor_loss"]


def test_reading_the_state_beats_the_mixture(on_pick, make_adversary, pick):
    _, mixture = fit(make_adversary(pick(), faces=PUBLIC), hints=1.0, infer_state=False)
    assert mixture.details["states_inferred"] is False
    assert on_pick[1].details["validation_loss"] < mixture.details["validation_loss"]


def test_an_oracle_links_without_being_told_states(on_pick, make_adversary, pick):
    oracle, _ = fit(make_adversary(pick(), "oracle", faces=PUBLIC), hints=1.0)
    weights = on_pick[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in oracle.state_dict().items())


def test_a_black_box_infers_the_secret_from_what_is_sent(make_adversary, pick):
    defense = pick(table=torch.tensor([[5, 2], [0, 3], [4, 1]]))
    others = people(30, seed=2)

    def traffic(count):
        index = torch.arange(count) % len(others)
        yield defense.protect(others[index] / 255, torch.Generator().manual_seed(3)).representation

    adversary = replace(make_adversary(defense, "blackbox", faces=PUBLIC), traffic=traffic)
    attack, report = fit(adversary, hints=1.0, traffic=90)
    assert report.details["states_found"] == 3
    intercepted, faces = linked(attack, defense)
    assert pair_auc(intercepted, faces) > 0.7


def test_a_black_box_without_inference_trains_on_guesses(make_adversary, pick):
    _, report = fit(make_adversary(pick(), "blackbox", faces=PUBLIC), **BRIEF | {"infer_state": False})
    assert report.details["states_inferred"] is False
    assert report.details["steps"] == 6


def test_representations_of_any_shape_are_linked(make_adversary, projections):
    defense = projections(image_size=SIZE)
    attack, report = fit(make_adversary(defense, faces=PUBLIC), hints=1.0, widths=(16, 64))
    intercepted, faces = linked(attack, defense)
    assert pair_auc(intercepted, faces) > 0.8
    assert report.details["validation_loss"] < 0.8 * report.details["floor_loss"]


def test_embeddings_have_unit_rows_and_do_not_depend_on_the_batch(on_pick, pick):
    attack, _ = on_pick
    sent = pick().protect(UNSEEN / 255, torch.Generator().manual_seed(0)).representation
    for embed, inputs in ((attack.embed_representations, sent), (attack.embed_faces, UNSEEN / 255)):
        whole = embed(inputs)
        assert whole.shape == (60, 16)
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(60))
        torch.testing.assert_close(torch.cat([embed(part) for part in inputs.split(7)]), whole, atol=1e-5, rtol=0)
        assert embed(inputs[:0]).shape == (0, 16)


def test_a_face_and_its_mirror_image_are_one(on_plain):
    attack, _ = on_plain
    faces = UNSEEN / 255
    torch.testing.assert_close(attack.embed_faces(faces), attack.embed_faces(faces.flip(-1)), atol=1e-5, rtol=0)


def recogniser(path, seed=0):
    """An ONNX recogniser: a random linear map of a 16 x 16 face to 12 dimensions."""
    weights = np.random.default_rng(seed).normal(size=(3 * SIZE * SIZE, 12)).astype(np.float32)
    linear_model(path, weights, ("n", 3, SIZE, SIZE))
    return torch.from_numpy(weights)


def test_a_student_imitates_a_published_teacher(make_adversary, plain, tmp_path):
    weights = recogniser(tmp_path / "public.onnx")
    defense = plain(image_size=SIZE)
    adversary = make_adversary(defense, faces=PUBLIC)
    attack, report = fit(adversary, teacher=tmp_path / "public.onnx", hints=1.0, steps=100)
    intercepted, faces = linked(attack, defense)
    pixels = (UNSEEN.float() - 127.5) / 128
    expected = functional.normalize((pixels.flatten(1) + pixels.flip(-1).flatten(1)) @ weights, dim=1)
    torch.testing.assert_close(faces, expected, atol=1e-4, rtol=0)
    assert (intercepted * faces).sum(dim=1).mean() > 0.8
    assert report.details["teacher"]["file"] == "public.onnx"
    assert "teacher_steps" not in report.details
    # Stored weights belong to this file alone.
    recogniser(tmp_path / "public.onnx", seed=1)
    again = Linkage(attack.options)
    again.prepare(adversary)
    again.load_state_dict(attack.state_dict())
    with pytest.raises(ValueError, match="not the file"):
        again.embed_faces(UNSEEN / 255)


def test_a_teacher_that_is_not_there_is_refused(make_adversary, plain, tmp_path):
    attack = Linkage(LinkageOptions(**BRIEF | {"teacher": tmp_path / "absent.onnx"}))
    with pytest.raises(ValueError, match=r"absent\.onnx does not exist"):
        attack.learn(make_adversary(plain(image_size=SIZE), faces=PUBLIC))


def test_a_published_teacher_needs_no_second_picture_of_anyone(make_adversary, plain, tmp_path):
    recogniser(tmp_path / "public.onnx")
    adversary = make_adversary(plain(image_size=SIZE), faces=PUBLIC)
    strangers = replace(adversary, identities=torch.arange(len(PUBLIC)))
    _, report = fit(strangers, **BRIEF | {"teacher": tmp_path / "public.onnx"})
    assert report.details["teacher_accuracy"] is report.details["methods"]["distil"]["auc"] is None


def test_the_curves_are_of_identities_that_were_not_trained_on(on_plain):
    _, report = on_plain
    details = report.details
    assert (details["training_identities"], details["training_faces"], details["validation_faces"]) == (32, 96, 24)
    assert details["validation_pairs"] == [24, 24 * 23 // 2 - 24]
    images = [seen for seen, _ in report.curve]
    assert images == sorted(images)
    assert images[-1] == details["images_seen"] == 60 * 24
    assert report.curve[-1][1] == details["validation_loss"]
    assert details["teacher_curve"][-1] == [60 * 24, pytest.approx(1 - details["teacher_auc"], abs=1e-6)]
    assert details["methods"]["distil"]["auc"] > details["teacher_auc"] - 0.05
    assert 0.5 < details["methods"]["distil"]["accuracy"] <= 1


def test_a_student_that_has_nothing_to_learn_saturates_but_only_with_its_teacher(make_adversary, plain):
    adversary = make_adversary(plain(image_size=SIZE), faces=PUBLIC)
    # Multiples of 8: on AVX2, oneDNN writes past the gradient of a strided 1x1 convolution of 4 channels_last channels.
    options = {"steps": 340, "batch_size": 8, "early_stop": True, "widths": (8, 16), "decay": 0.3, "plateau": 0.3}
    _, hurried = fit(adversary, **options | {"teacher_steps": 30})
    assert hurried.details["student_saturated"] is True
    assert hurried.saturated is False


def test_states_seen_are_recorded(on_plain, on_pick, pick):
    assert torch.equal(on_pick[1].states_seen, pick().states())
    assert on_plain[1].states_seen is None


@pytest.mark.parametrize(
    "identities", [torch.arange(12) // 4, torch.arange(12)], ids=["three people", "one picture each"]
)
def test_too_few_identities_to_train_a_teacher_are_refused(make_adversary, plain, identities):
    adversary = make_adversary(plain(image_size=SIZE), faces=PUBLIC[:12])
    with pytest.raises(ValueError, match="give more, or a teacher"):
        fit(replace(adversary, identities=identities), **BRIEF)


# -- recovered faces -------------------------------------------------------------------------------

#: One set of nine channels of a colour, and what an attacker without much time makes of it.
SUBSET = {"subset": 5}
QUICKLY = {"recovery_preset": "quick", "recovery_options": {"rank": 60, "images": 60, "widths": "4,8"}}


@pytest.fixture(scope="module")
def on_subset(make_adversary, tmp_path_factory):
    """``on_subset(**options)``: an attack with a published teacher on PartialFace, and its report."""
    path = tmp_path_factory.mktemp("teacher") / "public.onnx"
    recogniser(path)

    def make(defense=None, **options):
        defense = defense or make_defense("partialface", SUBSET, "cpu", SIZE)
        return fit(make_adversary(defense, faces=PUBLIC), teacher=path, steps=40, **QUICKLY | options)

    return make


def test_a_recovered_face_is_shown_to_the_teacher_as_it_is_and_mirrored(on_subset):
    attack, report = on_subset(method="recover")
    defense = make_defense("partialface", SUBSET, "cpu", SIZE)
    twice = [defense.protect(UNSEEN / 255, torch.Generator().manual_seed(i)).representation for i in (1, 2)]
    sent = torch.stack(twice, dim=1)
    for representations, given in ((sent[:, 0], sent[:, :1]), (sent, sent)):
        faces = attack.recovery.recover(Observation(given))
        expected = functional.normalize(attack.teacher(faces) + attack.teacher(faces.flip(-1)), dim=1)
        torch.testing.assert_close(attack.embed_representations(representations), expected, atol=1e-4, rtol=0)
    assert attack.method == report.details["method"] == "recover"
    assert report.details["methods"]["recover"]["recovery"] == "linear"
    assert report.saturated is None  # nothing was trained
    assert torch.equal(report.states_seen, defense.states())


def test_several_interceptions_are_combined_before_they_are_embedded(on_subset):
    """The noise that each carries is averaged by the posterior, which counts more than an average of embeddings."""
    defense = make_defense("noise", {"scale": 2.0}, "cpu", SIZE)
    attack, _ = on_subset(defense, method="recover")
    draws = [torch.Generator().manual_seed(i) for i in range(8)]
    sent = torch.stack([defense.protect(UNSEEN / 255, draw).representation for draw in draws], dim=1)
    plain = attack.embed_faces(UNSEEN / 255)
    single = torch.stack([attack.embed_representations(part) for part in sent.unbind(1)]).mean(dim=0)
    combined = (attack.embed_representations(sent) * plain).sum(dim=1).mean()
    assert combined > (functional.normalize(single, dim=1) * plain).sum(dim=1).mean()


def test_recovered_faces_link_where_a_student_of_few_people_does_not(on_subset):
    defense = make_defense("partialface", SUBSET, "cpu", SIZE)
    auc = {}
    for method in ("recover", "distil"):
        attack, _ = on_subset(method=method)
        intercepted, faces = linked(attack, defense)
        auc[method] = pair_auc(intercepted, faces)
    assert auc["recover"] > pair_auc(faces, faces) - 0.05
    assert auc["recover"] > auc["distil"] + 0.03


@pytest.mark.slow
def test_auto_keeps_what_tells_held_out_people_apart_best(on_subset, make_adversary, plain):
    attack, report = on_subset(method="auto", room=-1)
    methods = report.details["methods"]
    assert set(methods) == {"recover", "distil", "fused"}
    assert methods[attack.method]["auc"] == max(figures["auc"] for figures in methods.values())
    # A network that has hardly been trained recovers nothing, and the student of a plain picture learns fast.
    lazy = {"recovery": "unet", "recovery_options": {"images": 10, "widths": "4,8", "bypass": 0}}
    attack, report = fit(make_adversary(plain(image_size=SIZE), faces=PUBLIC), method="auto", **lazy)
    methods = report.details["methods"]
    assert attack.method == report.details["method"] != "recover"
    assert methods["distil"]["auc"] > methods["recover"]["auc"]


def test_no_student_is_trained_where_recovered_faces_leave_no_room(on_subset):
    attack, report = on_subset(method="auto", room=0.1)
    assert attack.method == "recover"
    assert report.details["methods"].keys() == {"recover", "distil"}
    assert "within 0.1 of plain" in report.details["methods"]["distil"]["skipped"]
    assert "student_saturated" not in report.details


def test_a_fused_embedding_is_the_sum_of_both(on_subset):
    attack, _ = on_subset(method="fused")
    defense = make_defense("partialface", SUBSET, "cpu", SIZE)
    sent = defense.protect(UNSEEN[:9] / 255, torch.Generator().manual_seed(1)).representation[:, None]
    parts = []
    for place in (0, 1):
        attack.chosen.fill_(place)
        parts.append(attack.embed_representations(sent))
    attack.chosen.fill_(2)
    expected = functional.normalize(parts[0] + parts[1], dim=1)
    torch.testing.assert_close(attack.embed_representations(sent), expected, atol=1e-5, rtol=0)


def test_where_no_face_can_be_recovered_a_student_links_and_the_reason_is_told(on_subset, projections):
    defense = projections(image_size=SIZE)
    defense.squared = True
    attack, report = on_subset(defense, method="auto")
    assert attack.method == "distil"
    reason = report.details["methods"]["recover"]["not_applicable"]
    assert "linear: " in reason
    assert "unet: " in reason
    refused = Linkage(LinkageOptions(method="recover"))
    assert "needs recovered faces; linear: " in refused.inapplicable(defense)


def test_a_recovery_that_asks_for_more_than_what_is_linked_does_not_apply(pick):
    stolen = Linkage(LinkageOptions(method="recover", recovery="template"))
    assert "stolen templates come with no representation" in stolen.inapplicable(pick())
    attack = Linkage(LinkageOptions(recovery=["model-inversion"]))
    assert attack.needs == Linkage.needs | {Capability.RECOGNISER, Capability.TEMPLATES}
    assert Linkage(LinkageOptions()).needs == Linkage.needs
    assert Capability.TRAFFIC in Linkage(LinkageOptions()).uses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recovery": "linaer"}, "did you mean 'linear'"),
        ({"recovery": "linkage"}, "linkage recovers no faces"),
        ({"recovery": "linear", "recovery_options": {"images": 3}}, "linear have no 'images'"),
        ({"recovery_options": {"rank": "many"}}, "recovery_options of linear: rank"),
    ],
)
def test_recoveries_are_checked_with_the_options(options, message):
    with pytest.raises(ValueError, match=message):
        LinkageOptions(**options)


def test_a_black_box_chooses_by_what_the_client_in_use_sends(make_adversary, pick):
    """Guesses of the secret would show no recovery at work that learnt the true one."""
    defense = pick(table=torch.tensor([[5, 2], [0, 3], [4, 1]]))
    asked = []

    def client(faces):
        asked.append(len(faces))
        return defense.protect(faces, torch.Generator().manual_seed(len(asked))).representation

    adversary = replace(make_adversary(defense, "blackbox", faces=PUBLIC), client=client)
    brief = {"method": "fused", "infer_state": False, "recovery": "unet", "recovery_options": {"images": 10}}
    attack, report = fit(adversary, **BRIEF | brief)
    assert sum(asked) > 2 * report.details["validation_faces"]  # and trains on it
    assert attack.method == "fused"


def test_options_reach_the_recoveries_that_have_them():
    linear, unet = LinkageOptions(recovery_options={"rank": "7", "images": 9}, recovery_preset="quick").recoveries()
    assert (linear.options.rank, linear.options.state_faces) == (7, 300)
    assert (unet.options.images, unet.options.widths) == (9, (16, 32, 64))


def held_out(identities):
    return _HeldOut.of(torch.zeros(len(identities), 3, 4, 4, dtype=torch.uint8), torch.tensor(identities))


def test_auc_of_held_out_pairs_equals_scikit_learn():
    held = held_out([0, 0, 1, 1, 2, 2, 2])
    left, right = (torch.randn(7, 2, generator=torch.Generator().manual_seed(i)).round() for i in (0, 1))
    scores = (left[held.first] * right[held.second]).sum(dim=1)
    assert len(set(scores.tolist())) < len(scores)  # there are ties
    assert held.auc(left, right) == pytest.approx(roc_auc_score(held.same, scores))


def test_accuracy_of_held_out_pairs():
    held = held_out([0, 0, 0, 1, 1, 1])
    perfect = functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 1])).float()
    assert held.accuracy(perfect, perfect) == 1
    assert held.accuracy(torch.ones(6, 2), torch.ones(6, 2)) == 0.5
    assert held.verifiable
    assert not held_out([0, 0, 1]).verifiable
    assert not held_out([0, 1, 2, 3]).verifiable
