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

_FLAG = "--privacy-baseline"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("privacy").addoption(
        _FLAG,
        metavar="FILE",
        help="baseline of `bench baseline`, which tests with the fixture privacy_gate hold their runs against",
    )


class PrivacyGate:
    """Runs cells and fails the test where one leaks more than its baseline.

    Args:
        baseline: the baseline file.
        out: folder for runs and their cache; runs of one session share what they train.
    """

    def __init__(self, baseline: Path, out: Path) -> None:
        self.baseline = baseline
        self.out = out

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
        from bench.gate.formats import cell_lines
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
        return report


@pytest.fixture(scope="session")
def privacy_gate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrivacyGate:
    """See :class:`PrivacyGate`; skips where no baseline was given."""
    baseline = request.config.getoption(_FLAG)
    if baseline is None:
        pytest.skip(f"no {_FLAG} FILE was given, so there is nothing to compare with")
    return PrivacyGate(Path(baseline), tmp_path_factory.mktemp("privacy-runs"))
