"""The code of docs/python.md runs from the first block to the last."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("BENCH_")]:
        monkeypatch.delenv(name)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert set(names["figures"].columns) >= {"metric", "value", "low", "high", "n"}
    assert names["figures"].set_index("metric").loc["recovery.ssim", "value"] == names["result"].recovery.ssim.value
    assert "probes" in capsys.readouterr().out
