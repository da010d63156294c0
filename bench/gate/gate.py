"""Holds runs against a baseline: which run is of which cell, and what became of its figures."""

from __future__ import annotations

from collections.abc import Sequence

from bench.errors import UsageError
from bench.gate.baseline import Baseline, Cell, check_protocol, resolved_options
from bench.gate.comparison import change, references
from bench.gate.scores import FIGURES, CellKey, RunScores, cell_key, differing, run_scores
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, decide, exit_code, worst
from bench.results import NO_BETTER
from bench.run.archive import Run


def gate(
    baseline: Baseline, runs: Sequence[Run], *, name: str, ignore_options: bool = False, whole: bool = True
) -> GateReport:
    """Judge runs.

    Args:
        baseline: what is expected.
        runs: those to judge; several of one cell are judged one by one.
        name: of the baseline, for the report.
        ignore_options: hold a run against the cell of the same names, whatever the options of defence and attack: to
            judge a variant.
        whole: whether every cell of the baseline must have a run; else only those of ``runs`` count.

    Raises:
        UsageError: a run is of another protocol version, or of several cells if options are ignored.
        DataError: a run's files are damaged or contradict each other.
    """
    verdicts: list[CellVerdict] = []
    there: list[Cell] = []
    unmatched: list[tuple[Run, CellKey]] = []
    for run in runs:
        check_protocol(run, baseline.protocol)
        for attack in run.attacks:
            key = cell_key(run, attack)
            cell = _find(baseline.cells, run, key, ignore_options=ignore_options)
            if cell is None:
                unmatched.append((run, key))
            else:
                there.append(cell)
                verdicts.append(_verdict(run, attack, key, cell, baseline))
    if whole:
        verdicts += [_missing(cell, unmatched) for cell in baseline.cells if cell not in there]
    outcome = worst(verdict.outcome for verdict in verdicts)
    return GateReport(
        outcome=outcome,
        exit_code=exit_code(outcome),
        baseline=name,
        alpha=baseline.alpha,
        alpha_pass=baseline.alpha_pass,
        cells=verdicts,
        extra=[f"{key.label}: {run.directory} is of no cell of the baseline" for run, key in unmatched],
    )


def _find(cells: Sequence[Cell], run: Run, wanted: CellKey, *, ignore_options: bool) -> Cell | None:
    # A failed run did not get as far as to say who judges.
    keys = [cell.key.model_copy(update={"evaluator": None}) if run.failed else cell.key for cell in cells]
    exact = [cell for cell, key in zip(cells, keys, strict=True) if key.matches(wanted)]
    if exact or not ignore_options:
        return exact[0] if exact else None
    near = [cell for cell, key in zip(cells, keys, strict=True) if key.plain().matches(wanted.plain())]
    if len(near) > 1:
        raise UsageError(
            f"{run.directory} could be held against {len(near)} cells if options are ignored: "
            f"{'; '.join(cell.key.label for cell in near)}; use a baseline with one of them"
        )
    return near[0] if near else None


def _missing(cell: Cell, unmatched: Sequence[tuple[Run, CellKey]]) -> CellVerdict:
    notes = ["no run of this cell was given"]
    for run, key in unmatched:
        if (key.defense, key.attack) == (cell.key.defense, cell.key.attack):
            notes.append(f"{run.directory} differs in: {', '.join(cell.key.differences(key))}")
    return CellVerdict(cell=cell.key.label, run=None, outcome="missing", notes=notes)


def _verdict(run: Run, attack: str, key: CellKey, cell: Cell, baseline: Baseline) -> CellVerdict:
    about = {"cell": cell.key.label, "run": run.manifest.run_id, "directory": str(run.directory)}
    if (part := run.attacks[attack]) is None:
        notes = [f"the run failed: {run.result.failed.get(attack) or run.result.error or run.result.status}"]
        return CellVerdict(**about, outcome="failed", notes=notes)
    scores, reasons = run_scores(run, attack)
    compared, paired = references(scores, cell.runs)
    changes = {
        name: change(name, scores, compared, expected.between(paired=paired), rate=expected.rate)
        for name, expected in cell.figures.items()
        if name in scores.figures
    }
    expectations = {name: expected.of(paired=paired) for name, expected in cell.figures.items()}
    figures = decide(changes, expectations, alpha=baseline.alpha, alpha_pass=baseline.alpha_pass)
    for name, expected in expectations.items():
        if name not in changes:
            note = f"not measured: {reasons.get(name) or 'the run does not have this figure'}"
            lacking = FigureVerdict.of(name, expected, expected.value, None, outcome="inconclusive", note=note)
            figures.append(lacking)
    outcome, notes = worst(figure.outcome for figure in figures), _notes(run, attack, key, cell, scores, figures)
    if part.attack.above_floor is False:
        outcome = worst((outcome, "inconclusive"))  # nothing was tried that could have found a change
    return CellVerdict(**about, outcome=outcome, figures=figures, notes=notes)


def _notes(
    run: Run, attack: str, key: CellKey, cell: Cell, scores: RunScores, figures: Sequence[FigureVerdict]
) -> list[str]:
    notes = []
    broken = [figure.figure for figure in figures if figure.outcome == "broken attack"]
    better = [figure.figure for figure in figures if figure.improved and figure.role != "canary"]
    if broken:
        notes.append(
            f"broken attack: it gets less out of unprotected faces than it used to ({', '.join(broken)}), so the other "
            "figures of this run say nothing about the defence"
        )
    elif better:
        notes.append(f"better than the baseline: {', '.join(better)}; if that is meant to last, make the baseline anew")
    if unknown := sorted(key.settings.keys() ^ cell.key.settings.keys()):
        notes.append(f"settings that only one of run and baseline knows, not compared: {', '.join(unknown)}")
    changed = differing(cell.resolved, resolved_options(run, attack))
    if changed:
        told = ", ".join(f"{name} {before or 'unset'} -> {now or 'unset'}" for name, before, now in changed)
        notes.append(f"options are not those of the baseline: {told}")
    if new := [name for name in FIGURES if name in scores.figures and name not in cell.figures]:
        notes.append(f"not in the baseline, hence not judged: {', '.join(new)}")
    if blind := [figure.figure for figure in figures if figure.blind]:
        measured = (
            figure for figure in figures if figure.role == "privacy" and figure.figure != "defense.entropy_bits"
        )
        every = ", and no other figure of privacy is there" if all(figure.blind for figure in measured) else ""
        notes.append(
            f"blind: a pass says nothing of {', '.join(blind)}, for with these victims the loss of all that is left "
            f"would be found in less than 90 %{every}"
        )
    if not any(expected.role == "utility" for expected in cell.figures.values()):
        notes.append("recognition is not judged: the baseline holds no figure of it")
    notes += [
        warning
        for warning in run.result.warnings
        if any(word in warning for word in ("unsaturated", "broken", NO_BETTER))
        and (len(run.attacks) == 1 or warning.startswith(f"{attack}: "))
    ]
    if run.altered:
        notes.append(f"altered since they were written: {', '.join(run.altered)}")
    return notes
