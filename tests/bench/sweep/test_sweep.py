"""A sweep in this process: what is recorded, what is run again, and how it ends."""

import json
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from filelock import FileLock
from sweep_at_work import QUIET, buggy, calls, crowded, failing, full, grid, interrupted, light, sweep

from bench.errors import BenchError, DataError, UsageError, in_words
from bench.results import RunResult
from bench.sweep.cells import Cell, SweepState, expand
from bench.sweep.sweep import Sweep
from bench.sweep.workers import finished, run_pipeline

ALL = ["none 0", "none 1", "partialface 0", "partialface 1"]


def statuses(state):
    return [(cell.status, cell.attempts) for cell in state.cells]


def journal(state):
    return Path(state.directory) / "sweep.json"


def test_all_cells_run_and_are_not_run_again(tmp_path):
    state = sweep(tmp_path, light).run()
    assert statuses(state) == [("success", 1)] * 4
    assert calls(tmp_path) == ALL
    assert SweepState.model_validate_json(journal(state).read_text()) == state
    assert all(cell.directory == str(tmp_path / cell.run_id) for cell in state.cells)
    again = sweep(tmp_path, light, seeds="1,0", jobs=2).run()
    assert again.sweep == state.sweep
    assert statuses(again) == [("success", 1)] * 4
    assert calls(tmp_path) == ALL


def test_what_a_larger_sweep_or_a_single_run_did_counts(tmp_path):
    light(expand(grid(tmp_path))[0])  # as `bench run` would have left it
    sweep(tmp_path, light, seeds="0").run()
    sweep(tmp_path, light).run()
    assert calls(tmp_path) == ALL


def test_no_resume_runs_finished_cells_again_but_keeps_what_cells_share(tmp_path):
    sweep(tmp_path, light).run()
    seen = []

    def look(config):
        seen.append(config.resume)
        return light(config)

    state = sweep(tmp_path, look, flags={"resume": False}).run()
    assert statuses(state) == [("success", 2)] * 4
    assert seen == [True] * 4  # a cell that made a stage anew would take it away from another one


def test_a_result_of_another_protocol_is_not_finished(tmp_path):
    state = sweep(tmp_path, light).run()
    config = expand(grid(tmp_path))[0]
    assert finished(config) is not None
    old = RunResult(run_id=state.cells[0].run_id, status="success", protocol="0")
    (tmp_path / old.run_id / "metrics.json").write_text(old.to_json())
    assert finished(config) is None
    (tmp_path / old.run_id / "metrics.json").write_text("{")
    assert finished(config) is None


def test_a_failed_cell_is_recorded_and_tried_again_by_the_next_call(tmp_path):
    state = sweep(tmp_path, failing).run()
    assert statuses(state) == [("success", 1)] * 2 + [("failed", 1)] * 2  # it would fail again: no retry
    assert SweepState.model_validate_json(journal(state).read_text()).cells[2].error == "the loss is not finite"
    state = sweep(tmp_path, light).run()
    assert statuses(state) == [("success", 1)] * 2 + [("success", 2)] * 2
    assert all(cell.error is None for cell in state.cells)


def test_a_bug_is_one_line(tmp_path):
    state = sweep(tmp_path, buggy, seeds="0", defenses="none").run()
    assert state.cells[0].error == "ZeroDivisionError: of all things"


def test_full_memory_is_told_as_by_a_run(tmp_path):
    state = sweep(tmp_path, crowded, seeds="0", defenses="none").run()
    assert state.cells[0].error == in_words(torch.OutOfMemoryError("CUDA out of memory."))
    assert "--device cpu" in state.cells[0].error


def test_refused_cells_stay_in_the_document(tmp_path):
    state = sweep(tmp_path, light, attacks="unet-ensemble", knowledge="whitebox,blackbox", defenses="none").run()
    assert [cell.status for cell in state.cells] == ["success", "refused"] * 2
    assert all("does not grant" in cell.error and cell.directory is None for cell in state.cells[1::2])
    assert calls(tmp_path) == ["none 0", "none 1"]


