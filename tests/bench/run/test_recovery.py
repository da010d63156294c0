"""Runs of small attacks whose outcome is known: one that echoes, two that see a half each, one that reads states."""

import io
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from pixel_judge import write_pixel_judge
from rich.console import Console
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tiny_runs import finished, made, pipeline, registered, stages_of
from torch.nn.functional import interpolate

from attacks.base import AttackOptions, Capability, FitReport, RecoveryAttack
from bench.errors import BenchError, UsageError
from bench.metrics.evaluator import Evaluator
from bench.metrics.identity import content_ids
from bench.results import NO_BETTER, read_result
from bench.run.attacker import AttackStages
from bench.run.findings import FLOOR_MARGINS
from bench.run.linkage import recovered_pairs
from defenses.base import Defense
from defenses.layout import probe
from reports.report import write_leaderboard, write_report
from reports.terminal import render_result

TINY = {"defense": "pixelate", "attack": "echo", "utility": False}


class EchoOptions(AttackOptions):
    steps: int = 4
    batch_limit: int = 0


class Echo(RecoveryAttack):
    """Returns what was sent, greyer the fewer its steps; from four on nothing is grey."""

    name = "echo"
    summary = "for tests"
    Options: ClassVar = EchoOptions
    budgets: ClassVar = {"steps": "steps"}

    def build(self, adversary):
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def fit(self, adversary):
        self.seen.copy_(torch.tensor([len(adversary.faces), len(adversary.identities.unique())]))
        return FitReport(details={"faces": len(adversary.faces), "people": int(self.seen[1])})

    def run(self, observation):
        share = min(1.0, self.options.steps / 4)
        faces = interpolate(observation.representations.mean(dim=1)[:, :3], (32, 32))
        return faces * share + 0.5 * (1 - share)


class Half(Echo):
    """Sees one half of the picture and knows nothing of the other."""

    columns: ClassVar = slice(0, 16)

    def run(self, observation):
        faces = super().run(observation)
        seen = torch.full_like(faces, 0.5)
        seen[..., self.columns] = faces[..., self.columns]
        return seen


class LeftHalf(Half):
    name = "left-half"


class RightHalf(Half):
    name = "right-half"
    columns: ClassVar = slice(16, 32)


class Prototype(Echo):
    """Gives everybody one face, which it has made a little better than the mean face is."""

    name = "prototype"

    def build(self, adversary):
        super().build(adversary)
        self.register_buffer("face", adversary.faces.float().mean(dim=0) / 255)

    def fit(self, adversary):
        return replace(super().fit(adversary), saturated=True)

    def run(self, observation):
        face = (self.face - self.face.mean()) * 1.02 + self.face.mean()
        return face.expand(len(observation), -1, -1, -1)


class PlainOnly(Echo):
    """Opens what nobody has closed, and nothing else."""

    name = "plain-only"
    opens: ClassVar = frozenset({"affine"})  # or so it says

    def run(self, observation):
        faces = observation.representations[:, 0]
        opened = faces.shape[-1] == 32 and bool(((faces >= 0) & (faces <= 1)).all())
        return faces if opened else torch.full((len(faces), 3, 32, 32), 0.5)


class GivesUp(Echo):
    """Gives up wherever there is noise."""

    name = "gives-up"

    def run(self, observation):
        if observation.representations.max() > 1:
            raise ValueError("tired")
        return super().run(observation)


class GivesUpToo(GivesUp):
    name = "gives-up-too"


class Vandal(Echo):
    """Does what the echo does, and writes into all that it was handed."""

    name = "vandal"
    needs: ClassVar = frozenset({Capability.MECHANISM, Capability.RECOGNISER, Capability.STATE})

    def fit(self, adversary):
        report = super().fit(adversary)
        adversary.faces.zero_()
        adversary.identities.zero_()
        for module in (self.mechanism, adversary.recogniser):
            for tensor in module.state_dict().values():
                tensor.zero_()
        return report

    def run(self, observation):
        faces = super().run(observation)
        observation.representations.zero_()
        if observation.states is not None:
            observation.states.zero_()
        return faces

    def infer_layout(self, observation):
        self.run(observation)
        return super().infer_layout(observation)


