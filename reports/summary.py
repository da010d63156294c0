"""What a report says of a setting: its summary, recovery between floors and ceilings, and all of it in short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.measures import KINDS, MISSING, interval, leak, shown
from bench.results import AttackResult, Measure, Quality
from reports.cells import Cell, Setting, Worst, floors, lowest_accuracy, worst_case
from reports.published import Figure, matching
from reports.table import Column, Entry, Row, Table, column, measured

#: Figures of the summary that an attack earned, in their order.
LEAKS = tuple(name for name, kind in KINDS.items() if kind.headline)
_RECOVERY = tuple(name for name, kind in KINDS.items() if kind.place.startswith("recovery."))

SYNTHETIC = "synthetic faces"

#: Of the summary.
COLUMNS = (
    Column("defence", numeric=False),
    Column("attack", numeric=False),
    Column("knowledge", "What the attacker knows: blackbox, whitebox or oracle.", numeric=False),
    *(column(name) for name in ("accuracy", *LEAKS, "bytes", "protect", "recover")),
)


def subject(setting: Setting) -> str:
    """What the figures of a setting are of, for captions: dataset, size, protocol, and whether faces are synthetic."""
    return f"{setting.title} ({SYNTHETIC})" if setting.synthetic and SYNTHETIC not in setting.title else setting.title


def summary(setting: Setting, number: int) -> Table:
    """Defence against attack: one row for each run, for each defence's worst case and for each published figure."""
    worst = worst_rows(setting)
    rows: list[Row] = []
    for name, cells in setting.defenses.items():
        rows += [worst[name]] if name in worst else []
        rows += [_failed(cell) if cell.result is None else _measured(cell, cell.result) for cell in cells]
        printed = matching(str(cells[0].run.manifest.config.get("defense")), [cell.name for cell in cells])
        rows += [_published(name, figure) for figure in printed]
    caption = (
        f"Defence against attack: {subject(setting)}. In brackets the 95 % interval over identities (of speeds: the "
        "quartiles). 'Worst case' rows take, victim by victim, the attack that leaks most; bold is the best defence by "
        "its worst case, where all were tried by the same attacks. Figures that no run has are left out."
    )
    table = Table(f"summary-{number}", caption, COLUMNS, tuple(rows), _floors(setting), headers=3)
    return table.without_empty_columns()


def _keys(defense: str, attack: str, knowledge: str, kind: str) -> dict[str, str]:
    return {"defence": defense, "attack": attack, "knowledge": knowledge, "kind": kind}


def _measured(cell: Cell, result: AttackResult) -> Row:
    utility = cell.run.result.utility
    unprotected = "" if utility is None else f"unprotected {measured('accuracy', utility.unprotected.accuracy).text}"
    entries = (
        Entry(cell.defense),
        Entry(cell.attack, note="unsaturated: a lower bound" if cell.unsaturated else ""),
        Entry(cell.knowledge),
        measured("accuracy", None if utility is None else utility.accuracy, note=unprotected),
        *(measured(name, result.figure(name), note=_ceiling(result, name)) for name in LEAKS),
        _bytes(cell),
        speed(cell, "protect"),
        speed(cell, f"recover {cell.name}", f"link {cell.name}", "recover", "link"),
    )
    return Row(entries, "measured", _keys(cell.defense, cell.attack, cell.knowledge, "measured"))


def _failed(cell: Cell) -> Row:
    empty = tuple(Entry(MISSING) for _ in range(len(LEAKS) + 4))
    entries = (Entry(cell.defense), Entry(cell.attack, note="failed: see the warnings"), Entry(cell.knowledge), *empty)
    return Row(entries, "failed", _keys(cell.defense, cell.attack, cell.knowledge, "failed"))


def _published(defense: str, figure: Figure) -> Row:
    attack, knowledge = figure.attack or "none", figure.knowledge or MISSING
    entries = (
        Entry(defense),
        Entry(attack, note=f"published: {figure.source.short}"),
        Entry(knowledge),
        *(measured(name, figure.measure(name)) for name in ("accuracy", *LEAKS)),
        *(Entry(MISSING) for _ in range(3)),
    )
    return Row(entries, "published", _keys(defense, attack, knowledge, "published"))


