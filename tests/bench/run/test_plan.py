"""``bench run --dry-run``: every stage and option, what is cached, and an estimate, for no work at all."""

import json
import os
import tempfile
import time
from multiprocessing import resource_tracker

import psutil
import pytest
import tiny_runs
import torch
from small_sets import people, picture, write_folder
from tiny_runs import measured

from bench.errors import DataError, MissingError
from bench.files import kept
from bench.recognition import training
from bench.run import plan as plan_module
from bench.run import provider, sources
from bench.run.plan import time_to_end
from bench.run.stage import LISTING, SECONDS, Job, StageRunner

TINY = {"defense": "pixelate", "attack": "linear", "probes": 4}
FOLDER = {"dataset": "folder", "dataset_options": {}}


def pipeline(out, **changes):
    return tiny_runs.pipeline(out, **{**TINY, **changes})


@pytest.fixture
def idle(monkeypatch):
    """Within, whoever reads, renders, shares out or trains fails."""

    def work(*_, **__):
        raise AssertionError("a plan computes nothing")

    for module, names in (
        (sources, "load scan digest"),
        (provider, "split digest build_recogniser embed_faces"),
        (training, "train"),
    ):
        for name in names.split():
            monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(StageRunner, "do", work)
    monkeypatch.setattr(plan_module, "_measured", work)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("faces") / "all", people(40, 3))


@pytest.fixture(scope="module")
def run(out):
    """A finished run: (result, folder)."""
    return tiny_runs.finished(out, **TINY)


def taken(cache):
    """Stage -> the seconds that were stored with it."""
    files = cache.glob(f"*/{SECONDS}")
    return {file.parent.name.rpartition("-")[0]: kept(file)["seconds"] for file in files}


def estimates(plan):
    return {stage.name: stage.seconds for stage in plan.stages}


@pytest.mark.parametrize("preset", ["quick", "paper"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"defense": "split", "attack": "unet,linkage", "attack_options": {}},
        {"defense": "biohash", "attack": "template", "knowledge": "oracle"},
        {"budget": "data=0.5,1"},
    ],
    ids=["linear", "fitted", "template", "budget"],
)
def test_a_plan_computes_and_writes_nothing(idle, tmp_path, preset, asked):
    plan = tiny_runs.Pipeline(
        tiny_runs.resolve({**TINY, "preset": preset, "device": "cpu", "out": tmp_path / "out", **asked}, {}),
        console=tiny_runs.Console(quiet=True),
    ).plan()
    assert {stage.cached for stage in plan.stages} == {False}
    assert set(estimates(plan).values()) == {None}
    assert plan.notes == (f"how long {len(plan.stages)} of {len(plan.stages)} stages take is unknown "
                          "(none like it was finished: try --measure)",)  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_plan_lists_what_a_run_makes(run, out, idle, tmp_path):
    fresh = pipeline(tmp_path).plan()
    assert [stage.name for stage in fresh.stages if stage.name not in tiny_runs.made(run[1])] == []
    assert set(tiny_runs.made(run[1])) == {stage.name for stage in fresh.stages}
    again = pipeline(out).plan()
    assert {stage.cached for stage in again.stages} == {True}
    assert again.notes == ()


@pytest.mark.slow
def test_options_are_told_as_a_run_resolves_them(run, idle, tmp_path):
    config = pipeline(tmp_path).plan().config
    assert config["defense_options"] == run[0].defense.options
    assert config["attack_options"] == {"linear": run[0].attack.options}
    assert config["training"]["epochs"] == tiny_runs.TINY["training"]["epochs"]


