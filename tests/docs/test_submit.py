"""The attack of docs/submit.md runs on an exported file, and what it recovers is scored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pixel_judge import write_pixel_judge
from tiny_runs import pipeline

import bench

PAGE = Path(__file__).parents[2] / "docs" / "submit.md"


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["pixelate", "fixed-subset+quantise"])
def test_the_example(tmp_path, monkeypatch, defense):
    monkeypatch.chdir(tmp_path)
    judge = write_pixel_judge(tmp_path / "judge.onnx")
    cell = pipeline(tmp_path / "runs", defense=defense, attack="linear", utility=False, evaluator=[judge])
    own = cell.run()
    bench.observe(cell.directory, "observed.npz")
    (block,) = re.findall(r"```python[^\n]*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, str(PAGE), "exec"), {})
    result = bench.score("mine.npz", cell.directory, name="ridge")
    assert result.attack.name == "submitted:ridge"
    assert result.recovery.ssim.value > own.recovery.floors["grey"].ssim.value
    assert result.attack.details["observed"] is not None
