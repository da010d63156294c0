"""``bench report`` and ``bench leaderboard``: what they print, and one clear line for bad input."""

import json

import pytest
from run_folders import write_run


def test_report_prints_its_files(bench, tmp_path):
    folder = write_run(tmp_path / "run")
    code, out, err = bench("report", folder, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    files = json.loads(out)["files"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        file.rpartition("/")[2] for file in files
    )
    assert len(files) == 4


def test_leaderboard_writes_beside_the_runs(bench, tmp_path):
    write_run(tmp_path / "runs" / "a")
    code, out, _ = bench("leaderboard", tmp_path / "runs")
    assert code == 0
    assert out.split() == [str(tmp_path / "runs" / f"leaderboard.{kind}") for kind in ("html", "md", "csv")]
    assert bench("leaderboard", tmp_path / "runs")[0] == 0, "its own files are no runs"


@pytest.mark.parametrize("command", ["report", "leaderboard"])
def test_a_folder_without_runs_is_refused(bench, tmp_path, command):
    code, out, err = bench(command, tmp_path, "--out", tmp_path / "out")
    assert code == 5
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert f"{tmp_path} is not a run directory" in err
    assert not (tmp_path / "out").exists()


def test_faces_cannot_be_shown_and_left_out(bench, tmp_path):
    code, _, err = bench("report", tmp_path, "--out", tmp_path / "out", "--no-images", "--embed-faces")
    assert code == 2
    assert "contradict" in err
