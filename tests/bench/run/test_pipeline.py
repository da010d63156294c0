"""One run from end to end, tiny: what is written, what is reused, what is refused."""

import json
import shutil

import pandas as pd
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_runs import TINY_UNET

from attacks.base import Adversary, Capability, FitReport, Observation
from bench import plugins
from bench.errors import BenchError, UsageError, failing_as
from bench.files import sha256
from bench.results import read_result
from bench.run.attack_config import check_attack, check_coverage
from bench.run.attacker import AttackStages
from bench.run.sources import DataSet

TINY = {"defense": "partialface", "attack": "unet", "attack_options": TINY_UNET}


def pipeline(out, **changes):
    return tiny_runs.pipeline(out, **{**TINY, **changes})


@pytest.fixture(scope="module")
def finished(out):
    return tiny_runs.finished(out, **TINY)


@pytest.mark.slow
class TestFinishedRun:
    def test_result_is_complete(self, finished):
        result, directory = finished
        assert result.status == "success"
        assert read_result(directory) == result
        recovery = result.recovery
        assert set(recovery.floors) == {"mean_face", "grey", "noise", "nearest"}
        for quality in (recovery, recovery.ceiling, *recovery.floors.values()):
            assert 0 <= quality.psnr.value <= 100
            assert -1 <= quality.ssim.value <= 1
            assert quality.psnr_aligned.value >= quality.psnr.value - 1e-6
            assert quality.ssim.n == 12
        assert recovery.ssim.ci95[0] <= recovery.ssim.value <= recovery.ssim.ci95[1]
        assert result.utility.pairs > 0
        assert 0 <= result.utility.accuracy.value <= 1
        assert result.utility.unprotected.accuracy.value is not None
        assert set(result.throughput) == {"protect", "recognise", "recover"}
        assert result.defense.states == 18
        assert result.defense.bytes_per_face == 27 * 32 * 32 * 4
        assert result.attack.states_covered is True
        assert result.peak_memory["process_bytes"] > 0
        assert (recovery.lpips.value is None) == (recovery.lpips.reason is not None)
        assert result.dataset.synthetic
        assert any("synthetic" in warning for warning in result.warnings)
        assert set(result.dataset.identities) == {"provider", "public", "evaluator", "victims"}
        assert sum(result.dataset.identities.values()) <= 40
        assert result.cached == []  # what this run made is not called reused

    def test_files(self, finished):
        _, directory = finished
        manifest = json.loads((directory / "manifest.json").read_text())
        assert manifest["status"] == "success"
        assert manifest["artefacts"]["metrics.json"] == sha256(directory / "metrics.json")
        assert manifest["config"]["seed"] == 0
        assert manifest["packages"]["torch"] == torch.__version__
        with Image.open(directory / "samples" / "contact-sheet.png") as sheet:
            assert sheet.width > 400
        table = pd.read_parquet(directory / "per_image.parquet")
        assert set(table["method"]) == {"unet", "ceiling", "mean_face", "grey", "noise", "nearest"}
        assert len(table) == 6 * 12
        own = table[table["method"] == "unet"]
        assert own["ssim"].mean() == pytest.approx(finished[0].recovery.ssim.value, abs=1e-6)
        scores = pd.read_parquet(directory / "scores.parquet")
        assert len(scores) == finished[0].utility.pairs
        events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
        assert events[0]["event"] == "started"
        assert events[-1]["event"] == "success"
        assert {path.name for path in (directory / "checkpoints").iterdir()} == {
            "recogniser.safetensors",
            "attack.safetensors",
        }

    def test_the_same_run_again_computes_nothing_and_says_the_same(self, finished, out):
        first, _ = finished
        again = pipeline(out).run()
        assert again.recovery == first.recovery
        assert again.utility == first.utility
        assert not {stage for stage in again.seconds if stage.startswith(("recogniser", "attack"))} - set(again.cached)

    def test_a_second_attack_trains_no_recogniser(self, finished, out):
        _, directory = tiny_runs.finished(out, **{**TINY, "attack_options": {**TINY_UNET, "widths": "4,12"}})
        assert set(tiny_runs.made(directory)) == {
            "attack-unet-partialface",
            "attack-unet-none",
            "recover-unet-partialface",
            "recover-unet-none",
        }

    def test_plan_knows_what_is_cached(self, finished, out):
        plan = pipeline(out).plan()
        assert all(stage.cached for stage in plan.stages)
        assert plan.seconds == 0
        changed = pipeline(out, seed=1).plan()
        assert not any(stage.cached for stage in changed.stages)
        assert changed.seconds > 0

    def test_a_cache_damaged_at_every_stage_is_made_anew(self, finished, out, tmp_path, caplog):
        """A full disk cuts files short: the next run says which, and its figures are those of the first."""
        first, _ = finished
        shutil.copytree(out / "cache", tmp_path / "cache")
        stages = list((tmp_path / "cache").glob("*/"))
        for file in (tmp_path / "cache").rglob("*.safetensors"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        again = pipeline(tmp_path).run()
        assert again.cached == []
        assert again.recovery.ssim.value == pytest.approx(first.recovery.ssim.value, abs=1e-4)
        warned = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert len(warned) >= 6
        assert len(warned) <= len(stages)

    def test_no_resume_computes_the_same_figures_again(self, finished, out, tmp_path):
        first, _ = finished
        fresh = pipeline(tmp_path, resume=False).run()
        assert fresh.recovery.ssim.value == pytest.approx(first.recovery.ssim.value, abs=1e-4)
        assert fresh.utility.accuracy.value == pytest.approx(first.utility.accuracy.value, abs=1e-2)


@pytest.mark.slow
def test_a_limited_run_works_and_says_so(tmp_path):
    result = pipeline(tmp_path, attack="linear", attack_options={}, defense="pixelate", utility=False, limit=120).run()
    assert result.status == "success"
    assert sum(result.dataset.images.values()) <= 120
    assert result.dataset.details["limit"] == 120
    assert any(warning.startswith("limit: 120 faces") for warning in result.warnings)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BenchError("the loss is not finite"), "error", "the loss is not finite"),
        (KeyboardInterrupt(), "cancelled", "KeyboardInterrupt"),
        (SystemExit(0), "error", "a plug-in or a library wanted to end the process (SystemExit: 0)"),
    ],
)
def test_a_run_that_does_not_end_leaves_a_result_that_says_so(tmp_path, monkeypatch, error, status, message):
    def explode(self, report):
        raise error

    monkeypatch.setattr(DataSet, "load", explode)
    cell = pipeline(tmp_path)
    with pytest.raises(BenchError if isinstance(error, SystemExit) else type(error)):
        cell.run()
    result = read_result(cell.directory)
    assert (result.status, result.error) == (status, message)
    assert json.loads((cell.directory / "manifest.json").read_text())["status"] == status