@pytest.mark.slow
class TestEstimate:
    def test_the_same_again_takes_what_it_took(self, run, out, idle):
        plan = pipeline(out, seed=1).plan()
        assert {stage.cached for stage in plan.stages} == {False}
        assert estimates(plan) == pytest.approx(taken(out / "cache"))
        assert plan.seconds == pytest.approx(sum(taken(out / "cache").values()))

    def test_two_at_a_time_go_by_trainings_with_half_of_the_threads(self, run, out, idle, set_threads):
        set_threads(2 * torch.get_num_threads())
        assert set(estimates(pipeline(out, seed=1).plan()).values()) == {None}
        plan, before = pipeline(out, seed=1).plan(beside=True), taken(out / "cache")
        assert estimates(plan) == pytest.approx(before)
        trained = [seconds for stage, seconds in before.items() if stage.startswith(("recogniser-", "attack-"))]
        assert len(trained) > 2
        rest = sum(before.values()) - sum(trained)
        assert plan.seconds == pytest.approx(rest + max(sum(trained) / 2, *trained))

    def test_it_grows_with_the_work(self, run, out, idle):
        more = {**tiny_runs.TINY["training"], "epochs": 3}
        told, before = estimates(pipeline(out, seed=1, training=more).plan()), taken(out / "cache")
        assert told["recogniser-provider-none"] == pytest.approx(3 * before["recogniser-provider-none"])
        assert told["verify-none"] == pytest.approx(before["verify-none"])
        everyone = {"identities": 80, "images_per_identity": 4}
        told = estimates(pipeline(out, dataset_options=everyone).plan())
        assert told["data"] == pytest.approx(2 * before["data"])
        assert told["attack-linear-none"] is None  # how its time grows with the faces is its own affair

    def test_another_defence_goes_by_what_was_done_behind_others(self, run, out, idle):
        told, before = estimates(pipeline(out, defense="blur").plan()), taken(out / "cache")
        assert told["recogniser-provider-blur"] == pytest.approx(
            (before["recogniser-provider-none"] + before["recogniser-provider-pixelate"]) / 2
        )
        assert told["recover-linear-blur"] > 0

    @pytest.mark.parametrize(
        "changes", [{"image_size": 40}, {"backbone": "ir-18"}, {"training": {"precision": "bf16-mixed"}}], ids=str
    )
    def test_nothing_is_told_by_what_has_another_pace(self, run, out, idle, changes):
        assert estimates(pipeline(out, seed=1, **changes).plan())["recogniser-provider-none"] is None

    def test_seconds_are_no_part_of_a_stage(self, run, out):
        folder = next((out / "cache").glob("verify-none-*/"))
        assert SECONDS not in json.loads((folder / LISTING).read_bytes())
        whole = (folder / SECONDS).read_text()
        (folder / SECONDS).write_text("cut sh")
        try:
            told = estimates(pipeline(out, seed=1).plan())
            assert told["verify-none"] == told["verify-pixelate"] > 0  # by that of the other defence
            assert {stage.cached for stage in pipeline(out).plan().stages} == {True}
        finally:
            (folder / SECONDS).write_text(whole)


@pytest.fixture
def runner(tmp_path):
    bars = provider.ProgressBars(tiny_runs.Console(quiet=True), lambda *_, **__: None)
    return StageRunner(provider.StageCache(tmp_path), bars, lambda *_, **__: None)


def job(stage, work=lambda: None):
    return Job(stage, "k", "work", lambda folder, report: work(), lambda folder: None)


def test_what_was_resumed_took_longer_than_its_last_try(tmp_path, runner):
    (tmp_path / "a-k.partial").mkdir(parents=True)
    for stage in ("a", "b"):
        runner.do(job(stage))
    assert taken(tmp_path).keys() == {"b"}


def test_a_stage_is_not_charged_for_what_it_asks_for(tmp_path, runner):
    runner.do(job("outer", lambda: runner.do(job("inner", lambda: time.sleep(0.3)))))
    seconds = taken(tmp_path)
    assert seconds["outer"] < 0.3 <= seconds["inner"]


