"""``pytest --privacy-baseline FILE``: the gate as a fixture, for the tests of whoever writes a defence.

    def test_my_defence_still_protects(privacy_gate):
        privacy_gate(defense="my-defense", attack="unet", preset="quick")

Nothing heavy is imported before a test asks for it: pytest loads this wherever the suite is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.gate.verdict import GateReport

_FLAG, _RUNS = "--privacy-baseline", "--privacy-runs"
#: What was compared in this session, for its summary; workers of pytest-xdist send theirs to where it is printed.
_COMPARED = pytest.StashKey[list[str]]()
_SENT = "privacy_gate"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("privacy").addoption(
        _FLAG,
        metavar="FILE",
        help="baseline of `bench baseline`, which tests with the fixture privacy_gate hold their runs against",
    )
    parser.getgroup("privacy").addoption(
        _RUNS,
        metavar="DIR",
        help="folder for the runs of privacy_gate and their cache; by default in pytest's own cache, so that the next "
        "session trains only what has changed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start with nothing compared."""
    config.stash[_COMPARED] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, send home what was compared."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_SENT] = session.config.stash[_COMPARED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take in what a worker of pytest-xdist has sent."""
    node.config.stash[_COMPARED] += getattr(node, "workeroutput", {}).get(_SENT, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say of what passed what was compared: a gate that is silent might have looked at nothing."""
    if compared := config.stash[_COMPARED]:
        terminalreporter.section("privacy gate")
        for line in compared:
            terminalreporter.line(line)


class PrivacyGate:
    """Runs cells and fails the test where one leaks more than its baseline.

    Args:
        baseline: the baseline file.
        out: folder for runs and their cache; runs share what they train.

    Attributes:
        compared: a line for each cell that passed, and one for each of its figures.
    """

    def __init__(self, baseline: Path, out: Path, compared: list[str] | None = None) -> None:
        self.baseline = baseline
        self.out = out
        self.compared = [] if compared is None else compared

    def __call__(self, *, defense: str, attack: str, ignore_options: bool = False, **settings: Any) -> GateReport:
        """Run a cell and judge it.

        Args:
            defense: name of the defence.
            attack: name of the attack.
            ignore_options: as ``bench gate --ignore-options``.
            settings: any fields of :class:`bench.run.config.RunConfig`: ``preset="quick"``, ``seed=1``,
                ``defense_options={...}``. The environment's ``BENCH_*`` variables count as they do for ``bench run``.

        Returns:
            The report of a pass.
        """
        import os

        from rich.console import Console

        from bench.errors import BenchError
        from bench.run.config import resolve
        from bench.run.pipeline import Pipeline

        asked = {"out": self.out, **settings, "defense": defense, "attack": attack}
        try:
            pipeline = Pipeline(resolve(asked, os.environ), console=Console(stderr=True, quiet=True))
            pipeline.run()
        except BenchError as error:
            pytest.fail(f"the run failed: {error}", pytrace=False)
        return self.check(pipeline.directory, ignore_options=ignore_options)

    def check(self, run: Path | str, *, ignore_options: bool = False) -> GateReport:
        """Judge a run that is there already.

        Args:
            run: its directory.
            ignore_options: as ``bench gate --ignore-options``.

        Returns:
            The report of a pass; every other outcome fails the test with what was found.
        """
        from bench.errors import BenchError
        from bench.gate.baseline import read_baseline
        from bench.gate.formats import cell_lines, figure_line
        from bench.gate.gate import gate
        from bench.run.archive import load_runs

        try:
            runs = load_runs([Path(run)])
            report = gate(
                read_baseline(self.baseline), runs, name=str(self.baseline), ignore_options=ignore_options, whole=False
            )
        except BenchError as error:
            pytest.fail(str(error), pytrace=False)
        problems = [
            "\n  ".join([f"{cell.cell}: {cell.outcome}", *cell_lines(cell)])
            for cell in report.cells
            if cell.outcome != "pass"
        ]
        if problems or report.extra:
            pytest.fail("privacy gate\n" + "\n".join([*problems, *report.extra]), pytrace=False)
        for cell in report.cells:
            self.compared += [f"{cell.cell}: {cell.outcome}", *(f"  {figure_line(figure)}" for figure in cell.figures)]
        return report


@pytest.fixture(scope="session")
def privacy_gate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrivacyGate:
    """See :class:`PrivacyGate`; skips where no baseline was given."""
    config = request.config
    baseline = config.getoption(_FLAG)
    if baseline is None:
        pytest.skip(f"no {_FLAG} FILE was given, so there is nothing to compare with")
    if (asked := config.getoption(_RUNS)) is not None:
        out = Path(asked)
    elif (cache := getattr(config, "cache", None)) is not None:
        out = cache.mkdir("privacy-runs")
    else:  # -p no:cacheprovider
        out = tmp_path_factory.mktemp("privacy-runs")
    return PrivacyGate(Path(baseline), out, config.stash[_COMPARED])
