"""What the judge makes of recovered faces, with an evaluator that sees colours."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import plugins
from bench.data.faces import FaceSet, PairProtocol
from bench.errors import MissingError
from bench.images import to_float
from bench.metrics.evaluator import Evaluator
from bench.metrics.identity import Probes
from bench.run.attacker import layout_hits
from bench.run.recovery import over_floors
from bench.run.scorer import Judge, Scorer, somebody_else
from defenses.layout import probe

SIZE = 16


class Colours(nn.Module):
    """A face's embedding is its mean colour, about mid-grey."""

    def forward(self, faces):
        return faces.mean(dim=(2, 3)) - 0.5 + torch.tensor([1e-3, 0.0, 0.0])


def random_faces(count, seed):
    generator = torch.Generator().manual_seed(seed)
    tint = torch.randint(0, 200, (count // 3, 3, 1, 1), generator=generator).repeat_interleave(3, dim=0)
    return (tint + torch.randint(0, 56, (count, 3, SIZE, SIZE), generator=generator)).to(torch.uint8)


@pytest.fixture(scope="module")
def victims():
    return FaceSet(random_faces(24, 0), torch.arange(24) // 3, tuple("abcdefgh"))


@pytest.fixture(scope="module")
def judge(victims):
    return scorer(victims, cleared(judge_with(Colours(), "colours", victims)))


def scorer(victims, *judges, guessed=None):
    return Scorer(
        victims,
        Probes(torch.arange(0, 24, 3), torch.arange(1, 24, 3)),
        judges,
        guessed,
        lpips=MissingError("LPIPS: no weights"),
        replicates=200,
        seed=5,
        batch_size=5,
        device=torch.device("cpu"),
    )


class OneColour(nn.Module):
    """An embedding that tells how red a face is, and no more."""

    def forward(self, faces):
        red = faces[:, 0].mean(dim=(1, 2))
        return torch.stack((red - 0.5, torch.full_like(red, 0.3)), dim=1)


class Blind(nn.Module):
    """Looks at a pixel that says nothing of a person."""

    def forward(self, faces):
        return faces[:, :, 3, 5] - faces[:, :, 9, 2]


def judge_with(network, name, victims, every=10):
    """A judge on all genuine pairs and one impostor pair in ``every``."""
    first, second = torch.triu_indices(24, 24, 1)
    same = victims.labels[first] == victims.labels[second]
    some = same | (torch.arange(len(same)) % every == 0)
    first, second, same = first[some], second[some], same[some]
    pairs = PairProtocol(first, second, same, torch.arange(len(same)) % 2)
    evaluator = Evaluator(network, name, (SIZE, SIZE))
    return Judge.on(evaluator, evaluator.embed(victims.images), pairs, victims.labels)


def cleared(judge, **changes):
    """The judge as one that may judge: with eight people that is never sure."""
    return replace(judge, info=judge.info.model_copy(update={"withheld": None, **changes}))


def test_a_judge_at_chance_says_nothing(victims):
    blind = judge_with(Blind(), "blind", victims)
    assert blind.info.accuracy.value < 0.9
    assert "the judge blind tells" in blind.info.withheld
    alone = scorer(victims, blind)
    perfect, grey = (alone.assess(faces) for faces in (to_float(victims.images[::3]), torch.full((8, 3, 16, 16), 0.5)))
    assert perfect.quality.ssim.value == pytest.approx(1)
    measures = dict(perfect.quality.identity)
    assert {measure.value for measure in measures.values()} == {None}
    assert {measure.reason for measure in measures.values()} == {blind.info.withheld}
    assert not set(measures) & (set(perfect.values) | set(perfect.per_image.columns))
    assert alone.gain("cosine", perfect, grey).reason == blind.info.withheld
    assert alone.gain("ssim", perfect, grey).value > 0
    assert perfect.embeddings == {}


def test_refusing_everybody_is_no_judgement_where_most_pairs_are_impostors(victims):
    blind = judge_with(Blind(), "blind", victims, every=1)
    assert blind.info.accuracy.value > 0.9
    assert "an interval that reaches chance (91%)" in blind.info.withheld


def test_of_several_judges_each_figure_is_the_one_by_which_most_leaks(judge, victims, perfect):
    (colours,), red = judge.judges, cleared(judge_with(OneColour(), "red", victims))
    blind = judge_with(Blind(), "blind", victims)
    faces = to_float(victims.images[::3])
    half = torch.where(torch.arange(8)[:, None, None, None] < 4, faces, torch.full_like(faces, 0.5))
    both, alone = scorer(victims, colours, red, blind), scorer(victims, red)
    found = both.assess(half)
    assert found.quality.judges["colours"] == judge.assess(half).quality.identity
    assert found.quality.judges["red"] == alone.assess(half).quality.identity
    assert found.quality.judges["blind"].cosine.reason == blind.info.withheld
    for figure, measure in found.quality.identity:
        by_judge = [getattr(found.quality.judges[name], figure) for name in ("colours", "red")]
        if measure.value is None:
            assert all(other.value is None for other in by_judge)
            continue
        worst = min if figure == "knn_distance" else max
        assert measure.value == worst(other.value for other in by_judge)
        assert found.per_image[figure].mean() == pytest.approx(measure.value, abs=1e-6)
        assert found.per_image[f"{figure}@red"].mean() == pytest.approx(by_judge[1].value, abs=1e-6)
    assert set(found.embeddings) == {"colours", "red"}
    whole = both.worst([found, both.assess(faces)])
    assert whole.quality.identity == both.assess(faces).quality.identity
    gains = [one.gain("cosine", one.assess(faces), one.assess(half)).value for one in (judge, alone)]
    assert both.gain("cosine", both.assess(faces), found).value == pytest.approx(max(gains))


def test_nobody_is_looked_up_where_people_are_guessed_or_few(judge, victims, perfect):
    identity = perfect.quality.identity
    assert identity.rank1.value is not None
    assert identity.rank20.reason == "the gallery holds 8 people: all are among 20"
    guessed = scorer(victims, *judge.judges, guessed="no names").assess(to_float(victims.images[::3])).quality.identity
    assert [guessed.rank1.reason, guessed.rank5.reason, guessed.rank20.reason] == ["no names"] * 3
    assert guessed.type2_tar == identity.type2_tar


def test_the_stricter_threshold_is_that_of_a_thousandth_of_impostors(judge, victims, noisy):
    assert noisy.quality.identity.type1_far_1e3.reason.startswith("FAR 0.001 needs at least 1000 impostor pairs")
    values = noisy.values["cosine"]
    strict = cleared(judge.judges[0], impostor_pairs=3000, threshold_far_1e3=float(values.sort().values[4]))
    faces = to_float(victims.images[::3])
    noise = 0.2 * torch.randn(faces.shape, generator=torch.Generator().manual_seed(2))
    found = scorer(victims, strict).assess((faces + noise).clamp(0, 1)).quality.identity
    assert found.type1_far_1e3.value == 4 / 8
    assert found.type2_far_1e3.value <= found.type2_tar.value


@pytest.fixture(scope="module")
def perfect(judge, victims):
    return judge.assess(to_float(victims.images[::3]))


@pytest.fixture(scope="module")
def noisy(judge, victims):
    faces = to_float(victims.images[::3])
    return judge.assess(
        (faces + 0.2 * torch.randn(faces.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    )


def test_the_distance_is_to_another_image_of_the_person(perfect, victims):
    embeddings = F.normalize(Colours()(to_float(victims.images)), dim=1).view(8, 3, 3)
    expected = torch.cdist(embeddings[:, :1], embeddings[:, 1:]).amin(dim=(1, 2))
    torch.testing.assert_close(perfect.values["knn_distance"], expected, atol=1e-3, rtol=0)
    measure = perfect.quality.identity.knn_distance
    assert measure.direction == "privacy"
    assert measure.value == pytest.approx(float(expected.mean()), abs=1e-3)
    assert perfect.quality.identity.rank5.value >= perfect.quality.identity.rank1.value


def test_the_worst_case_is_pointwise(judge, perfect, noisy, victims):
    # One attack sees the first half of the victims, the other the second: together they see all.
    faces = to_float(victims.images[::3])
    blank = torch.full_like(faces, 0.5)
    half = torch.arange(8)[:, None, None, None] < 4
    worst = judge.worst([judge.assess(torch.where(half, faces, blank)), judge.assess(torch.where(half, blank, faces))])
    assert worst.quality.ssim == perfect.quality.ssim
    assert (worst.values["knn_distance"] <= perfect.values["knn_distance"]).all()
    alone = judge.worst([noisy])
    assert alone.quality == noisy.quality
    mixed = judge.worst([noisy, perfect])
    assert mixed.quality.psnr == perfect.quality.psnr
    assert mixed.per_image["ssim"].tolist() == perfect.per_image["ssim"].tolist()


def test_a_gain_is_paired_and_points_to_more_leakage(judge, perfect, noisy):
    gain = judge.gain("ssim", perfect, noisy)
    assert gain.value == pytest.approx(perfect.quality.ssim.value - noisy.quality.ssim.value, abs=1e-9)
    assert 0 < gain.ci95[0] < gain.value < gain.ci95[1]
    assert judge.gain("ssim", noisy, perfect).value == pytest.approx(-gain.value)
    nearer = judge.gain("knn_distance", perfect, noisy)
    before, after = noisy.quality.identity.knn_distance.value, perfect.quality.identity.knn_distance.value
    assert nearer.value == pytest.approx(before - after, abs=1e-9)


@pytest.fixture(scope="module")
def defense():
    return plugins.make_defense("partialface", {}, "quick", 32)


@pytest.fixture(scope="module")
def drawn(defense):
    """States (N, k, D) and their true layouts (N, k, C)."""
    states = defense.draw(10, torch.Generator().manual_seed(0)).unflatten(0, (5, 2))
    layout = probe(defense, defense.states())
    return states, layout.canonical[layout.row_of(states.flatten(0, 1))].unflatten(0, (5, 2))


def test_each_channel_is_right_or_wrong_for_the_state_of_its_own_face(defense, drawn):
    states, layouts = drawn
    assert layout_hits(layouts, states, defense)["right"].all()
    inferred = layouts.clone()
    inferred[3, 1, 7] += 1
    right = layout_hits(inferred, states, defense)["right"]
    assert right.shape == layouts.shape
    assert (~right).nonzero().tolist() == [[3, 1, 7]]
    assert not layout_hits(layouts.flip(0), states, defense)["right"].all(dim=2).all()


@pytest.mark.parametrize(
    "inferred", [torch.zeros(5, 2, 26, dtype=torch.int64), torch.zeros(5, 27, dtype=torch.int64), torch.zeros(5, 2, 27)]
)
def test_other_shapes_are_refused(defense, drawn, inferred):
    with pytest.raises(ValueError, match=r"int64 \(5, 2, 27\)"):
        layout_hits(inferred, drawn[0], defense)


def test_states_are_named_by_their_rows(defense, drawn):
    states, layouts = drawn
    listed = defense.states()
    inferred = layouts.clone()
    inferred[3, 1, [0, 1]] = inferred[3, 1, [1, 0]]  # the layout of no state
    inferred[0, 0] = layouts[4, 1]
    named = layout_hits(inferred, states, defense)["named"]
    assert torch.equal(listed[named[..., 0]], states)
    assert named[3, 1, 1] == -1
    assert torch.equal(listed[named[0, 0, 1]], states[4, 1])
    same = (named[..., 0] == named[..., 1]).flatten().tolist()
    expected = [True] * 10
    expected[7] = False
    expected[0] = bool((states[0, 0] == states[4, 1]).all())
    assert same == expected


@pytest.mark.parametrize("labels", [[0, 0, 1, 2], [5, 1, 5, 5, 2, 2], list(range(7)), [3, 0, 3, 0]])
def test_everybody_is_held_against_somebody_else(labels):
    labels = torch.tensor(labels)
    other = somebody_else(labels)
    assert sorted(other.tolist()) == list(range(len(labels)))
    assert (labels[other] != labels).all()


def test_what_is_true_of_anybody_is_true_of_strangers_and_what_is_true_of_one_is_not(judge, victims):
    faces = to_float(victims.images[::3])
    constant = faces.mean(dim=0, keepdim=True).expand(len(faces), -1, -1, -1)
    strangers = judge.strangers(constant, judge.assess(constant))
    for name in ("ssim", "psnr_aligned", "cosine"):
        assert judge.gain(name, judge.assess(constant), strangers).value == pytest.approx(0, abs=1e-6)
    moved = judge.strangers(faces, judge.assess(faces))
    assert moved.values["ssim"].max() < 0.9
    torch.testing.assert_close(moved.values["ssim"], judge.assess(faces[somebody_else(torch.arange(8))]).values["ssim"])


def test_one_person_has_no_strangers(judge, victims):
    alone = replace(judge, probes=Probes(torch.tensor([0, 1]), torch.tensor([2])))
    faces = to_float(victims.images[:2])
    held = alone.strangers(faces, alone.assess(faces))
    assert held.values["ssim"].isnan().all()


def test_several_judges_are_asked_about_the_floors_and_where_none_may_judge_the_picture_decides(judge, victims):
    faces = to_float(victims.images[::3])
    flat = faces.mean(dim=(2, 3), keepdim=True).expand_as(faces)  # the colour of each, and nothing of the picture
    two = scorer(victims, *judge.judges, cleared(judge_with(OneColour(), "red", victims)))
    for judges in (judge, two):
        test = over_floors(judges, judges.assess(flat), {"grey": judges.assess(torch.full_like(faces, 0.5))})
        assert test.gains["cosine"].value > 0.1
        assert test.above is True
    blind = scorer(victims, cleared(judge.judges[0], withheld="blind"))
    assert "cosine" not in over_floors(blind, blind.assess(flat), {"grey": blind.assess(flat)}).gains
