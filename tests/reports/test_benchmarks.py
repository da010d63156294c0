"""Speed out of pytest-benchmark's files."""

import json

import pytest
from run_folders import write_run

from bench.errors import MissingError
from reports.benchmarks import benchmark_table
from reports.report import write_report

STORED = {
    "machine_info": {"node": "<b>box</b>"},
    "benchmarks": [
        {
            "name": "test_protect[64]",
            "stats": {"median": 0.0125, "q1": 0.012, "q3": 0.013, "rounds": 7, "ops": 80.0},
            "extra_info": {"images_per_second": 1234.5678, "note": "a|b"},
        }
    ],
}


@pytest.fixture
def stored(tmp_path):
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(STORED))
    return file


def test_seconds_become_milliseconds_and_notes_are_kept(stored):
    (row,) = benchmark_table([stored]).rows
    name, median, rounds, noted, machine = row.entries.values()
    assert (name.text, median.text, median.interval) == ("test_protect[64]", "12.5", "[12, 13]")
    assert median.number == pytest.approx(12.5)
    assert rounds.text == "7"
    assert noted.text == "images_per_second: 1,235; note: a|b"
    assert machine.text == "<b>box</b>"


def test_without_files_there_is_no_table():
    assert benchmark_table([]) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"benchmarks": [{"name": "x"}]}'])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(MissingError, match=r"x\.json is not what pytest --benchmark-json writes"):
        benchmark_table([file])
    with pytest.raises(MissingError, match="cannot be read"):
        benchmark_table([tmp_path / "absent.json"])


def test_a_report_shows_them_and_names_stay_inert(stored, tmp_path):
    write_report([write_run(tmp_path / "run")], tmp_path / "out", benchmarks=[stored])
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "&lt;b&gt;box" in text
        assert "<b>box" not in text
    assert "12.5" in (tmp_path / "out" / "report.tex").read_text()
