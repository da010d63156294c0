"""Runs of a linkage attack that sees small pictures: on plain faces it has to find itself at its ceiling."""

import json
from typing import ClassVar

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from registered import finished, registered
from rich.console import Console

from attacks.base import AttackOptions, FitReport, LinkageAttack
from bench.attack_stages import AttackStages
from bench.attempt import attempts
from bench.config import resolve
from bench.errors import BenchError
from bench.linkage_run import _broken
from bench.pipeline import Pipeline
from bench.results import read_result

TINY = {
    "defense": "none",
    "attack": "thumbnail",
    "preset": "quick",
    "device": "cpu",
    "image_size": 32,
    "probes": 12,
    "bootstrap": 100,
    "utility": False,
    "dataset_options": {"identities": 40, "images_per_identity": 4},
}


class ThumbnailOptions(AttackOptions):
    side: int = 8


class Thumbnail(LinkageAttack):
    """The embedding of anything is what it looks like from afar."""

    name = "thumbnail"
    summary = "for tests"
    Options: ClassVar = ThumbnailOptions
    budgets: ClassVar = {"pixels": "side"}

    def prepare(self, adversary):
        self.register_buffer("mean", torch.zeros(3 * self.options.side**2))

    def fit(self, adversary):
        self.prepare(adversary)
        self.mean.copy_(self.thumbnails(adversary.faces.float() / 255).mean(dim=0))
        return FitReport(saturated=True)

    def thumbnails(self, faces):
        return F.interpolate(faces, (self.options.side,) * 2, mode="area").flatten(1)

    def embed_faces(self, faces):
        return F.normalize(self.thumbnails(faces) - self.mean, dim=1)

    def embed_representations(self, representations):
        return self.embed_faces(representations)


class Misshapen(Thumbnail):
    """Forgets to flatten."""

    name = "misshapen"

    def embed_representations(self, representations):
        return representations


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with registered(Thumbnail, Misshapen):
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(out):
    return lambda **changes: finished(**{**TINY, "out": out, **changes})


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
        one = Pipeline(resolve({**TINY, "out": out}, {}), console=Console(quiet=True))
        stages = AttackStages(one._stages(lambda *_, **__: None))
        linked = stages.linked(attempts(one.config)[-1], stages.stages.defense("none", {}))
        pairs = stages.stages.splits.pairs
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
        def made(directory):
            events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
            return [event["stage"] for event in events if event["event"] == "stage"]

        assert set(made(plain[1])) == {"data", "attack-thumbnail-none", "link-thumbnail-none"}
        _, again = run()
        assert made(again) == []


@pytest.mark.slow
def test_noise_hides_and_more_interceptions_see_through_it(run, plain):
    noisy = {"defense": "noise", "defense_options": {"scale": "1.5"}}
    result, _ = run(**noisy, budget="k=1,16")
    curve = result.strength
    assert set(curve.points[0].values) == {"accuracy", "auc", "rank1"}
    assert set(curve.gain_of_last_doubling) == {"accuracy"}
    assert curve.points[-1].values["accuracy"] == result.linkage.protected_plain.accuracy
    ceiling = plain[0].linkage.plain.auc.value
    once, often = (point.values["auc"].value for point in curve.points)
    assert once < often < ceiling + 0.02
    gain = curve.gain_of_last_doubling["accuracy"]
    before, last = (point.values["accuracy"].value for point in curve.points)
    assert gain.value == pytest.approx(last - before)
    # Two independent interceptions hide more than one and a plain face.
    assert result.linkage.protected_protected.auc.value < result.linkage.protected_plain.auc.value + 0.02
    assert result.linkage.plain == plain[0].linkage.plain
    single, _ = run(**noisy)
    assert single.linkage.protected_plain.accuracy == curve.points[0].values["accuracy"]


@pytest.mark.slow
def test_embeddings_of_another_shape_are_the_attacks_fault(run):
    with pytest.raises(BenchError, match=r"attack misshapen on none: misshapen returned .* expected \(N, D\)"):
        run(attack="misshapen")


@pytest.mark.slow
def test_the_plan_has_no_ceiling_of_its_own(out, plain):
    one = Pipeline(resolve({**TINY, "out": out, "budget": "pixels=4,8"}, {}), console=Console(quiet=True))
    stages = [(stage.name, stage.cached) for stage in one.plan().stages]
    assert sorted(stages) == [
        ("attack-thumbnail-none", False),
        ("attack-thumbnail-none", True),
        ("link-thumbnail-none", False),
        ("link-thumbnail-none", True),
    ]


@pytest.mark.slow
def test_an_attack_that_guesses_is_called_broken(plain):
    linkage = plain[0].linkage
    for value, ci95, broken in ((0.6, (0.55, 0.65), False), (0.6, (0.5, 0.7), True), (0.6, None, False)):
        accuracy = linkage.plain.accuracy.model_copy(update={"value": value, "ci95": ci95})
        verification = linkage.plain.model_copy(update={"accuracy": accuracy})
        assert bool(_broken(linkage.model_copy(update={"plain": verification}))) is broken
