"""The code of docs/python.md, and of the notebook, runs from the first block to the last."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE, NOTEBOOK = DOCS / "python.md", DOCS / "tutorial.ipynb"


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, and no settings from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    for name in [name for name in os.environ if name.startswith("BENCH_")]:
        monkeypatch.delenv(name)


def run(blocks, page):
    names = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.mark.slow
def test_the_examples(alone, capsys):
    names = run(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL), PAGE)
    assert set(names["figures"].columns) >= {"metric", "value", "low", "high", "n"}
    assert names["figures"].set_index("metric").loc["recovery.ssim", "value"] == names["result"].recovery.ssim.value
    assert "probes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook(alone):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "the notebook is kept without its outputs"
    names = run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], NOTEBOOK)
    for result in names["results"].values():
        assert result.recovery.ssim.value > result.recovery.floors["mean_face"].ssim.value
    assert names["sheet"].std() > 0.1
