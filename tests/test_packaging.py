"""What a person installs: the wheel, its metadata, and the commands that the documents promise."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email.message import Message
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import bench

ROOT = Path(__file__).parents[1]
PACKAGES = ("bench", "attacks", "defenses", "reports")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def sources() -> list[Path]:
    """All Python files of the packages, relative to the root."""
    return sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by the declared backend from a copy, so that the checkout stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests").mkdir()
    (tree / "tests" / "__init__.py").write_text("")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    (tree / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning:" not in done.stderr
    [path] = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"ppfr_bench-{bench.__version__}.dist-info/{name}").decode()


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == {path.as_posix() for path in sources()}
    assert {name for name in names if name.endswith("py.typed")} == {f"{package}/py.typed" for package in PACKAGES}
    assert {name.split("/")[0] for name in names} == set(PACKAGES)


def test_wheel_holds_the_data_files_of_the_packages(wheel: zipfile.ZipFile) -> None:
    kept = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert kept <= set(wheel.namelist()), "add the suffix to [tool.setuptools.package-data]"


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata: Message = email.message_from_string(dist_info(wheel, "METADATA"))
    assert metadata["Name"] == "ppfr-bench"
    assert metadata["Version"] == bench.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")
    scripts = ConfigParser()
    scripts.read_string(dist_info(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"bench": "bench.cli:main", "ppfr-bench": "bench.cli:main"}


def test_wheel_works_where_it_is_unpacked(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Plug-ins are found by their files there too, and finding them imports no torch."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import bench, attacks, defenses, reports\n"
        "from bench.plugins import attacks as list_attacks, defenses as list_defenses\n"
        "for package in (bench, attacks, defenses, reports): assert package.__file__.startswith(sys.argv[1]), package\n"
        "assert 'torch' not in sys.modules\n"
        "print(*sorted(list_defenses()), '/', *sorted(list_attacks()))\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found_defenses, found_attacks = (part.split() for part in done.stdout.split("/"))
    for package, found in (("defenses", found_defenses), ("attacks", found_attacks)):
        support = __import__(package).SUPPORT_MODULES | {"__init__"}
        files = {path.stem for path in (ROOT / package).glob("*.py")} - support
        assert {name.replace("-", "_") for name in found} >= files


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def third_party(paths: list[Path]) -> dict[str, list[str]]:
    """Distributions (or, where unknown, top-level names) that the files import -> who imports them."""
    owners = importlib.metadata.packages_distributions()
    found: dict[str, list[str]] = {}
    for path in paths:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in PACKAGES:
                    continue
                sharing = set(owners.get(top, [top]))
                if len(sharing) > 1:  # as google is
                    sharing = {owner for owner in sharing if _holds(owner, name)} or sharing
                for owner in sharing:
                    found.setdefault(canonicalize_name(owner), []).append(str(path))
    return found


def _holds(distribution: str, module: str) -> bool:
    files = importlib.metadata.files(distribution) or []
    return any(file.as_posix().startswith(module.replace(".", "/")) for file in files)


def test_every_import_is_declared() -> None:
    optional = [requirement for extra in EXTRAS.values() for requirement in extra]
    optional.append("triton")  # of the version that torch's builds for CUDA bring along
    runtime, everything = declared(PROJECT["dependencies"]), declared([*PROJECT["dependencies"], *optional])
    undeclared = {name: who for name, who in third_party(sources()).items() if name not in everything}
    assert undeclared == {}
    # An optional package may be imported inside a function of the harness; one that only tests need may not.
    optional_for_users = declared([r for name in ("ray", "speed", "tensorboard", "timm", "view") for r in EXTRAS[name]])
    for_tests = (declared(EXTRAS["test"]) | declared(EXTRAS["lint"])) - optional_for_users
    # The plug-in of pytest is loaded by pytest, and by nothing else.
    imported = third_party([path for path in sources() if path != Path("bench/gate/pytest_plugin.py")])
    test_only = {name: who for name, who in imported.items() if name in for_tests - runtime}
    assert test_only == {}


def test_every_import_of_the_tests_is_declared() -> None:
    tests = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
    known = declared([*PROJECT["dependencies"], *EXTRAS["test"]])
    local = {path.stem.replace("_", "-") for path in tests} | {path.stem for path in tests} | {"translation"}
    undeclared = {name: who for name, who in third_party(tests).items() if name not in known | local}
    assert undeclared == {}


def test_every_dependency_has_a_lower_bound() -> None:
    requirements = [Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS["test"]]]
    unbounded = [r.name for r in requirements if [s.operator for s in r.specifier] != [">="]]
    assert unbounded == []


def test_pins_of_the_hooks_are_those_of_the_lint_extra() -> None:
    pins = {r for r in EXTRAS["lint"] if "==" in r}
    assert {pin.split("==")[0] for pin in pins} >= {"ruff", "mypy"}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [ruff] = [pin for pin in pins if pin.startswith("ruff==")]
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {ruff}


def test_readme_and_ci_give_one_and_the_same_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [command] = re.findall(r'^test_command="(.+)"$', ci, flags=re.MULTILINE)
    assert "pip install" in command
    assert "pytest" in command
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ci_script_is_valid_bash() -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this system")
    done = subprocess.run([bash, "-n", str(ROOT / ".ci" / "run")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_tox_names_every_environment() -> None:
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    listed = set(tox["tox"]["env_list"].replace(",", " ").split())
    assert listed == {"py311", "py312", "py313", "lint", "type", "smoke", "browser", "docs", "perf", "lowest"}
    supported = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert {f"py{version.replace('.', '')}" for version in supported} <= listed


#: (name, words) of every instruction of the Dockerfile, each in one line.
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_image_is_made_of_what_a_wheel_is_made_of() -> None:
    copied = [words.split()[:-1] for name, words in INSTRUCTIONS if name == "COPY" and "--from" not in words]
    sources = {source for line in copied for source in line}
    assert sources == {*PACKAGES, "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored.index("*") < min(ignored.index(f"!{source}") for source in sources)
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_the_image_runs_bench_as_nobody_special_on_a_python_that_is_supported() -> None:
    arguments = dict(words.split("=") for name, words in INSTRUCTIONS if name == "ARG")
    assert arguments["PYTHON"] in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {arguments['PYTHON']}" in PROJECT["classifiers"]
    assert arguments["TORCH"] == "cpu"
    index = urlsplit(arguments["TORCH_INDEX"].replace("${TORCH}", arguments["TORCH"]))
    assert (index.scheme, index.netloc) == ("https", "download.pytorch.org")
    assert all("python:${PYTHON}-slim" in words for name, words in INSTRUCTIONS if name == "FROM")
    last = dict(INSTRUCTIONS)
    assert last["USER"] not in ("root", "0")
    assert json.loads(last["ENTRYPOINT"]) == ["bench"]


#: Keys of the Citation File Format 1.2.0 that a file of ours may need.
CITATION_KEYS = {
    *("cff-version", "message", "title", "authors", "abstract", "type", "version", "license", "keywords"),
    *("date-released", "repository-code", "url", "doi", "identifiers", "preferred-citation", "references", "commit"),
}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() <= CITATION_KEYS
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == bench.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["authors"]
    assert all("name" in author or "family-names" in author for author in citation["authors"])


def test_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert len(headings) == len(set(headings))
    if re.fullmatch(r"[\d.]+", bench.__version__) and len(headings) > 1:
        assert bench.__version__ in headings
