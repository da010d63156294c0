"""Runs of a linkage attack that sees small pictures: on plain faces it has to find itself at its ceiling."""

from __future__ import annotations

from typing import ClassVar

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import finished, made, pipeline, registered, stages_of

from attacks.base import AttackOptions, FitReport, LinkageAttack
from bench.data.faces import PairProtocol
from bench.data.pairs import draw_pairs
from bench.errors import DataError
from bench.metrics.bootstrap import verification_estimates
from bench.metrics.identity import Probes
from bench.metrics.unlinkability import unlinkability
from bench.metrics.verification import lfw_accuracy
from bench.results import NO_BETTER, Linkage, read_result
from bench.run.attacker import AttackStages
from bench.run.linkage import assess_linkage, linkage_scores
from bench.run.verification import FARS, verification

PEOPLE, EACH, WIDTH = 24, 4, 16
LABELS = torch.arange(PEOPLE).repeat_interleave(EACH)
PROBES = Probes(attacked=torch.arange(0, PEOPLE * EACH, EACH), gallery=torch.arange(1, PEOPLE * EACH, EACH))


def embeddings(noise: float, seed: int) -> torch.Tensor:
    """Unit rows: a direction of each person's own, plus noise of that relative size."""
    person = torch.randn(PEOPLE, WIDTH, generator=torch.Generator().manual_seed(99))[LABELS]
    drawn = torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(seed))
    return F.normalize(person + noise * drawn, dim=1)


@pytest.fixture(scope="module")
def pairs() -> PairProtocol:
    return draw_pairs(LABELS, torch.Generator().manual_seed(0))


def assess(pairs: PairProtocol, first: float, second: float, plain: float, **options) -> Linkage:
    return assess_linkage(
        embeddings(first, 1),
        embeddings(second, 2),
        embeddings(plain, 3),
        labels=LABELS,
        pairs=pairs,
        probes=PROBES,
        **{"seed": 5, "replicates": 40} | options,
    )


