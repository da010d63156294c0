"""The table of ``bench speed``: what it says of each row, and that one row's failure is its own."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import UsageError
from bench.run import benchmarks
from bench.run.benchmarks import ROWS, chosen, measure_rows, race

CPU = torch.device("cpu")


def test_ways_are_timed_in_turns():
    order = []

    def way(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    taken = race({"fast": way("fast", 0.001), "slow": way("slow", 0.01)}, CPU, 0.05)
    assert order[: len(order) // 2 * 2] == ["fast", "slow"] * (len(order) // 2)
    assert len(order) >= 4
    assert taken["fast"].wall >= 0.001
    assert taken["slow"].wall >= 0.01
    assert taken["slow"].processor < taken["slow"].wall  # asleep


def test_rows_are_chosen_by_name_and_beginning():
    assert chosen(None) == list(ROWS)
    assert chosen(["train-ir-18", "copy"]) == ["copy", "train-ir-18-3", "train-ir-18-27"]
    with pytest.raises(UsageError, match="decode"):
        chosen(["decod"])


def test_a_row_that_breaks_says_why_and_the_others_go_on(monkeypatch):
    def broken(machine):
        raise RuntimeError("no\nroom")

    def absent(machine):
        raise benchmarks._Skipped("not installed")

    def whole(machine):
        return machine.compare(lambda: time.sleep(0.001), 8, lambda: time.sleep(0.004), 4)

    rows = {"a": ("breaks", None, broken), "b": ("is skipped", None, absent), "c": ("works", "a loop", whole)}
    monkeypatch.setattr(benchmarks, "ROWS", rows)
    seen = []
    table = measure_rows("cpu", seconds=0.02, report=lambda done, total: seen.append((done, total)))
    first, second, third = table.rows
    assert (first.status, first.reason) == ("failed", "RuntimeError: no room")
    assert (second.status, second.reason) == ("skipped", "not installed")
    assert third.status == "ok"
    # Eight in 1 ms or so against four in 4 ms or so: eight times as fast, or less where waking up takes long.
    assert third.ratio == pytest.approx(third.images_per_second / third.plain_images_per_second)
    assert third.images_per_second == pytest.approx(8e3 / third.milliseconds)
    assert 0 < third.images_per_second <= 8000
    assert third.plain_images_per_second <= 1000
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("free", "maps", "faces"), [(80e9, 192, 2048), (50e9, 192, 1024), (50e9, 27, 8192), (9e9, 27, 1024), (1e9, 27, 256)]
)
def test_a_gpu_gets_as_many_faces_as_fit(free, maps, faces, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    machine = benchmarks._Machine(SimpleNamespace(device=torch.device("cuda")), 1.0)
    assert benchmarks._faces_at_once(machine, maps * 112 * 112 * 4) == faces


def test_the_command_prints_writes_and_says_what_broke(tmp_path, monkeypatch):
    file = tmp_path / "speed.json"
    asked = ["speed", "--device", "cpu", "--seconds", "0.01", "--only", "protect-27-one"]
    result = CliRunner().invoke(app, [*asked, "--out", str(file), "--json"])
    assert result.exit_code == 0, result.output
    table = json.loads(file.read_text())
    assert table == json.loads(result.stdout)
    [row] = table["rows"]
    assert row["batch"] == 1
    assert row["gigabytes_per_second"] * row["milliseconds"] * 1e6 == pytest.approx(27 * 112 * 112 * 4)

    def broken(machine):
        raise ValueError("odd")

    monkeypatch.setattr(benchmarks, "ROWS", {"a": ("breaks", None, broken)})
    result = CliRunner().invoke(app, ["speed", "--device", "cpu"])
    assert result.exit_code == 3
    assert "ValueError: odd" in result.stdout