# -- the worst case of a defence -------------------------------------------------------------------


def same_attacks(setting: Setting) -> bool:
    """Whether every defence was tried by the same attacks: only then is one worst case better than another."""
    tried = [{(cell.attack, cell.knowledge) for cell in cells} for cells in setting.defenses.values()]
    return all(attacks == tried[0] for attacks in tried)


def worst_rows(setting: Setting) -> dict[str, Row]:
    """Defence -> its row at the worst case over all attacks; none for a defence of which nothing was measured."""
    worst = {
        defense: {name: worst_case(cells, name) for name in LEAKS}
        for defense, cells in setting.defenses.items()
        if not all(cell.run.failed for cell in cells)
    }
    best = _best(list(worst.values())) if same_attacks(setting) else {}
    return {defense: _worst_row(defense, setting.defenses[defense], values, best) for defense, values in worst.items()}


def _best(rows: Sequence[Mapping[str, Worst | None]]) -> dict[str, float]:
    """The smallest leakage at worst by each figure; nothing where only one defence has one."""
    best = {}
    for name in LEAKS:
        leakages = [leak(name, worst.measure) for row in rows if (worst := row[name]) is not None]
        if len(leakages) > 1:
            best[name] = min(leakages)
    return best


def _worst_row(
    defense: str, cells: Sequence[Cell], values: Mapping[str, Worst | None], best: Mapping[str, float]
) -> Row:
    leaks = []
    for name, worst in values.items():
        if worst is None:
            leaks.append(Entry(MISSING))
            continue
        note = worst.strongest.attack + (", unsaturated" if worst.strongest.unsaturated else "")
        leaks.append(measured(name, worst.measure, note=note, best=leak(name, worst.measure) == best.get(name)))
    done = [cell for cell in cells if not cell.run.failed]
    failed = len(cells) - len(done)
    over = f"over {len(done)} attack run{'s' * (len(done) != 1)}" + (f", {failed} failed" if failed else "")
    entries = (
        Entry(defense),
        Entry("worst case", note=over),
        Entry("any"),
        measured("accuracy", lowest_accuracy(cells)),
        *leaks,
        _bytes(done[0]),
        fastest(cells),
        Entry(MISSING),
    )
    return Row(entries, "worst", _keys(defense, "worst case", "any", "worst"))


# -- notes and floors ------------------------------------------------------------------------------


def _ceiling(result: AttackResult, name: str) -> str:
    """What the same attack gets from an unprotected face."""
    ceiling = result.ceiling(name)
    return "" if ceiling is None or ceiling.value is None else f"ceiling {measured(name, ceiling).text}"


def _floors(setting: Setting) -> tuple[Row, ...]:
    """The trivial floors, the highest of all runs."""
    guesses = {name: floors(setting.cells, name) for name in LEAKS}
    blank = Entry(MISSING)
    return tuple(
        Row(
            (
                Entry(f"floor: {label}"),
                *[blank] * 3,
                *(measured(name, guesses[name].get(label)) for name in LEAKS),
                *[blank] * 3,
            ),
            "floor",
        )
        for label in dict.fromkeys(label for by_label in guesses.values() for label in by_label)
    )


def _bytes(cell: Cell) -> Entry:
    defense = cell.run.result.defense
    return Entry(MISSING) if defense is None else Entry(f"{defense.bytes_per_face:,}", float(defense.bytes_per_face))


def speed(cell: Cell, *operations: str) -> Entry:
    """Faces per second of the first of ``operations`` that the run has timed, with its quartiles."""
    timed = cell.run.result.throughput or {}
    rate = next((timed[name].images_per_second for name in operations if name in timed), None)
    if rate is None:
        return Entry(MISSING)
    return Entry(f"{rate.median:,.0f}", rate.median, f"[{rate.q1:,.0f}, {rate.q3:,.0f}]")