class InPlace(Defense):
    """Noise, added in place as a defence may, in a buffer that it uses again."""

    name = "in-place"
    summary = "for tests"

    def transform(self, faces, state, generator):
        faces += 0.3 * torch.randn(faces.shape, generator=generator)
        return faces.clamp_(0, 1)


class Careful(InPlace):
    """The same on copies."""

    name = "careful"

    def transform(self, faces, state, generator):
        return (faces + 0.3 * torch.randn(faces.shape, generator=generator)).clamp(0, 1)


class Leaky(Defense):
    """Sends something that is no number of one face in twenty."""

    name = "leaky"
    summary = "for tests"

    def transform(self, faces, state, generator):
        broken = torch.rand(len(faces), 1, 1, 1, generator=generator) < 0.05
        return torch.where(broken, torch.nan, faces)


class Reader(Echo):
    """Reads off the layout of all channels, and gets one channel of every other face wrong."""

    name = "reader"
    needs: ClassVar = frozenset({Capability.STATE})

    def build(self, adversary):
        super().build(adversary)
        mechanism = adversary.mechanism(adversary.generator)
        # Not a part of its weights.
        object.__setattr__(self, "layout", None if mechanism.states() is None else probe(mechanism, mechanism.states()))

    def infer_layout(self, observation):
        if self.layout is None:
            return None
        states = observation.states
        inferred = self.layout.canonical[self.layout.row_of(states.flatten(0, 1))].unflatten(0, states.shape[:2])
        inferred[::2, :, 0] += 1
        return inferred


class Asker(Echo):
    """Asks three score queries a victim; while it is fitted, ten embedding queries and seven of the client."""

    name = "asker"
    needs: ClassVar = frozenset({Capability.EMBEDDINGS, Capability.SCORES})
    uses: ClassVar = frozenset({Capability.PROTECTION})

    def fit(self, adversary):
        adversary.embed(adversary.faces[:10].float() / 255)
        assert len(adversary.client(adversary.faces[:7].float() / 255)) == 7
        return super().fit(adversary)

    def run(self, observation):
        for _ in range(3):
            faces = super().run(observation)
            scores = observation.score(faces, torch.arange(len(faces)))
            assert scores.shape == (len(faces),)
        return faces


class Failing(Echo):
    """Gives up in its second batch unless it is told that the time has come."""

    name = "failing"
    calls: ClassVar = []
    patient: ClassVar = False

    def run(self, observation):
        type(self).calls.append(len(observation))
        if len(self.calls) == 2 and not self.patient:
            raise ValueError("tired")
        return super().run(observation)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    attacks = (Echo, LeftHalf, RightHalf, Prototype, PlainOnly, GivesUp, GivesUpToo, Vandal, Reader, Asker, Failing)
    with registered(*attacks, InPlace, Careful, Leaky):
        yield


@pytest.fixture(scope="module")
def run(out):
    return lambda **changes: finished(out, **{**TINY, **changes})


@pytest.fixture(scope="module")
def echoed(run):
    return run(budget="steps=8")


