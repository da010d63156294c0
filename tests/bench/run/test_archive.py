"""Run directories are read as they are, or refused with the name of the file that is wrong."""

import json

import numpy as np
import pandas as pd
import pytest
from run_folders import write_run

from bench.errors import MissingError
from bench.run.archive import find_runs, load_run, load_runs


def test_a_run_with_everything(tmp_path):
    run = load_run(write_run(tmp_path / "r", strength=True))
    assert not run.failed
    assert run.synthetic
    assert run.altered == ()
    assert run.scores is not None
    assert len(run.scores) == 100
    assert run.per_image is not None
    assert run.linkage is None
    assert run.losses[0].points == ((10.0, 3.0), (20.0, 1.5), (30.0, 1.0))
    assert run.samples is not None
    assert run.samples.victims[0].roles == ("first", "worst")


def test_folders_of_runs_are_looked_into_once(tmp_path):
    one, two = write_run(tmp_path / "runs" / "a"), write_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "cache").mkdir()
    assert find_runs([tmp_path / "runs"]) == [one, two]
    assert find_runs([two, tmp_path / "runs"]) == [two, one]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_run_here(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=f"{name} is not a run directory") as caught:
        load_runs([tmp_path / name])
    assert caught.value.exit_code == 5


def _asking(**config):
    """A manifest of a run that was asked for so."""
    return json.dumps({"protocol": "2", "run_id": "r", "status": "success", "config": config})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json is not a file of this schema"),
        ("metrics.json", '{"schema": "1", "surprise": 2}', "metrics.json is not a file of this schema"),
        ("manifest.json", "[]", "manifest.json is not a file of this schema"),
        ("manifest.json", 100_000 * "[", "manifest.json is not a file of this schema"),
        ("manifest.json", _asking(attack_options=["a"]), r"manifest.json .*config: .*attack_options cannot be \['a'\]"),
        ("manifest.json", _asking(seed="first"), "manifest.json .*seed cannot be 'first'"),
        ("per_image.parquet", "x", "per_image.parquet is not a readable Parquet file"),
        ("events.jsonl", "no json\n", "events.jsonl is damaged: line 1"),
        ("events.jsonl", "{}\n\udc80\n", "events.jsonl is damaged: line 2"),
        ("events.jsonl", 100_000 * "[" + "\n", "events.jsonl is damaged: line 1"),
        ("samples/samples.json", "{}", "samples.json is not an index of samples"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    folder = write_run(tmp_path / "r")
    (folder / file).write_text(content, errors="surrogateescape")
    with pytest.raises(MissingError, match=message):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("per_image", lambda table: table.drop(columns="identity"), "lacks the columns identity"),
        ("per_image", lambda table: table.iloc[:0], "it has no rows"),
        ("per_image", lambda table: table.assign(identity=None), "rows without a name"),
        ("per_image", lambda table: table.assign(ssim="0.5"), "ssim does not hold numbers"),
        ("per_image", lambda table: table.assign(ssim=-np.inf), "ssim holds values that are no figures"),
        ("per_image", lambda table: table.assign(image=np.nan), "image holds values that are no figures"),
        ("scores", lambda table: table.assign(protected=pd.Timestamp(0)), "protected does not hold numbers"),
        ("scores", lambda table: table.assign(same=False), "pairs of one person, and of two"),
        ("scores", lambda table: table.assign(same=2), "pairs of one person, and of two"),
    ],
)
def test_tables_that_no_run_writes_are_refused(tmp_path, name, change, message):
    folder = write_run(tmp_path / "r")
    file = folder / f"{name}.parquet"
    change(pd.read_parquet(file)).to_parquet(file)
    with pytest.raises(MissingError, match=rf"{name}\.parquet .*{message}"):
        load_run(folder)


def test_a_figure_that_nothing_was_measured_of_is_missing(tmp_path):
    folder = write_run(tmp_path / "r")
    file = folder / "per_image.parquet"
    pd.read_parquet(file).assign(lpips=None).to_parquet(file)
    table = load_run(folder).per_image
    assert table is not None
    assert table["lpips"].dtype == float
    assert table["lpips"].isna().all()


def test_a_lost_result_is_named(tmp_path):
    folder = write_run(tmp_path / "r")
    (folder / "metrics.json").unlink()
    with pytest.raises(MissingError, match=r"metrics\.json cannot be read"):
        load_run(folder)


def test_a_run_that_was_killed_counts_as_failed(tmp_path):
    folder = write_run(tmp_path / "r")
    (folder / "metrics.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "started", "artefacts": {}}))
    run = load_run(folder)
    assert run.failed
    assert "never finished" in (run.result.error or "")


def test_what_was_changed_afterwards_is_noticed(tmp_path):
    folder = write_run(tmp_path / "r")
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace("unet", "net"))
    (folder / "scores.parquet").unlink()
    assert load_run(folder).altered == ("metrics.json", "scores.parquet")


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "gone.png"])
def test_an_index_cannot_reach_outside_its_folder(tmp_path, name):
    folder = write_run(tmp_path / "r")
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    index = folder / "samples" / "samples.json"
    document = json.loads(index.read_text())
    document["victims"][0]["files"]["original"] = name
    index.write_text(json.dumps(document))
    with pytest.raises(MissingError, match="no file of this folder"):
        load_run(folder)
