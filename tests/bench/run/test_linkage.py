"""Runs of a linkage attack that sees small pictures: on plain faces it has to find itself at its ceiling."""

from __future__ import annotations

from typing import ClassVar

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tiny_runs import finished, made, pipeline, registered, stages_of

from attacks.base import AttackOptions, FitReport, LinkageAttack
from bench.data.faces import PairProtocol
from bench.data.pairs import draw_pairs
from bench.errors import DataError
from bench.metrics.bootstrap import verification_estimates
from bench.metrics.identity import Probes
from bench.metrics.unlinkability import unlinkability
from bench.metrics.verification import lfw_accuracy
from bench.results import NO_BETTER, Linkage, Measure, read_result
from bench.run.attacker import AttackStages
from bench.run.linkage import assess_linkage, assess_recovered, linkage_scores, no_linkage, recovered_pairs
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


# -- recovered faces -------------------------------------------------------------------------------

CONTENT = torch.arange(len(LABELS))
RANK1 = Measure(value=0.5, direction="leakage")


def recovered(recovery: torch.Tensor, plain: torch.Tensor, made: PairProtocol, **options) -> Linkage:
    return assess_recovered(
        recovery, plain, judge="judge", labels=LABELS, pairs=made, probes=PROBES, rank1=RANK1, seed=5, **options
    )


def draw(pairs, *, content=CONTENT, guessed=False):
    return recovered_pairs(PROBES, LABELS, content, pairs, torch.Generator().manual_seed(3), guessed=guessed)


def test_a_recovered_face_meets_every_other_image_of_its_person_and_images_of_others(pairs):
    made = draw(pairs)
    mated = {(int(i), int(j)) for i, j, same in zip(made.first, made.second, made.same, strict=True) if same}
    assert mated == {(i, i + more) for i in PROBES.attacked.tolist() for more in (1, 2, 3)}
    assert torch.equal(LABELS[made.first] == LABELS[made.second], made.same)
    others = torch.stack((made.first, made.second))[:, ~made.same]
    assert len(torch.unique(others, dim=1).T) == others.shape[1]
    # Of 4,000 draws nearly every one of the 24 x 92 pairs of two people comes up.
    assert 0.7 * 24 * 92 < others.shape[1] <= 24 * 92
    for person in range(PEOPLE):
        assert len(torch.unique(made.fold[LABELS[made.first] == person])) == 1


def test_a_copy_of_the_attacked_image_is_no_other_image(pairs):
    copies = CONTENT.clone()
    copies[PROBES.attacked + 1] = copies[PROBES.attacked]
    made = draw(pairs, content=copies)
    mated = made.second[made.same]
    assert sorted(mated.tolist()) == sorted((PROBES.attacked[:, None] + torch.tensor([2, 3])).flatten().tolist())


def test_of_guessed_people_only_the_protocol_says_who_is_another(pairs):
    made = draw(pairs, guessed=True)
    told = {
        frozenset((int(i), int(j))) for i, j in zip(pairs.first[~pairs.same], pairs.second[~pairs.same], strict=True)
    }
    attacked = set(PROBES.attacked.tolist())
    others = list(zip(made.first[~made.same].tolist(), made.second[~made.same].tolist(), strict=True))
    assert len(others) == sum(len(pair & attacked) for pair in told) > 0
    assert {frozenset(pair) for pair in others} <= told
    assert {i for i, _ in others} <= attacked


def test_the_figures_of_recovered_faces_are_those_worked_out_by_hand(pairs):
    made, plain = draw(pairs), embeddings(0.8, 3)
    faces = embeddings(1.1, 1)[PROBES.attacked]
    linkage = recovered(faces, plain, made)
    place = {image: number for number, image in enumerate(PROBES.attacked.tolist())}
    rows = torch.tensor([place[int(image)] for image in made.first])
    expected = {
        "protected_plain": (faces[rows] * plain[made.second]).sum(dim=1),
        "plain": (plain[made.first] * plain[made.second]).sum(dim=1),
    }
    for name, scores in expected.items():
        verified = getattr(linkage, name)
        assert verified.auc.value == pytest.approx(roc_auc_score(made.same, scores))
        impostors = scores[~made.same].sort(descending=True).values
        strict = impostors[int(0.01 * len(impostors))]  # the first score that may not be accepted
        assert verified.tar_at_far["1e-2"].value == pytest.approx(float((scores[made.same] > strict).double().mean()))
        # No threshold does better than the best one of all scores, and guessing gets one half.
        tar = torch.stack([(scores[made.same] >= t).double().mean() for t in scores])
        far = torch.stack([(scores[~made.same] >= t).double().mean() for t in scores])
        best = float(((tar + 1 - far) / 2).max())
        assert best - 0.08 < verified.accuracy.value < best + 0.04
        assert verified.accuracy.n == 2 * int(made.same.sum())
        assert verified.pairs == len(made)
    assert linkage.plain.auc.value > linkage.protected_plain.auc.value
    assert linkage.d_sys["protected_plain"].value == pytest.approx(
        unlinkability(expected["protected_plain"], made.same)
    )
    assert (linkage.judge, linkage.rank1) == ("judge", RANK1)
    assert linkage.protected_protected.pairs == 0
    assert "--attack linkage" in linkage.protected_protected.accuracy.reason


def test_faces_that_come_back_unchanged_are_linked_as_plain_ones_and_constants_not_at_all(pairs):
    made, plain = draw(pairs), embeddings(0.8, 3)
    whole = recovered(plain[PROBES.attacked], plain, made)
    assert whole.protected_plain == whole.plain
    constant = recovered(plain[:1].expand(PEOPLE, -1), plain, made)
    assert abs(constant.protected_plain.accuracy.value - 0.5) < 0.1


def test_where_nobody_has_another_image_the_reason_is_told(pairs):
    few = PairProtocol(*(column[pairs.same] for column in (pairs.first, pairs.second, pairs.same, pairs.fold)))
    linkage = recovered(embeddings(1.0, 1)[PROBES.attacked], embeddings(1.0, 3), few)
    assert linkage == no_linkage(linkage.plain.accuracy.reason, judge="judge")
    assert "0 of two: too few" in linkage.plain.accuracy.reason


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
    ours = [stage for stage in stages if stage.name.startswith(("attack-", "link-"))]
    assert sorted((stage.name, stage.cached) for stage in ours) == [
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
