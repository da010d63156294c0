"""The plug-in of docs/recognisers.md works as it is printed, installed as its reader would."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from bench import plugins
from bench.nets.brought import open_recogniser, plugin_module

PAGE = Path(__file__).parents[2] / "docs" / "recognisers.md"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's package on the path, with the metadata that an installer writes."""
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    group = re.search(r'entry-points\."([\w.]+)"', entry)[1]
    name, target = re.search(r'^([\w-]+) = "([\w.:]+)"$', entry, re.MULTILINE).groups()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "net.py").write_text(code)
    metadata = tmp_path / "my_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.recognisers.cache_clear()
    yield name
    plugins.recognisers.cache_clear()
    for module in [module for module in sys.modules if module.partition(".")[0] == "my_package"]:
        del sys.modules[module]


def test_the_plug_in_of_the_page_is_a_recogniser_of_partialface(installed):
    brought = open_recogniser(Path(installed))
    sent = plugins.make_defense("partialface", {}, "cpu", 112).protect(torch.rand(2, 3, 112, 112), torch.Generator())
    assert brought(sent.representation).shape == (2, 128)
    assert plugin_module(Path(installed)) == "my_package.net"