class TestOnDisk:
    @pytest.mark.parametrize("stream", [False, True])
    def test_what_nobody_has_read_is_not_known(self, faces, tmp_path, idle, stream):
        plan = pipeline(tmp_path, **FOLDER, data_root=faces, stream=stream).plan()
        assert plan.notes[0] == "no run has read these faces yet: what the cache holds of them is not known"
        assert {stage.cached for stage in plan.stages if stage.name != "scan"} == {None}
        assert [stage.cached for stage in plan.stages if stage.name == "scan"] == [False] * stream
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    @pytest.mark.parametrize("stream", [False, True])
    def test_what_a_run_has_read_is_known_until_it_changes(self, tmp_path, request, stream):
        root = write_folder(tmp_path / "faces", people(40, 3))
        asked = {**FOLDER, "data_root": root, "stream": stream, "utility": False}
        pipeline(tmp_path / "out", **asked).run()
        request.getfixturevalue("idle")
        plan = pipeline(tmp_path / "out", **asked).plan()
        assert {stage.cached for stage in plan.stages} == {True}
        assert {stage.cached for stage in pipeline(tmp_path / "out", **asked, seed=1).plan().stages} <= {False, True}
        changed = root / "p001" / "p001_0002.jpg"
        changed.write_bytes(picture(77, 1))
        os.utime(changed, (1, 1))
        assert None in {stage.cached for stage in pipeline(tmp_path / "out", **asked).plan().stages}

    def test_no_data(self, tmp_path, idle):
        with pytest.raises(MissingError, match="absent does not exist"):
            pipeline(tmp_path, **FOLDER, data_root=tmp_path / "absent").plan()
        with pytest.raises(MissingError, match="set --data-root"):
            pipeline(tmp_path, **FOLDER).plan()


class TestMeasured:
    def test_the_pace_of_the_reports_gives_the_whole(self):
        def start(report):
            time.sleep(0.2)  # warming up
            for done in range(1000):
                report(done, 1000)
                time.sleep(0.01)

        assert 9 < time_to_end(start, 0.1, 60) < 90  # 10 on an idle machine

    def test_what_shows_no_pace_in_its_time_is_not_known(self):
        assert time_to_end(lambda report: [report(0, 10) for _ in range(10**9)], 0.1, 0.2) is None

    def test_what_ends_without_a_word_took_what_it_took(self):
        assert 0.2 <= time_to_end(lambda report: time.sleep(0.2), 0.01, 0.02) < 60

    @pytest.mark.slow
    def test_all_but_what_comes_after_the_fits_is_measured(self, tmp_path):
        told = measured(pipeline(tmp_path / "out"), tmp_path)
        unknown = {name.partition("-")[0] for name, seconds in told.items() if seconds is None}
        assert unknown == {"verify", "evaluate", "recover"}
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_what_is_left_is_told_and_nothing_is_left_behind(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan_module, "MEASURE_SECONDS", 0.5)
        plan = pipeline(tmp_path).plan(measure=True)
        left = [stage.name for stage in plan.stages if stage.seconds is None]
        assert len(left) > 3
        assert plan.notes == (f"how long {len(left)} of {len(plan.stages)} stages take is unknown "
                              "(not to be measured yet, or not in 0 s)",)  # fmt: skip
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_what_says_nothing_is_ended_with_its_process(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan_module, "MEASURE_SECONDS", 1.0)
        monkeypatch.setattr(plan_module, "_measure_apart", tiny_runs.silent)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        resource_tracker.ensure_running()  # which outlives it
        before, told = psutil.Process().children(), plan_module._measured(tmp_path, 3)
        assert told == [None, 1.5, None]
        assert psutil.Process().children() == before
        assert [path.name for path in tmp_path.iterdir()] == ["was there"]

    @pytest.mark.slow
    def test_what_goes_wrong_there_is_told_here(self, tmp_path):
        damaged = write_folder(tmp_path / "faces", people(40, 3))
        sorted(damaged.rglob("*.*"))[5].write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"cannot be decoded|cannot identify"):
            pipeline(tmp_path / "out", **FOLDER, data_root=damaged, stream=True).plan(measure=True)


def test_measuring_is_for_plans(bench):
    code, _, line = bench(*["run", "--defense", "none", "--attack", "linear", "--measure"])
    assert code == 2
    assert line == "bench: --measure times a plan: add --dry-run\n"
