"""The run store: names, early refusal, and files that are whole."""

import json
import os
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import bench.run.store as store_module
from bench.errors import UsageError
from bench.results import RunResult
from bench.run.config import resolve
from bench.run.pipeline import Pipeline
from bench.run.store import RunStore, alone, run_id


def config(out, **changes):
    return resolve({"defense": "none", "attack": "unet", "out": out, **changes}, {})


def test_the_name_says_what_it_is_and_depends_on_what_is_computed(tmp_path):
    name = run_id(config(tmp_path))
    assert name.startswith("none-unet-whitebox-synthetic-seed0-")
    assert name == run_id(config(tmp_path / "elsewhere", resume=False))
    assert name != run_id(config(tmp_path, probes=3))


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        RunStore(config(tmp_path / "file"))


@contextmanager
def without_rights(folder):
    """Within, nobody in this process may write there: root, whom permissions do not stop, is somebody else."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("made_before", [False, True])
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_computed(made_before):
    """Also where the lock of this run can be taken."""
    with tempfile.TemporaryDirectory() as name:  # below tmp_path only its owner can look
        out = Path(name)
        out.chmod(0o755)
        (out / "cache").mkdir()
        if made_before:
            (out / "cache" / f"{run_id(config(out))}.lock").touch(0o666)
            (out / "cache" / f"{run_id(config(out))}.lock").chmod(0o666)
        before = sorted(out.rglob("*"))
        with without_rights(out / "cache"), pytest.raises(UsageError, match=r"cannot be written.*Permission"):
            Pipeline(config(out), console=Console(quiet=True)).run()
        assert sorted(out.rglob("*")) == before
        with alone(config(out), waiting=pytest.fail):
            pass


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    """Nothing ends before it began, and nothing was said before what was said earlier."""
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    hours = iter([0, 1, -5, -4, 2])

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return noon + timedelta(hours=next(hours))

    monkeypatch.setattr(store_module, "datetime", Clock)
    store = RunStore(config(tmp_path))
    for event in ("started", "stage"):
        store.log(event)
    store.write_manifest("success", "cpu", "32-true")
    store.log("success")
    manifest = json.loads((store.directory / "manifest.json").read_text())
    said = [json.loads(line)["time"] for line in (store.directory / "events.jsonl").read_text().splitlines()]
    assert [datetime.fromisoformat(time) - noon for time in said] == [timedelta(hours=hour) for hour in (1, 1, 2)]
    assert datetime.fromisoformat(manifest["updated"]) - datetime.fromisoformat(manifest["started"]) == timedelta(
        hours=1
    )


def test_an_old_result_does_not_stand_beside_a_new_attempt(tmp_path):
    store = RunStore(config(tmp_path))
    store.write_result(RunResult(run_id=store.run_id, status="success"))
    assert not (RunStore(config(tmp_path)).directory / "metrics.json").exists()


def test_manifest_lists_what_was_made_with_its_hash(tmp_path):
    store = RunStore(config(tmp_path))
    store.write_table("per_image", pd.DataFrame({"ssim": [0.5]}))
    store.log("stage", stage="data")
    store.write_manifest("success", "cpu", "32-true")
    manifest = json.loads((store.directory / "manifest.json").read_text())
    assert set(manifest["artefacts"]) == {"per_image.parquet"}
    assert manifest["config"]["defense"] == "none"
    assert pd.read_parquet(store.directory / "per_image.parquet")["ssim"].tolist() == [0.5]
    assert json.loads((store.directory / "events.jsonl").read_text())["stage"] == "data"


def test_checkpoints_survive_the_cache(tmp_path):
    store = RunStore(config(tmp_path / "runs"))
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"abc")
    store.keep_checkpoint(weights, "attack.safetensors")
    store.keep_checkpoint(weights, "attack.safetensors")
    weights.unlink()
    assert (store.directory / "checkpoints" / "attack.safetensors").read_bytes() == b"abc"
