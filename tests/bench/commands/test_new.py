"""``bench new``: what is written keeps to the contract, is found once it is installed, or is not written at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from bench import files, plugins

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(monkeypatch):
    """``installed(folder)``: as an editable installation of the package leaves it, for the time of a test."""

    def install(folder):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        [(group, entries)] = project["entry-points"].items()
        lines = [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(folder)
        plugins.defenses.cache_clear()
        plugins.attacks.cache_clear()

    yield install
    monkeypatch.undo()
    for name in ("my_own", "my_other"):
        sys.modules.pop(name, None)
    plugins.defenses.cache_clear()
    plugins.attacks.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spelled", "name", "option"),
    [("defense", "defence", "my-own", "cell"), ("attack", "Attack", "my-other", "neighbours")],
)
def test_what_is_written_passes_its_own_test_and_is_found(bench, installed, tmp_path, kind, spelled, name, option):
    code, out, _ = bench("new", spelled, name, "--json")
    folder = tmp_path / name
    assert code == 0
    assert {Path(file) for file in json.loads(out)["files"]} == {
        file.relative_to(tmp_path) for file in folder.rglob("*") if file.is_file()
    }
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert folder.stat().st_mode & 0o777 == 0o755
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    installed(folder)
    assert name in {entry["name"] for entry in json.loads(bench("list", f"{kind}s", "--json")[1])}
    assert option in {entry["name"] for entry in json.loads(bench("list", kind, name, "--json")[1])["options"]}
    code, _, err = bench("new", kind, name)
    assert (code, f"{name!r} exists already" in err) == (2, True)


def test_the_workflow_installs_from_where_the_package_is_had(bench, tmp_path):
    assert bench("new", "defense", "my-own")[0] == 0
    workflow = yaml.safe_load((tmp_path / "my-own/.github/workflows/test.yml").read_text(encoding="utf-8"))
    assert workflow["env"]["PPFR_BENCH"].startswith("ppfr-bench @ git+https://")
    steps = " ".join(step.get("run", "") for step in workflow["jobs"]["test"]["steps"])
    assert 'pip install "$PPFR_BENCH" -e' in steps
    assert "bench run --defense my-own" in steps


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("metric", "mine", "unknown kind of plug-in 'metric': available: attack, defense"),
        ("defense", "blur", "defence 'blur' exists already"),
        ("attack", "unet", "attack 'unet' exists already"),
        ("defense", "there", "there exists: choose another name"),
        ("defense", "json", "'json' is the name of another Python module"),
        ("defense", "tests", "'tests' is the name of another Python module"),
        ("defense", "defense-options", "'DefenseOptions' is the name of another class"),
        ("attack", "fabric", "'Fabric' is the name of another class"),
        *(
            ("defense", name, "cannot be a plug-in's name")
            for name in ("My", "1st", "a b", "a--b", "class", "../up", "é")
        ),
    ],
)
def test_a_name_that_will_not_do_is_one_line_and_nothing_is_written(bench, tmp_path, kind, name, message):
    (tmp_path / "there").mkdir()
    code, out, err = bench("new", kind, name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_failure_leaves_nothing(bench, tmp_path, monkeypatch):
    written = []

    def full(path, text):
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        files.write_text(path, text)

    monkeypatch.setattr("bench.commands.new.write_text", full)
    code, _, err = bench("new", "defense", "my-own")
    assert (code, "no space left on the disk" in err) == (3, True)
    assert not list(tmp_path.iterdir())
