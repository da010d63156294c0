"""Progress: which step of how many, how far, and how long to go, on the narrowest terminal."""

import io
import re

import pytest
import tiny_runs
from rich.console import Console

from bench.progress import ProgressBars


class Terminal:
    """A terminal, and all that was ever drawn on it."""

    def __init__(self, width):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=width, _environ={})
        self.logged = []
        self.bars = ProgressBars(self.console, lambda event, **fields: self.logged.append(fields))

    def lines(self):
        """What was drawn, without colours and movements of the cursor."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("width", [80, 140])
def test_the_step_the_total_and_the_time_left_are_seen(width):
    terminal = Terminal(width)
    terminal.bars.expect(2)
    for name in ("render faces", "train provider recogniser on partialface+quantise [x]"):
        with terminal.bars.task(name, step=True) as report:
            report(1, 1200, loss=0.25)
            report(600, 1200, loss=0.125)
            terminal.bars._progress.refresh()
    lines = terminal.lines()
    assert max(map(len, lines)) <= width
    last = [line for line in lines if "step 2 of 2: train" in line][-1]
    assert re.search(r" 600/1200 .*(\d:\d\d:\d\d|-:--:--) left", last)
    assert ("loss 0.125" in last) == (width > 80)
    assert any("step 1 of 2: render faces" in line for line in lines)
    assert terminal.logged[-1]["task"] == "train provider recogniser on partialface+quantise [x]"


def test_a_bar_goes_on_after_one_within_it():
    terminal = Terminal(80)
    with terminal.bars.task("outer") as report:
        with terminal.bars.task("inner"):
            terminal.bars._progress.refresh()
        assert terminal.bars._progress.live.is_started
        report(1, 7)
        terminal.bars._progress.refresh()
    assert not terminal.bars._progress.live.is_started
    assert any("outer" in line and "1/7" in line for line in terminal.lines())


def test_more_steps_than_expected_are_no_more_than_all():
    terminal = Terminal(80)
    terminal.bars.expect(1)
    for _ in range(2):
        with terminal.bars.task("work", step=True):
            terminal.bars._progress.refresh()
    assert any("step 2 of 2" in line for line in terminal.lines())


@pytest.mark.slow
def test_a_run_counts_its_steps_to_the_last(tmp_path, monkeypatch):
    """From nothing, and again with another attack where most is there."""
    expected, begun = [], []
    expect, task = ProgressBars.expect, ProgressBars.task

    def noted(self, description, *, step=False):
        begun.extend([description] * step)
        return task(self, description, step=step)

    monkeypatch.setattr(ProgressBars, "expect", lambda self, steps: (expected.append(steps), expect(self, steps)))
    monkeypatch.setattr(ProgressBars, "task", noted)
    with tiny_runs.registered():
        for attack in ("linear", "linear,linkage"):
            begun.clear()
            options = {"linkage": {"steps": 8, "teacher_steps": 8}} if "linkage" in attack else {}
            tiny_runs.pipeline(tmp_path, defense="pixelate", attack=attack, attack_options=options, probes=4).run()
            assert len(begun) == expected[-1]
    assert expected[0] > expected[1]