def test_each_kind_of_pair_compares_what_it_says(pairs: PairProtocol) -> None:
    first, second, plain = (torch.randn(len(LABELS), 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scores = linkage_scores(first, second, plain, pairs)
    sides = {"protected_plain": (first, plain), "protected_protected": (first, second), "plain": (plain, plain)}
    assert scores.keys() == sides.keys()
    for name, (left, right) in sides.items():
        expected = F.cosine_similarity(left[pairs.first], right[pairs.second])
        torch.testing.assert_close(scores[name], expected)


def test_perfect_embeddings_link_everything(pairs: PairProtocol) -> None:
    result = assess(pairs, 0.05, 0.05, 0.05)
    for part in (result.protected_plain, result.protected_protected, result.plain):
        assert part.accuracy.value == 1
        assert part.eer.value == 0
    assert result.rank1.value == 1
    assert result.d_sys["protected_protected"].value == 1
    assert result.d_sys["protected_plain"].value == 1


def test_embeddings_of_nothing_link_nothing(pairs: PairProtocol) -> None:
    result = assess(pairs, 1e3, 1e3, 0.05)
    for part in (result.protected_plain, result.protected_protected):
        assert part.auc.value == pytest.approx(0.5, abs=0.12)
    assert result.plain.accuracy.value == 1
    assert result.rank1.value is not None
    assert result.rank1.value < 0.2
    assert all(d.value is not None and d.value < 0.3 for d in result.d_sys.values())


def test_figures_are_those_of_the_metrics(pairs: PairProtocol) -> None:
    result = assess(pairs, 1.0, 1.2, 0.8)
    scores = linkage_scores(embeddings(1.0, 1), embeddings(1.2, 2), embeddings(0.8, 3), pairs)
    for name, values in scores.items():
        part = getattr(result, name)
        assert part.accuracy.value == lfw_accuracy(values, pairs.same, pairs.fold).mean
        assert part.pairs == len(pairs)
    for name, measure in result.d_sys.items():
        assert measure.value == unlinkability(scores[name], pairs.same)
        assert measure.direction == "leakage"
    # More linkage suits the attacker.
    assert result.rank1.direction == result.protected_plain.auc.direction == "leakage"
    assert result.protected_plain.eer.direction == "privacy"
    similarity = embeddings(1.0, 1)[PROBES.attacked] @ embeddings(0.8, 3)[PROBES.gallery].T
    hits = (similarity.argmax(dim=1) == torch.arange(PEOPLE)).float().mean()
    assert result.rank1.value == pytest.approx(float(hits))
    assert result.rank1.n == PEOPLE


def test_intervals_rest_on_the_same_people_and_on_the_seed(pairs: PairProtocol) -> None:
    alike = assess_linkage(*(embeddings(1.0, 1),) * 3, labels=LABELS, pairs=pairs, probes=PROBES, seed=5, replicates=40)
    assert alike.plain == alike.protected_plain == alike.protected_protected
    assert alike.plain.accuracy.ci95 is not None
    assert assess(pairs, 1.0, 1.0, 1.0) == assess(pairs, 1.0, 1.0, 1.0)
    assert assess(pairs, 1.0, 1.0, 1.0) != assess(pairs, 1.0, 1.0, 1.0, seed=6)


def test_a_verification_result_holds_the_estimates(pairs: PairProtocol) -> None:
    scores = linkage_scores(*(embeddings(1.0, i) for i in (1, 2, 3)), pairs)["plain"]
    people = torch.stack([LABELS[pairs.first], LABELS[pairs.second]], dim=1)
    result = verification(scores, pairs, LABELS)
    expected = verification_estimates(scores, pairs.same, pairs.fold, people, fars=list(FARS.values()))
    for name in ("accuracy", "auc", "eer"):
        measure, estimate = getattr(result, name), getattr(expected, name)
        assert (measure.value, measure.ci95, measure.n) == (estimate.value, estimate.ci95, estimate.n)
    assert result.tar_at_far.keys() == FARS.keys()
    assert result.tar_at_far["1e-1"].value == expected.tar_at_far[0.1].value
    assert result.accuracy_std == lfw_accuracy(scores, pairs.same, pairs.fold).std


def test_embeddings_that_do_not_fit_are_refused(pairs: PairProtocol) -> None:
    whole = embeddings(1.0, 1)
    for second, plain in ((whole[:-1], whole), (whole, whole[:, :-1])):
        with pytest.raises(DataError, match="twice protected and once plain"):
            linkage_scores(whole, second, plain, pairs)
    with pytest.raises(DataError, match="beyond the 40 embeddings"):
        linkage_scores(whole[:40], whole[:40], whole[:40], pairs)
    with pytest.raises(DataError, match="finite"):
        assess_linkage(
            whole * torch.nan, whole, whole, labels=LABELS, pairs=pairs, probes=PROBES, seed=0, replicates=10
        )


TINY = {
    "defense": "none",
    "attack": "thumbnail",
    "utility": False,
    "shares": {"provider": 0.1, "public": 0.2, "evaluator": 0.1, "victims": 0.6},  # enough people for intervals
}


class ThumbnailOptions(AttackOptions):
    side: int = 8


class Thumbnail(LinkageAttack):
    """The embedding of anything is what it looks like from afar."""

    name = "thumbnail"
    summary = "for tests"
    Options: ClassVar = ThumbnailOptions
    budgets: ClassVar = {"pixels": "side"}

    def build(self, adversary):
        self.register_buffer("mean", torch.zeros(3 * self.options.side**2))

    def fit(self, adversary):
        self.mean.copy_(self.thumbnails(adversary.faces.float() / 255).mean(dim=0))
        return FitReport(saturated=True)

    def thumbnails(self, faces):
        return F.interpolate(faces, (self.options.side,) * 2, mode="area").flatten(1)

    def encode_faces(self, faces):
        return self.thumbnails(faces) - self.mean

    def encode_representations(self, representations):
        return self.encode_faces(representations)


class Guess(Thumbnail):
    """The embedding of anything is drawn at random."""

    name = "guess"

    def encode_faces(self, faces):
        return torch.randn(len(faces), 8, generator=torch.Generator().manual_seed(int(faces.sum())))


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with registered(Thumbnail, Guess):
        yield


@pytest.fixture(scope="module")
def run(out):
    return lambda **changes: finished(out, **{**TINY, **changes})


@pytest.fixture(scope="module")
def plain(run):
    return run()


@pytest.mark.slow
class TestPlainFaces:
    def test_nothing_is_lost_without_a_defence(self, plain):
        linkage = plain[0].linkage
        assert linkage.protected_plain == linkage.protected_protected == linkage.plain
        assert linkage.plain.accuracy.value > 0.5
        assert linkage.plain.pairs == plain[0].dataset.pairs
        # Mated and non-mated pairs score alike by either kind, so they are as linkable.
        assert linkage.d_sys["protected_plain"] == linkage.d_sys["protected_protected"]
        assert linkage.rank1.n == 12

    def test_the_scores_are_cosines_of_its_embeddings(self, plain, out):
        _, directory = plain
        table = pd.read_parquet(directory / "linkage.parquet")
        cell = pipeline(out, **TINY)
        stages = stages_of(cell)
        linked = AttackStages(stages).linked(cell.attack_configs["thumbnail"][-1], stages.defense("none", {}))
        pairs = stages.splits.pairs
        expected = (linked.plain[pairs.first] * linked.plain[pairs.second]).sum(1)
        torch.testing.assert_close(torch.tensor(table["plain"].to_numpy()), expected)
        torch.testing.assert_close(linked.plain.norm(dim=1), torch.ones(len(linked.plain)))
        assert table["same"].tolist() == pairs.same.tolist()

    def test_the_result_says_linkage_and_nothing_else(self, plain):
        result, directory = plain
        assert result.recovery is None
        assert result.evaluator is None
        assert result.utility is None
        assert set(result.throughput) == {"protect", "link"}
        assert result.attack.saturated is True
        assert read_result(directory) == result
        assert not (directory / "per_image.parquet").exists()
        assert (directory / "samples" / "contact-sheet.png").is_file()
        assert (directory / "checkpoints" / "attack.safetensors").is_file()

    def test_nothing_else_is_trained(self, plain, run):
        assert set(made(plain[1])) == {"data", "attack-thumbnail-none", "link-thumbnail-none"}
        assert made(run()[1]) == []


@pytest.mark.slow
def test_noise_hides_and_more_interceptions_see_through_it(run, plain):
    noisy = {"defense": "noise", "defense_options": {"scale": "1.5"}}
    result, _ = run(**noisy, budget="k=1,16")
    curve = result.strength
    assert set(curve.points[0].values) == {"linkage", "linkage_auc", "linkage_rank1"}
    assert set(curve.gain_of_last_doubling) == {"linkage"}
    assert curve.points[-1].values["linkage"] == result.linkage.protected_plain.accuracy
    ceiling = plain[0].linkage.plain.auc.value
    once, often = (point.values["linkage_auc"].value for point in curve.points)
    assert once < often < ceiling + 0.02
    gain = curve.gain_of_last_doubling["linkage"]
    before, last = (point.values["linkage"].value for point in curve.points)
    assert gain.value == pytest.approx(last - before)
    # Two independent interceptions hide more than one and a plain face.
    assert result.linkage.protected_protected.auc.value < result.linkage.protected_plain.auc.value + 0.02
    assert result.linkage.plain == plain[0].linkage.plain
    single, _ = run(**noisy)
    assert single.linkage.protected_plain.accuracy == curve.points[0].values["linkage"]


@pytest.mark.slow
def test_the_plan_has_no_ceiling_of_its_own(out, plain):
    stages = pipeline(out, **TINY, budget="pixels=4,8").plan().stages
    assert sorted((stage.name, stage.cached) for stage in stages) == [
        ("attack-thumbnail-none", False),
        ("attack-thumbnail-none", True),
        ("link-thumbnail-none", False),
        ("link-thumbnail-none", True),
    ]


@pytest.mark.slow
def test_an_attack_that_guesses_says_nothing_and_is_called_broken(run, plain):
    assert (plain[0].attack.above_floor, plain[0].attack.broken) == (True, False)
    result, _ = run(attack="guess")
    assert (result.attack.above_floor, result.attack.broken) == (False, True)
    assert result.attack.saturated is None  # though it says so itself
    assert set(result.attack.floor_test.floors.values()) == {"guessing"}
    assert any(warning.startswith(NO_BETTER) for warning in result.warnings)
    hidden, _ = run(defense="noise", defense_options={"scale": "1e5"})
    assert (hidden.attack.above_floor, hidden.attack.broken) == (False, False)
