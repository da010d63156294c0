"""The examples of CI install what a reader can have, and run commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version

import bench

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: From a repository, until a package index has it.
SOURCE = f"ppfr-bench @ git+https://git.example.org/ppfr-bench@v{bench.__version__}"


def github():
    workflow = yaml.safe_load((ROOT / "docs/ci/github-actions.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    return workflow["env"], [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def gitlab():
    [job] = yaml.safe_load((ROOT / "docs/ci/gitlab-ci.yml").read_text(encoding="utf-8")).values()
    return job["variables"], [line for step in job["script"] for line in step.splitlines()]


@pytest.mark.parametrize("example", [github, gitlab])
def test_an_example_installs_this_version_from_a_repository(example):
    variables, lines = example()
    assert variables["PPFR_BENCH"] == SOURCE
    installed = [line for line in lines if "pip install" in line and "torch" not in line]
    assert installed == ['pip install "$PPFR_BENCH" -e .']


@pytest.mark.parametrize(
    "file", ["docs/ci/github-actions.yml", "docs/ci/gitlab-ci.yml", "bench/commands/plugin/test.yml.j2"]
)
def test_a_comment_says_what_to_put_in_place_of_the_address(file):
    """Nobody has the placeholder's package: the lines above it name what to replace, and three forms that pip takes."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("{{ version }}", bench.__version__)
    [(comment, source)] = re.findall(r"((?:^ *#.*\n)+) *PPFR_BENCH: (.+)", text, flags=re.MULTILINE)
    said = " ".join(line.strip(" #") for line in comment.splitlines())
    asked = Requirement(source)
    address = urlsplit(str(asked.url))
    assert f"Replace {address.netloc}{address.path.partition('@')[0]}:" in said
    [wheel] = re.findall(r"\./(\S+\.whl)", said)
    assert parse_wheel_filename(wheel)[:2] == (asked.name, Version(bench.__version__))
    assert said.endswith(f"package index: {asked.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_installs_from_an_index_that_does_not_have_it(page):
    assert not re.findall(r"pip install[^\n]*(?<![\w/@])ppfr-bench(?! @)", page.read_text(encoding="utf-8"))