def test_an_interruption_keeps_what_is_done_and_puts_the_rest_back(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, interrupted).run()
    state = sweep(tmp_path, light).plan()
    written = SweepState.model_validate_json(journal(state).read_text())
    for known in (state, written):
        assert [cell.status for cell in known.cells] == ["success", "success", "pending", "pending"]
    sweep(tmp_path, light).run()
    assert calls(tmp_path) == ALL


def test_two_calls_of_one_sweep_do_not_mix(tmp_path):
    first = sweep(tmp_path, light)
    state = first.run()
    with FileLock(f"{state.directory}/lock"), pytest.raises(BenchError, match="running already"):
        sweep(tmp_path, light).run()
    assert first.run() == state  # the lock was given back


def test_a_damaged_journal_is_named(tmp_path):
    state = sweep(tmp_path, light).run()
    journal(state).write_text("{}")
    with pytest.raises(DataError, match=r"sweep\.json is damaged.*delete it"):
        sweep(tmp_path, light).run()


def test_key_figures_stand_between_floor_and_ceiling(tmp_path):
    attacks = "unet,template,linkage"
    state = sweep(tmp_path, full, attacks=attacks, seeds="0", defenses="partialface").run()
    unet, template, linkage = state.cells

    def figures(cell):
        return {
            name: [measure and round(measure.value, 6) for measure in (figure.value, figure.floor, figure.ceiling)]
            for name, figure in cell.figures.items()
        }

    accuracy = [ANY, None, 0.97]
    assert figures(unet) == {"accuracy": accuracy, "ssim": [0.7, 0.4, 0.99], "type1_tar": [0.5, 0.1, 0.9]}
    assert figures(linkage) == {"accuracy": accuracy, "linkage": [0.8, None, 0.95]}
    assert [cell.unsaturated for cell in (unet, template, linkage)] == [False, True, False]
    assert unet.warnings == ["synthetic faces: for trying the suite"]
    # A call that takes it from the run store says the same.
    again = sweep(tmp_path, full, attacks=attacks, seeds="0", defenses="partialface").plan()
    assert [cell.figures for cell in again.cells] == [cell.figures for cell in state.cells]


def test_torchrun_is_refused(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        sweep(tmp_path, light)


def test_ray_gives_each_cell_its_own_device(tmp_path):
    with pytest.raises(UsageError, match="use --device cuda"):
        sweep(tmp_path, light, engine="ray", flags={"device": "cuda:1"})


def test_cells_of_one_recogniser_are_told_by_defence_options_and_seed(tmp_path):
    def group(**changes):
        return Cell(expand(grid(tmp_path, defenses="partialface", **changes))[0]).group

    assert group() == group(attacks="linear", knowledge="oracle")
    assert len({group(), group(seeds="1"), group(defense_options=["subset_size=9"])}) == 3


TINY = {
    "device": "cpu",
    "image_size": 32,
    "probes": 12,
    "bootstrap": 100,
    "dataset_options": {"identities": 40, "images_per_identity": 4},
    "training": {"epochs": 1, "warmup_epochs": 0, "views": 1, "precision": "32-true", "embedding_size": 32},
}


@pytest.mark.slow
def test_the_real_thing_trains_each_recogniser_once(tmp_path):
    unet = [f"unet.{option}" for option in ("widths=4,8", "stem_stride=2", "images=256", "batch_size=16")]
    request = grid(tmp_path, attacks="unet,linear", seeds="0", defenses="none", attack_options=unet, flags=TINY)
    state = Sweep(request, console=QUIET, runner=run_pipeline).run()
    assert [(cell.status, cell.error) for cell in state.cells] == [("success", None)] * 2
    assert all(set(cell.figures) == {"accuracy", "ssim"} for cell in state.cells)  # of such a judge nobody is told
    events = [(tmp_path / cell.run_id / "events.jsonl").read_text().splitlines() for cell in state.cells]
    trained = [json.loads(line)["stage"] for lines in events for line in lines if '"event": "stage"' in line]
    trained = [stage for stage in trained if stage.startswith("recogniser")]
    assert sorted(trained) == ["recogniser-evaluator-none", "recogniser-provider-none"]
