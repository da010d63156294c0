"""The run store: names, early refusal, and files that are whole."""

import json

import pandas as pd
import pytest

from bench.errors import UsageError
from bench.results import RunResult
from bench.run.config import resolve
from bench.run.store import RunStore, run_id


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
