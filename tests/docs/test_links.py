"""Links and pictures of the pages lead somewhere, as files and as places within them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "examples" not in page.parts)
CONFIG = (DOCS / "mkdocs.yml").read_text(encoding="utf-8")

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_LINK = re.compile(r"(?<!`)!?\[(?P<text>(?:[^\[\]]|`[^`]*`)*)\]\((?P<target>[^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_ELSEWHERE = ("http://", "https://", "mailto:")


def prose(page: Path) -> str:
    """A page without its code."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return _INDENTED.sub("", text)


def anchor(heading: str) -> str:
    """What a heading is linked by: as Python-Markdown and GitHub agree on it."""
    words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def anchors(page: Path) -> list[str]:
    return [anchor(heading) for heading in _HEADING.findall(prose(page))]


def links(page: Path) -> list[str]:
    return [link["target"] for link in _LINK.finditer(prose(page)) if not link["target"].startswith(_ELSEWHERE)]


def problem(page: Path, target: str) -> str | None:
    """Why a link of ``page`` leads nowhere, or None."""
    path, _, place = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_file():
        return f"{target}: no such file"
    if place and place not in anchors(file):
        return f"{target}: no such heading"
    if DOCS in page.parents and DOCS not in file.parents:
        return f"{target}: outside docs/, so not a part of the site"
    return None


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# One, `two`\n\n[x](b.md) ![y](c.png) [z](#one-two) [w](#three) [v](https://d)\n\n    [code](e.md)\n"
    )
    assert links(page) == ["b.md", "c.png", "#one-two", "#three"]
    assert [problem(page, target) for target in links(page)] == [
        "b.md: no such file",
        "c.png: no such file",
        None,
        "#three: no such heading",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_and_pictures_exist(page):
    assert not list(filter(None, (problem(page, target) for target in links(page))))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_from_outside_exist(page):
    assert not list(filter(None, (problem(page, target) for target in links(page))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_heading_is_linked_by_one_name(page):
    names = anchors(page)
    assert len(names) == len(set(names))


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^ +- (\S+\.md)$", CONFIG, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_no_page_names_a_place_on_somebodys_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"file://\S*|(?<![\w.])/(?:home|root|tmp|work|Users|mnt)/\S*|\.\./shared\S*", text)


def test_pictures_have_words_and_are_small():
    for page in PAGES:
        for picture in re.finditer(r"!\[(?P<words>[^\]]*)\]", prose(page)):
            assert len(picture["words"].split()) >= 3, f"{page.name}: a picture without a description"
    for file in (DOCS / "images").iterdir():
        assert file.stat().st_size < 350_000, f"{file.name} is too large for a page"


def test_the_reference_names_modules_that_exist():
    named = {
        name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"defenses.base", "attacks.base", "bench.results", "bench.gate.pytest_plugin"} <= named
    for name in named:
        assert importlib.import_module(name).__doc__, f"{name} has nothing to show"