@pytest.mark.slow
class TestStrength:
    def test_each_point_is_a_run_of_its_own(self, echoed):
        result, directory = echoed
        curve = result.strength
        assert curve.axis == "steps"
        assert [point.budget for point in curve.points] == [1, 2, 4, 8]
        ssim = [point.values["ssim"].value for point in curve.points]
        assert ssim[0] < ssim[1] < ssim[2] == ssim[3]
        assert set(curve.points[0].values) == {"ssim", "psnr", "psnr_aligned", "cosine", "type1_tar"}
        assert curve.points[-1].values["ssim"] == result.recovery.ssim
        assert result.attack.options["steps"] == 8
        table = pd.read_parquet(directory / "per_image.parquet")
        assert {"echo", "echo steps=1", "echo steps=2", "echo steps=4", "ceiling"} <= set(table["method"])
        assert read_result(directory) == result

    def test_a_flat_last_doubling_is_saturated(self, echoed):
        result, _ = echoed
        assert result.strength.unsaturated is False
        assert result.strength.gain_of_last_doubling["ssim"].value == 0
        assert result.attack.saturated is None  # the attack itself says nothing
        assert not any("unsaturated" in warning for warning in result.warnings)

    def test_a_steep_last_doubling_is_not(self, run, echoed):
        result, directory = run(budget="steps=1,2,4")
        curve = result.strength
        assert curve.unsaturated is True
        assert result.attack.saturated is False
        assert any("unsaturated in steps" in warning for warning in result.warnings)
        gain = curve.gain_of_last_doubling["ssim"]
        before, last = curve.points[-2].values["ssim"], curve.points[-1].values["ssim"]
        assert gain.value == pytest.approx(last.value - before.value, abs=1e-6)
        # Paired: the victims differ far more from each other than the two budgets do on one victim.
        assert gain.ci95[1] - gain.ci95[0] < 0.5 * (last.ci95[1] - last.ci95[0])
        # All that the first curve fitted on this defence is there already.
        assert set(made(directory)) <= {"attack-echo-none", "recover-echo-none"}

    def test_less_data_is_whole_people(self, run):
        result, _ = run(budget="data=1")
        points = [point.budget for point in result.strength.points]
        assert points[-1] == result.attack.details["faces"] == result.dataset.images["public"]
        assert points == sorted(points)
        assert all(count % 4 == 0 for count in points)  # four images a person
        full, _ = run()
        assert full.recovery == result.recovery

    def test_the_fit_gets_the_faces_of_the_budget(self, run):
        result, _ = run(budget="data=9,20")
        assert result.attack.details == {"faces": 20, "people": 5}

    def test_more_interceptions_include_the_fewer(self, run):
        result, directory = run(budget="k=1,2", defense="noise", defense_options={"scale": "0.2"})
        curve = result.strength
        # The mean of two noisy copies is nearer to the face than one.
        assert curve.points[1].values["psnr"].value > curve.points[0].values["psnr"].value + 1
        assert made(directory).count("attack-echo-noise") == 1  # the fit does not depend on them
        same, _ = run(queries=2, defense="noise", defense_options={"scale": "0.2"})
        assert same.recovery.psnr == curve.points[1].values["psnr"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A judge, and as many people as it takes for it to be heard."""
    people = {"identities": 60, "images_per_identity": 4}
    judge = write_pixel_judge(tmp_path_factory.mktemp("judge") / "pixels.onnx")
    return {"evaluator": judge, "dataset_options": people}


@pytest.mark.slow
def test_what_comes_back_is_linked_with_plain_faces_by_the_judge(run, out, judged):
    result, _ = run(**judged)
    cell = pipeline(out, **TINY, **judged)
    stages = stages_of(cell)
    attacks = AttackStages(stages)
    recovered = attacks.recovered(cell.attack_configs["echo"][-1], stages.defense("pixelate", {})).faces
    evaluator, victims = Evaluator.from_file(judged["evaluator"]), stages.splits.victims
    seen, plain = evaluator.embed(recovered), evaluator.embed(victims.images)
    labels, attacked = victims.labels, attacks.selection.attacked
    # Ten other images each suffice for all, so that genuine pairs can be listed without a draw.
    mated = [(v, j) for v, i in enumerate(attacked) for j in range(len(labels)) if labels[i] == labels[j] and i != j]
    pairs, linkage = recovered_pairs(
        attacks.selection, labels, content_ids(victims.images), stages.splits.pairs,
        stages.streams.generator("linkage/recovered"), guessed=False,
    ), result.linkage  # fmt: skip
    place = {image: number for number, image in enumerate(attacked.tolist())}
    rows = torch.tensor([place[image] for image in pairs.first.tolist()])
    assert set(zip(rows[pairs.same].tolist(), pairs.second[pairs.same].tolist(), strict=True)) == set(mated)
    scores = {"protected_plain": (seen[rows] * plain[pairs.second]).sum(1)}
    scores["plain"] = (plain[pairs.first] * plain[pairs.second]).sum(1)
    for name, values in scores.items():
        assert getattr(linkage, name).auc.value == pytest.approx(roc_auc_score(pairs.same, values))
        assert getattr(linkage, name).pairs == len(pairs)
    assert linkage.rank1 == result.recovery.identity.rank1
    assert linkage.judge == result.evaluator.name == "pixels"


@pytest.mark.slow
def test_where_the_judge_is_withheld_nothing_is_said_of_linkage(echoed):
    result = echoed[0]
    assert result.evaluator.withheld is not None
    assert result.linkage.protected_plain.accuracy.reason == result.evaluator.withheld
    assert result.linkage.protected_plain.pairs == 0


@pytest.fixture(scope="module")
def several(run, judged):
    return run(attack="left-half,right-half", attack_options={"left_half": {"batch_limit": "3"}}, **judged)


@pytest.mark.slow
class TestSeveralAttacks:
    def test_each_victim_suffers_the_worst_by_every_measure(self, several):
        result, directory = several
        table = pd.read_parquet(directory / "per_image.parquet").set_index(["method", "image"])
        left, right, both = (table.loc[name] for name in ("left-half", "right-half", "worst case"))
        for name in ("ssim", "psnr", "psnr_aligned", "ms_ssim", "cosine", "type1_tar", "type2_tar", "rank1", "rank5"):
            np.testing.assert_array_equal(both[name], np.maximum(left[name], right[name]))
        np.testing.assert_array_equal(both["knn_distance"], np.minimum(left["knn_distance"], right["knn_distance"]))
        better = left["ssim"] > right["ssim"]
        assert 0 < better.sum() < len(better)  # neither half is the better one for everybody
        ssim = result.worst_case.ssim
        assert ssim.value == pytest.approx(both["ssim"].mean(), abs=1e-6)
        assert ssim.ci95[0] < ssim.value < ssim.ci95[1]

    def test_each_has_a_result(self, several):
        result, directory = several
        assert result.attack is result.recovery is None
        assert list(result.attacks) == ["left-half", "right-half"]
        assert all(result.worst_case.ssim.value > half.recovery.ssim.value for half in result.attacks.values())
        assert result.worst_case.ceiling.ssim.value > result.worst_case.ssim.value
        options = {name: half.attack.options["batch_limit"] for name, half in result.attacks.items()}
        assert options == {"left-half": 3, "right-half": 0}
        assert {"recover left-half", "recover right-half"} <= set(result.throughput)
        assert (directory / "checkpoints" / "attack-left-half.safetensors").is_file()
        assert (directory / "samples" / "contact-sheet.png").is_file()

    def test_an_attack_that_ran_with_others_is_not_run_again_alone(self, run, several, judged):
        result, directory = run(attack="right-half", **judged)
        assert made(directory) == []
        assert result.worst_case is None
        assert result.attack_results == {"right-half": several[0].attacks["right-half"]}

    def test_one_that_lacks_what_it_needs_is_refused_before_any_compute(self, run):
        with pytest.raises(UsageError, match="attack reader needs known state"):
            run(attack="echo,reader")


@pytest.mark.slow
class TestWithoutUtility:
    def test_no_recogniser_of_the_provider_is_trained(self, echoed):
        result, directory = echoed
        assert result.utility is None
        assert any("utility was not measured" in warning for warning in result.warnings)
        assert set(result.throughput) == {"protect", "recover"}
        assert not any(stage.startswith(("recogniser-provider", "verify")) for stage in result.seconds)
        assert not (directory / "scores.parquet").exists()
        assert not (directory / "checkpoints" / "recogniser.safetensors").exists()

    def test_one_is_trained_for_an_attack_that_asks_it(self, run):
        result, directory = run(attack="asker", probes=5)
        assert result.utility is None
        assert "recogniser-provider-pixelate" in result.seconds
        assert "recognise" in result.throughput
        assert not any(stage.startswith("verify") for stage in result.seconds)
        # Counted, and read back from the cache.
        assert result.attack.details["fit_queries"] == 10
        assert result.attack.details["protection_queries"] == 7
        assert result.attack.details["queries_per_victim"] == 3
        again, directory = run(attack="asker", probes=5)
        assert made(directory) == []
        assert again.attack.details == result.attack.details


@pytest.mark.slow
class TestOneOfSeveralFails:
    NOISE: ClassVar = {"defense": "noise", "defense_options": {"scale": "0.2"}}

    def test_the_others_go_on_and_the_worst_case_is_incomplete_everywhere(self, run, tmp_path):
        result, directory = run(attack="echo,gives-up", **self.NOISE)
        alone, _ = run(attack="echo", **self.NOISE)
        assert list(result.attacks) == ["echo"]
        assert result.failed == {"gives-up": "attack gives-up on noise: tired"}
        assert result.attacks["echo"].recovery == alone.recovery
        assert result.worst_case.ssim == alone.recovery.ssim
        assert any("gives-up failed, and the worst case is incomplete" in warning for warning in result.warnings)
        assert read_result(directory) == result
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(render_result(result, directory))
        assert "Worst case of all attacks, victim by victim; incomplete: gives-up failed" in console.export_text()
        write_report([directory], tmp_path)
        write_leaderboard(directory, tmp_path)
        for name in ("report.html", "report.md", "leaderboard.html", "leaderboard.md", "leaderboard.csv"):
            assert "over 1 attack run; incomplete: 1 failed" in (tmp_path / name).read_text(), name
        assert "tired" in (tmp_path / "measures.csv").read_text()

    def test_where_all_fail_the_run_does(self, run):
        with pytest.raises(BenchError, match="attack gives-up on noise: tired"):
            run(attack="gives-up,gives-up-too", **self.NOISE)

    def test_what_is_wrong_with_the_defence_is_wrong_for_all(self, run):
        with pytest.raises(BenchError, match=r"^defence leaky"):
            run(attack="echo,gives-up", defense="leaky", probes=12, queries=8)


@pytest.mark.slow
class TestThirdParties:
    def test_an_attack_that_writes_into_what_it_is_handed_changes_nothing(self, run):
        told = {"defense": "partialface", "knowledge": "oracle"}
        expected, _ = run(**told)
        result, _ = run(**told, attack="vandal")
        assert result.recovery == expected.recovery
        assert result.attack.floor_test == expected.attack.floor_test

    def test_a_defence_that_works_in_place_is_attacked_as_one_that_does_not(self, run):
        options = {"widths": "4,8", "stem_stride": "2", "images": "256", "batch_size": "16"}
        trained = {"attack": "unet", "attack_options": options, "queries": 2}
        in_place, careful = (run(defense=name, **trained)[0] for name in ("in-place", "careful"))
        assert in_place.attack.curve == careful.attack.curve
        assert in_place.recovery == careful.recovery

    @pytest.mark.parametrize("utility", [False, True])
    def test_a_defence_that_sends_what_is_no_number_is_named(self, run, utility):
        with pytest.raises(BenchError, match=r"^defence leaky made representations that are not finite, of \d+ of \d+"):
            run(defense="leaky", attack="unet", utility=utility)


@pytest.mark.slow
class TestFloors:
    def test_one_face_for_everybody_says_nothing_and_is_broken(self, run):
        result, _ = run(attack="prototype")
        attack = result.attack
        assert (attack.above_floor, attack.broken, attack.saturated) == (False, True, None)
        assert all(gain.value < FLOOR_MARGINS[name] for name, gain in attack.floor_test.gains.items())
        assert any(warning.startswith(NO_BETTER) for warning in result.warnings)
        assert any(warning.startswith("broken") for warning in result.warnings)

    def test_an_attack_that_works_is_above_them(self, echoed):
        attack = echoed[0].attack
        assert (attack.above_floor, attack.broken) == (True, False)
        assert attack.plain_test.gains["ssim"].value > 0.3
        assert not any(NO_BETTER in warning for warning in echoed[0].warnings)

    def test_what_opens_nothing_says_nothing_of_the_defence(self, run):
        result, _ = run(attack="plain-only", defense="noise", defense_options={"scale": "0.2"})
        assert (result.attack.above_floor, result.attack.broken) == (False, False)

    @pytest.mark.parametrize(("kind", "broken"), [("affine", True), ("permutation", False)])
    def test_a_canary_that_an_attack_claims_in_vain_shows_that_it_is_broken(self, run, kind, broken):
        result, _ = run(attack="plain-only", defense="canary", defense_options={"kind": kind, "shift": 5})
        assert (result.attack.above_floor, result.attack.broken) == (False, broken)
        assert any("canary affine" in warning for warning in result.warnings) is broken

    def test_an_attack_that_fails_and_claims_no_canary_is_said_to_be_unproven(self, run):
        result, _ = run(attack="prototype")
        assert any("names no canary" in warning for warning in result.warnings)

    def test_the_worst_case_is_held_against_the_worst_case_of_the_floors(self, several, run):
        result, directory = several
        floors = {name: floor.ssim.value for name, floor in result.worst_case.floors.items()}
        assert set(floors) == {"mean_face", "grey", "noise", "nearest", "pointwise_worst"}
        table = pd.read_parquet(directory / "per_image.parquet").set_index(["method", "image"])["ssim"]
        highest = np.max([table.loc[name] for name in floors if name != "pointwise_worst"], axis=0)
        np.testing.assert_array_equal(table.loc["pointwise_worst"], highest)
        assert floors["pointwise_worst"] == pytest.approx(highest.mean(), abs=1e-6)
        assert floors["pointwise_worst"] > max(value for name, value in floors.items() if name != "pointwise_worst")
        better, _ = run(attack="echo,prototype")
        assert better.worst_case_test.above is True
        nothing, _ = run(attack="prototype,plain-only", defense="noise", defense_options={"scale": "1e4"})
        assert nothing.worst_case_test.above is False
        assert any(warning.startswith(f"worst case: {NO_BETTER}") for warning in nothing.warnings)


@pytest.mark.slow
class TestStateInference:
    def test_the_hit_rate_is_what_it_is(self, run):
        result, _ = run(attack="reader", defense="partialface", knowledge="oracle", queries=2)
        inference = result.state_inference
        assert inference.faces.value == 0.5
        assert inference.channels.value == pytest.approx(1 - 0.5 / 27)
        assert inference.faces.n == 12
        assert inference.faces.ci95 is not None
        assert inference.chance == pytest.approx(1 / 18)

    def test_nothing_inferred_nothing_said(self, echoed):
        assert echoed[0].state_inference is None


@pytest.mark.slow
def test_a_killed_recovery_goes_on_after_the_batches_it_had_done(run):
    changes = {"attack": "failing", "batch_size": 5}
    with pytest.raises(BenchError, match="attack failing on pixelate: tired"):
        run(**changes)
    assert Failing.calls == [5, 5]
    Failing.patient = True
    _, directory = run(**changes)
    # The first batch is not done again: the second and third of this defence, then three without one.
    assert Failing.calls[2:7] == [5, 2, 5, 5, 2]
    stored = next(path for path in (directory.parent / "cache").glob("recover-failing-pixelate-*") if path.is_dir())
    tensors = load_file(stored / "recovered.safetensors")
    assert tensors["batch_faces"].tolist() == [5, 5, 2]
    assert len(tensors["faces"]) == 12
    assert {path.name for path in stored.iterdir()} == {"recovered.safetensors", "files.json"}


@pytest.mark.slow
def test_the_plan_knows_every_part(out, run, several, judged, echoed):
    def plan(**changes):
        return pipeline(out, **{**TINY, **changes}).plan()

    names = [stage.name for stage in plan(budget="steps=8").stages]
    assert names.count("attack-echo-pixelate") == names.count("recover-echo-pixelate") == 4
    assert names.count("attack-echo-none") == 1
    assert not any(name.startswith("recogniser-provider") for name in names)
    parts = plan(attack="left-half,right-half", attack_options={"left_half": {"batch_limit": "3"}}, **judged)
    assert all(stage.cached for stage in parts.stages)
    assert {"attack-left-half-pixelate", "attack-right-half-none"} <= {stage.name for stage in parts.stages}
    new = plan(attack="asker", seed=7)
    assert not any(stage.cached for stage in new.stages)
    assert {"recogniser-provider-pixelate", "recogniser-provider-none"} <= {stage.name for stage in new.stages}
