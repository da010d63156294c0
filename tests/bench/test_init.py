"""The front door in Python: lazy, and the same as the command line."""

import subprocess
import sys

import pytest

import bench
from bench.errors import MissingError, UsageError


@pytest.mark.parametrize("first", ["import bench", "import bench.run.config", "from bench.run import pipeline"])
def test_run_can_be_called_whatever_was_imported_before(first):
    code = f"{first}\nimport bench\nfrom bench.errors import UsageError\n"
    code += "try: bench.run('none', 'unet', probes=0)\nexcept UsageError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("configuration: probes"), done.stderr


def test_the_import_is_light():
    code = "import sys, bench\nassert not {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\nbench.run"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugins_are_made_as_on_the_command_line():
    assert bench.attack("unet", preset="quick", images="70").options.images == 70
    assert bench.defense("partialface", image_size=32, subset_size=9).options.subset_size == 9
    with pytest.raises(UsageError, match="did you mean 'unet'"):
        bench.attack("unnet")
    with pytest.raises(UsageError, match="unknown key 'colour'"):
        bench.defense("blur", colour=1)


def test_the_settings_are_those_of_the_command_line(monkeypatch, tmp_path):
    seen = []

    def look(self):
        seen.append(self.config)
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.run.pipeline.Pipeline.run", look)
    monkeypatch.setenv("BENCH_QUERIES", "3")
    (tmp_path / "run.toml").write_text('attack = "unet"\nprobes = 7\n')
    with pytest.raises(KeyboardInterrupt):
        bench.run("blur", config=tmp_path / "run.toml", preset="quick", training={"epochs": 2}, device="cpu")
    (config,) = seen
    assert (config.defense, config.attack, config.probes, config.queries) == ("blur", "unet", 7, 3)
    assert (config.image_size, config.training.epochs, config.training.head) == (64, 2, "cosface")


def test_what_is_not_there(tmp_path):
    with pytest.raises(MissingError, match=r"manifest\.json"):
        bench.load(tmp_path)
    with pytest.raises(AttributeError, match="'walk'"):
        _ = bench.walk