def fastest(cells: Sequence[Cell]) -> Entry:
    """How fast a defence protects: the run that other work on the machine slowed down least."""
    return max((speed(cell, "protect") for cell in cells), key=lambda entry: entry.number or 0.0)


def recovery_table(setting: Setting, number: int) -> Table | None:
    """Each recovery attack between the floors and its own ceiling, by every figure there is."""
    rows = []
    for cell, result in setting.measured:
        if (recovery := result.recovery) is None:
            continue
        parts: dict[str, Quality] = {"attack": recovery}
        parts |= {f"floor: {name.replace('_', ' ')}": floor for name, floor in recovery.floors.items()}
        parts["ceiling"] = recovery.ceiling
        for part, quality in parts.items():
            entries = (Entry(cell.label), Entry(part), *(measured(name, quality.figure(name)) for name in _RECOVERY))
            rows.append(Row(entries, "worst" if part == "attack" else "floor"))
    if not rows:
        return None
    caption = (
        f"Recovery between floors and ceiling: {subject(setting)}. The ceiling is the same attack on unprotected faces."
    )
    columns = (Column("run", numeric=False), Column("of", numeric=False), *map(column, _RECOVERY))
    return Table(f"recovery-{number}", caption, columns, tuple(rows), headers=2)


def failures(settings: Sequence[Setting]) -> list[tuple[str, str]]:
    """(label, reason) of every run that has no figures."""
    return [
        (label, cell.run.result.error or cell.run.result.status)
        for setting in settings
        for label, cell in setting.runs
        if cell.run.failed
    ]


# -- in short ----------------------------------------------------------------------------------------

#: Figure -> what it answers.
_QUESTIONS = {
    "ssim": "How much of the picture comes back?",
    "type1_tar": "How many recovered faces pass for their person?",
    "linkage": "How often are protected and plain faces linked?",
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One figure of a defence: what it answers, the figure with its interval, and what it stands between."""

    question: str
    figure: str
    context: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A defence in a few figures, each at its worst case."""

    defense: str
    facts: tuple[Fact, ...]

    def __str__(self) -> str:
        told = (f"{fact.question} {fact.figure} ({fact.context})" for fact in self.facts)
        return f"{self.defense}: {' '.join(told) or 'nothing was measured.'}"


def findings(setting: Setting) -> list[Finding]:
    """One for each defence, in plain text."""
    return [Finding(name, tuple(_facts(cells))) for name, cells in setting.defenses.items()]


def _facts(cells: Sequence[Cell]) -> list[Fact]:
    facts = []
    utility = lowest_accuracy(cells)
    if utility is not None:
        facts.append(Fact("How well does it recognise?", _figure("accuracy", utility), _unprotected(cells)))
    for name, question in _QUESTIONS.items():
        if (worst := worst_case(cells, name)) is None:
            continue
        floor = max(floors(cells, name).values(), key=lambda measure: leak(name, measure), default=None)
        result = worst.strongest.result
        marks = {"floor": floor, "ceiling": result.ceiling(name) if result else None}
        context = [f"{mark} {shown(name, measure)}" for mark, measure in marks.items() if measure is not None]
        late = ", still improving: a lower bound" if worst.strongest.unsaturated else ""
        who = f"strongest attack: {worst.strongest.attack} ({worst.strongest.knowledge}){late}"
        facts.append(Fact(question, _figure(name, worst.measure), "; ".join([who, *context])))
    return facts


def _figure(name: str, measure: Measure) -> str:
    kind = KINDS[name]
    value = f"{shown(name, measure)} %" if kind.unit == "%" else f"{kind.heading} {shown(name, measure)}"
    ends = interval(name, measure)
    return f"{value} {ends}" if ends else value


def _unprotected(cells: Sequence[Cell]) -> str:
    plain = (utility.unprotected.accuracy for cell in cells if (utility := cell.run.result.utility) is not None)
    return f"without a defence {shown('accuracy', next(plain))} %"
