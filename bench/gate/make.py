"""Makes a baseline out of runs: expected values, how much runs differ, and margins that another seed keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.errors import DataError, UsageError
from bench.gate.baseline import Baseline, Cell, Expected
from bench.gate.comparison import Variance, between_runs, moderated, pool, quantile, victims_variance
from bench.gate.figures import FIGURES
from bench.gate.scores import CellKey, RunScores, as_text, cell_key, run_scores
from bench.results import PROTOCOL_VERSION, Direction
from reports.runs import Run

#: Chance that a run of unchanged code and another seed does not pass.
_UNDECIDED = 1e-3


def make_baseline(runs: Sequence[Run], earlier: Baseline | None = None) -> Baseline:
    """The baseline of some runs; runs that differ by nothing but their seed make one cell.

    Args:
        runs: successful runs of one protocol.
        earlier: a baseline that is replaced: of cells and figures that are in both, its tolerances are kept.

    Raises:
        UsageError: a run failed or was given twice, or its protocol is not this version's.
        DataError: a run's files contradict each other.
    """
    cells: dict[str, list[tuple[Run, CellKey]]] = {}
    for run in runs:
        check_protocol(run, PROTOCOL_VERSION)
        if run.failed:
            raise UsageError(f"{run.directory} failed ({run.result.error}): a baseline needs runs that succeeded")
        key = cell_key(run)
        cells.setdefault(key.model_dump_json(), []).append((run, key))
    kept = {cell.key.model_dump_json(): cell.figures for cell in earlier.cells} if earlier else {}
    made = [
        _cell(members[0][1], [run for run, _ in members], kept.get(document, {})) for document, members in cells.items()
    ]
    if earlier is not None:
        return Baseline(cells=made, alpha=earlier.alpha, alpha_pass=earlier.alpha_pass)
    return Baseline(cells=made)


def check_protocol(run: Run, protocol: str) -> None:
    """Refuse a run of another protocol version.

    Raises:
        UsageError: its figures cannot be compared.
    """
    if run.manifest.protocol != protocol:
        raise UsageError(
            f"{run.directory} is of protocol version {run.manifest.protocol}, not {protocol}: their figures cannot be "
            "compared; run it, or make the baseline, with one version"
        )


def resolved_options(run: Run) -> dict[str, str]:
    """All options of defence and attack as they stood in a run, as text."""
    defense, attack = run.result.defense, run.result.attack
    options = {f"-o {k}": v for k, v in as_text(defense.options).items()} if defense else {}
    return options | ({f"-a {k}": v for k, v in as_text(attack.options).items()} if attack else {})


def _cell(key: CellKey, runs: Sequence[Run], kept: Mapping[str, Expected]) -> Cell:
    read = [run_scores(run) for run in runs]
    scores = [one for one, _, _ in read]
    _check_distinct(scores, key)
    directions = {name: direction for _, ways, _ in read for name, direction in ways.items()}
    names = [name for name in FIGURES if all(name in one.figures for one in scores)]
    if not any(FIGURES[name].role == "privacy" and name != "defense.entropy_bits" for name in names):
        raise DataError(f"{key.label}: no privacy figure was measured, so there is nothing to guard")
    scores = [one.model_copy(update={"figures": {name: one.figures[name] for name in names}}) for one in scores]
    figures = {name: _expected(name, scores, directions[name], len(names)) for name in names}
    for name, old in kept.items():
        if name in figures:
            update = {"absolute": old.absolute, "relative": old.relative}
            figures[name] = figures[name].model_copy(update=update)
    return Cell(key=key, resolved=resolved_options(runs[0]), figures=figures, runs=scores)


def _check_distinct(runs: Sequence[RunScores], key: CellKey) -> None:
    """A run given twice would make runs look more alike than they are."""
    seen: dict[tuple[object, ...], RunScores] = {}
    for run in runs:
        hashes = sorted(scores.sha256 for scores in run.figures.values() if scores.sha256)
        content = (run.seed, run.source, *hashes, *sorted((n, s.value) for n, s in run.figures.items()))
        if content in seen:
            raise UsageError(f"{key.label}: two runs of seed {run.seed} are one and the same; give it once")
        seen[content] = run


def _expected(name: str, runs: Sequence[RunScores], direction: Direction, tests: int) -> Expected:
    figure = FIGURES[name]
    seeds = len({(run.seed, run.source) for run in runs})
    by_seed = between_runs(name, runs, rate=figure.rate, same_seed=False)
    by_repeat = between_runs(name, runs, rate=figure.rate, same_seed=True)
    seed = moderated(by_seed, seeds, figure.seed_sd)
    repeat = moderated(by_repeat, len(runs) - seeds + 1, figure.repeat_sd)
    expected = Expected(
        value=sum(run.figures[name].value for run in runs) / len(runs),
        role=figure.role,
        higher_is_better_for=direction,
        rate=figure.rate,
        absolute=figure.tolerance,
        margin=0.0,
        seed_sd=_rounded(math.sqrt(seed.value)),
        seed_df=seed.df,
        repeat_sd=_rounded(math.sqrt(repeat.value)),
        repeat_df=repeat.df,
        limit=figure.limit,
    )
    margin = _margin(name, runs, seed, tests, alpha=Baseline.model_fields["alpha_pass"].default)
    return expected.model_copy(update={"margin": _rounded(max(expected.tolerance, margin))})


def _margin(name: str, runs: Sequence[RunScores], seed: Variance, tests: int, *, alpha: float) -> float:
    """The least margin with which a run of the same code and another seed passes almost surely, whatever its victims.

    With the standard error ``s`` of such a run's change, which is 0 on average, the upper bound of the change is below
    ``(t_(1-alpha) + t_(1-u)) s`` with probability ``1 - u``; ``u`` is the chance not to pass, shared among the figures.
    """
    alone = [victims_variance(name, [(run, 1.0)], rate=FIGURES[name].rate) for run in runs]
    known = [part for part in alone if part is not None]
    if not known:
        return 0.0
    more = 1 + 1 / len(runs)
    people = Variance(more * sum(part.value for part in known) / len(known), pool(known).df)
    total = pool([people, Variance(more * seed.value, seed.df)])
    return (quantile(1 - alpha, total.df) + quantile(1 - _UNDECIDED / tests, total.df)) * math.sqrt(total.value)


def _rounded(value: float) -> float:
    """Up, to two significant digits: nobody should read more into it."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.3g}")
