"""The pages say all there is, and nothing that is not: metrics, commands, options, plug-ins, rungs, versions."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from attacks.base import GRANTS, Capability, Knowledge
from bench import plugins
from bench.cli import app
from bench.measures import KINDS
from bench.metrics.floors import FLOORS
from bench.results import PROTOCOL_VERSION
from bench.run.config import PRESETS, RunConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "examples" not in page.parts)
_HELP = {"--help", "-h"}


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@functools.cache
def hooks() -> Any:
    """The hooks of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without backticks."""
    below = text(page).split(f"## {heading}\n", 1)[1]
    rows = re.search(r"^\|.*\n\|[-|: ]+\n(?P<rows>(?:\|.*\n)+)", below, re.MULTILINE)
    assert rows is not None
    lines = rows["rows"].splitlines()
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


# -- metrics -----------------------------------------------------------------------------------------


def test_every_metric_has_a_section_with_what_it_is():
    for name in KINDS:
        section = re.search(rf"^### .*`{re.escape(name)}`.*\n(?P<body>(?:(?!^##).*\n)+)", text("metrics.md"), re.M)
        assert section is not None, name
        assert len(section["body"].split()) > 8, name


def test_every_floor_is_named():
    assert [row[0] for row in table("metrics.md", "Floors and ceiling")] == list(FLOORS)


# -- the command line --------------------------------------------------------------------------------


def commands(group: Any = None, path: tuple[str, ...] = ("bench",)) -> dict[str, Any]:
    """Every command by what one types."""
    group = typer.main.get_command(app) if group is None else group
    named: dict[str, Any] = {}
    for name, command in group.commands.items():
        whole = (*path, name)
        named |= commands(command, whole) if hasattr(command, "commands") else {" ".join(whole): command}
    return named


COMMANDS = commands()


def options(command: Any) -> set[str]:
    return {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    } - _HELP


def documented() -> dict[str, str]:
    parts = re.split(r"^## `(bench [a-z ]+)`\n", text("cli.md"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_documented_and_no_other():
    assert set(documented()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented_and_no_other(name):
    first = re.findall(r"^\| (`[^|]+`) \|", documented()[name], re.MULTILINE)
    named = {code.split()[0] for cell in first for code in re.findall(r"`([^`]+)`", cell) if code.startswith("-")}
    assert named == options(COMMANDS[name])


def typed() -> list[tuple[str, str]]:
    """(page, command line) of everything that the pages tell people to type."""
    lines = [
        (page.name, line)
        for page in PAGES
        for line in re.sub(r" \\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines()
    ]
    commands = [(page, re.match(r"^(?: {4,}|\$ )(bench [a-z].* .*)$", line)) for page, line in lines]
    return [(page, command[1].partition("  #")[0]) for page, command in commands if command]


@pytest.mark.parametrize(("page", "line"), typed())
def test_what_people_are_told_to_type_exists(page, line):
    words = shlex.split(line)
    name = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in COMMANDS), None)
    assert name is not None, f"{page}: no such command"
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert flags <= options(COMMANDS[name]) | _HELP, page
    for flag, registry in (("--defense", plugins.defenses()), ("--attack", plugins.attacks())):
        if flag in words:
            named = words[words.index(flag) + 1]
            shown = {"my-defense", "ridge", "tile-shuffle", "secret-tile-shuffle"}  # made on the pages
            assert all(name in registry or name in shown for name in named.split(",")), page


def test_what_is_made_from_the_code_is_up_to_date():
    assert "<!-- made from the code: run_flags" in text("cli.md")
    for page in PAGES:
        assert hooks().filled(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8"), (
            f"{page.name}: run python docs/hooks.py"
        )


def test_the_presets_are_those_there_are():
    assert [row[0] for row in table("cli.md", "Presets")] == list(PRESETS)


def test_the_config_file_is_one():
    import tomllib

    from bench.run.config import resolve

    block = re.search(r"```toml\n(.*?)```", text("cli.md"), re.DOTALL)
    assert block is not None
    config = resolve(tomllib.loads(block[1]), {})
    assert isinstance(config, RunConfig)
    assert config.training.epochs == 12
    plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)


# -- plug-ins and threat models ----------------------------------------------------------------------


def test_what_each_rung_grants():
    rows = {row[0]: [cell == "yes" for cell in row[1:][1:]] for row in table("threat-models.md", "Capabilities")}
    assert rows == {str(capability): [capability in GRANTS[rung] for rung in Knowledge] for capability in Capability}
    assert [row[0] for row in table("threat-models.md", "The ladder of knowledge")] == [str(rung) for rung in Knowledge]


@pytest.mark.parametrize(
    ("page", "registry"),
    [
        ("threat-models.md", plugins.attacks()),
        ("threat-models.md", plugins.defenses()),
        ("reference/attacks.md", plugins.attacks()),
        ("reference/defenses.md", plugins.defenses()),
    ],
)
def test_what_is_made_at_build_names_every_plugin(page, registry):
    built = hooks().on_page_markdown(text(page))
    for name in registry:
        assert re.search(rf"^(### {name}|\| `{name}`)( |$)", built, re.MULTILINE), name
        if page.startswith("reference"):
            section = built.split(f"### {name}\n")[1].partition("\n### ")[0]
            assert all(f"| `{option}` |" in section for option in registry.get(name).Options.model_fields)


# -- protocol ----------------------------------------------------------------------------------------


def test_the_protocol_page_is_of_this_version():
    assert f"**protocol version {PROTOCOL_VERSION}**" in text("protocol.md")


def test_the_shares_are_the_defaults():
    shares = RunConfig.model_fields["shares"].default.model_dump()
    assert {row[0]: float(row[2]) for row in table("protocol.md", "Who is where")} == shares


def test_the_honesty_rules_are_those_of_contributing():
    """Two texts, one list: both have the same number of rules, in the same order of subjects."""
    subjects = [
        "Nobody",
        "protocol",
        "floors|nearest",
        "every state",
        "did best|worst",
        "people",
        "failed",
        "Synthetic",
        "saying less",
        "judge",
        "departure",
    ]
    contributing = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for document in (contributing, text("protocol.md")):
        section = re.split(r"^## ", document.split("## Honesty rules\n", 1)[1], flags=re.MULTILINE)[0]
        rules = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
        for rule, subject in zip(rules, subjects, strict=True):
            assert re.search(subject, rule, re.IGNORECASE), rule


def test_the_two_commands_are_those_of_the_readme():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    section = text("index.md").split("## Two commands\n", 1)[1].split("\n## ", 1)[0]
    told = re.findall(r"^ {4}(\S.*)$", section, re.MULTILINE)
    assert len(told) == 2
    assert all(f"    {command}\n" in readme for command in told)