def test_a_plugin_that_gives_up_is_named():
    with pytest.raises(BenchError, match="attack x: the loss became nan at step 3"), failing_as("attack x"):
        raise FloatingPointError("the loss became nan at step 3")
    with pytest.raises(TypeError), failing_as("attack x"):  # a bug stays a bug
        raise TypeError
    with pytest.raises(BenchError, match=r"attack x: .*wanted to end the process"), failing_as("attack x"):
        raise SystemExit(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defense": "partailface"}, "did you mean 'partialface'"),
        ({"attack": "unett"}, "did you mean 'unet'"),
        ({"dataset": "synthetics"}, "did you mean 'synthetic'"),
        ({"backbone": "ir-19"}, "unknown backbone"),
        ({"device": "tpu"}, "unknown device"),
        ({"defense_options": {"colour": "1"}}, "unknown key 'colour'"),
        ({"attack_options": {"width": "1"}}, "unknown key 'width'"),
    ],
)
def test_refused_before_any_compute(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        pipeline(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_the_judge_is_no_teacher(tmp_path):
    judge, copy, other = (tmp_path / name for name in ("judge.onnx", "copy.onnx", "other.onnx"))
    judge.write_bytes(b"a recogniser")
    copy.write_bytes(b"a recogniser")
    other.write_bytes(b"another one")
    plain = plugins.make_defense("none", {}, "cpu", 32)
    check_attack(plugins.make_attack("linkage", {"teacher": other}, "quick"), plain, "whitebox", [judge])
    check_attack(plugins.make_attack("linkage", {}, "quick"), plain, "whitebox", [judge])
    with pytest.raises(UsageError, match=r"-a teacher=.*copy\.onnx is the evaluator"):
        check_attack(plugins.make_attack("linkage", {"teacher": copy}, "quick"), plain, "whitebox", [judge])


def test_needs_are_checked_against_the_rung():
    class Greedy(plugins.attacks().get("unet")):
        needs = frozenset({Capability.STATE})

    greedy = Greedy(Greedy.Options())

    with pytest.raises(UsageError, match=r"needs known state.*use --knowledge oracle"):
        check_attack(greedy, TestCoverage.defense, "whitebox")
    check_attack(greedy, TestCoverage.defense, "oracle")


class TestCoverage:
    defense = plugins.make_defense("partialface", {}, "cpu", 32)

    def test_half_the_states_fail_loudly(self):
        half = FitReport(states_seen=self.defense.states()[:9])
        with pytest.raises(BenchError, match="trained on 9 of the 18 states"):
            check_coverage(half, self.defense, "oracle")

    def test_all_states_guessed_ones_and_none(self):
        assert check_coverage(FitReport(states_seen=self.defense.states()), self.defense, "whitebox") is True
        # Guessed states are not the real ones.
        assert check_coverage(FitReport(states_seen=self.defense.states()[:1]), self.defense, "blackbox") is None
        plain = plugins.make_defense("none", {}, "cpu", 32)
        assert check_coverage(FitReport(), plain, "whitebox") is None


@pytest.mark.slow
def test_an_attack_cannot_reach_the_victims(out, monkeypatch):
    """Whatever an attack can get hold of, the victims' pixels are not in it."""
    stages = tiny_runs.stages_of(pipeline(out))
    attacks = AttackStages(stages)
    victims = stages.splits.victims.images
    defense = stages.defense("partialface", {})
    attack = plugins.make_attack("unet", TINY_UNET, "quick")
    adversary = attacks.adversary(attack, defense)
    observation = next(attacks.observations(attack, defense, torch.arange(8), 1)).observation
    seen = [value for value in vars(adversary).values() if isinstance(value, torch.Tensor)]
    seen += [observation.representations]
    pixels = {victim.numpy().tobytes() for victim in victims}
    for tensor in seen:
        if tensor.dtype == torch.uint8 and tensor.ndim == 4:
            assert not pixels & {image.numpy().tobytes() for image in tensor}
    assert isinstance(adversary, Adversary)
    assert isinstance(observation, Observation)
    assert observation.states is None  # whitebox
    names = stages.splits.victims.used_names
    assert not names & stages.splits.public.used_names
    assert not names & stages.splits.provider.used_names
