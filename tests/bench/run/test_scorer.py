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
    first, second = torch.triu_indices(24, 24, 1)
    same = victims.labels[first] == victims.labels[second]
    evaluator = Evaluator(Colours(), "colours", (SIZE, SIZE))
    pairs = PairProtocol(first, second, same, torch.arange(len(same)) % 2)
    return scorer(victims, Judge.on(evaluator, evaluator.embed(victims.images), pairs, victims.labels))


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
    strangers = judge.strangers(constant)
    for name in ("ssim", "psnr_aligned", "cosine"):
        assert judge.gain(name, judge.assess(constant), strangers).value == pytest.approx(0, abs=1e-6)
    moved = judge.strangers(faces)
    assert moved.values["ssim"].max() < 0.9
    torch.testing.assert_close(moved.values["ssim"], judge.assess(faces[somebody_else(torch.arange(8))]).values["ssim"])


def test_one_person_has_no_strangers(judge, victims):
    alone = replace(judge, probes=Probes(torch.tensor([0, 1]), torch.tensor([2])))
    held = alone.strangers(to_float(victims.images[:2]))
    assert held.values["ssim"].isnan().all()
