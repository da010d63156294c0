"""The tables of a report: the summary of a setting, its floors and ceilings, state inference, failures, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.measures import MISSING, leak
from bench.results import Measure, Quality, Quartiles, RunResult
from reports.cells import Cell, Setting
from reports.published import Figure, matching
from reports.table import Column, Entry, Row, Table, column, measured
from reports.worst import LEAKAGE, Worst, worst_case

#: Figures of the summary that an attack earned, in their order.
LEAKS = ("ssim", "psnr", "psnr_aligned", "lpips", "type1_tar", "rank1", "cosine", "linkage", "d_sys")
_QUALITY = ("ssim", "psnr", "psnr_aligned", "ms_ssim", "lpips")
_IDENTITY = ("type1_tar", "type2_tar", "rank1", "rank5", "cosine", "knn_distance")

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
        rows += [_failed(cell) if cell.run.failed else _measured(cell) for cell in cells]
        rows += [_published(name, one) for one in _printed(cells)]
    caption = (
        f"Defence against attack: {subject(setting)}. In brackets the 95 % interval over identities (of speeds: the "
        "quartiles). 'Worst case' rows take, victim by victim, the attack that leaks most; bold is the best defence by "
        "its worst case, where all were tried by the same attacks. Figures that no run has are left out."
    )
    table = Table(f"summary-{number}", caption, COLUMNS, tuple(rows), _floors(setting), headers=3)
    return table.without_empty_columns()


def _keys(defense: str, attack: str, knowledge: str, kind: str) -> dict[str, str]:
    return {"defence": defense, "attack": attack, "knowledge": knowledge, "kind": kind}


def _measured(cell: Cell) -> Row:
    result = cell.run.result
    unsaturated = result.attack is not None and result.attack.saturated is False
    entries = (
        Entry(cell.defense),
        Entry(cell.attack, note="unsaturated: a lower bound" if unsaturated else ""),
        Entry(cell.knowledge),
        measured("accuracy", accuracy(result), note=_unprotected(result)),
        *(measured(name, LEAKAGE[name](result), note=_ceiling(result, name)) for name in LEAKS),
        _bytes(result),
        speed(result, "protect"),
        _attack_speed(result),
    )
    return Row(entries, "measured", _keys(cell.defense, cell.attack, cell.knowledge, "measured"))


def _failed(cell: Cell) -> Row:
    empty = tuple(Entry(MISSING) for _ in range(len(LEAKS) + 4))
    entries = (Entry(cell.defense), Entry(cell.attack, note="failed: see the warnings"), Entry(cell.knowledge), *empty)
    return Row(entries, "failed", _keys(cell.defense, cell.attack, cell.knowledge, "failed"))


def _printed(cells: Sequence[Cell]) -> list[Figure]:
    """The published figures beside the runs of one defence."""
    config = cells[0].run.manifest.config
    attacks = [str(cell.run.manifest.config.get("attack")) for cell in cells]
    return matching(str(config.get("defense")), attacks)


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


def accuracy(result: RunResult) -> Measure | None:
    """Recognition behind the defence."""
    return None if result.utility is None else result.utility.accuracy


def lowest_accuracy(cells: Sequence[Cell]) -> Measure | None:
    """The lowest recognition among the runs of a defence, as far as it was measured."""
    found = [one for cell in cells if (one := accuracy(cell.run.result)) is not None and one.value is not None]
    return min(found, key=lambda one: one.value or 0.0, default=None)


def same_attacks(setting: Setting) -> bool:
    """Whether every defence was tried by the same attacks: only then is one worst case better than another."""
    tried = [{(cell.attack, cell.knowledge) for cell in cells} for cells in setting.defenses.values()]
    return all(one == tried[0] for one in tried)


def worst_rows(setting: Setting) -> dict[str, Row]:
    """Defence -> its row at the worst case over all attacks; none for a defence of which nothing was measured."""
    found = {
        defense: {name: worst_case(cells, name) for name in LEAKS}
        for defense, cells in setting.defenses.items()
        if not all(cell.run.failed for cell in cells)
    }
    best = _best(list(found.values())) if same_attacks(setting) else {}
    return {defense: _worst_row(defense, setting.defenses[defense], values, best) for defense, values in found.items()}


def _best(rows: Sequence[Mapping[str, Worst | None]]) -> dict[str, float]:
    """The smallest leakage at worst by each figure; nothing where only one defence has one."""
    best = {}
    for name in LEAKS:
        found = [leak(name, worst.measure) for row in rows if (worst := row[name]) is not None]
        if len(found) > 1:
            best[name] = min(found)
    return best


def _worst_row(
    defense: str, cells: Sequence[Cell], values: Mapping[str, Worst | None], best: Mapping[str, float]
) -> Row:
    leaks = []
    for name, worst in values.items():
        if worst is None:
            leaks.append(Entry(MISSING))
            continue
        note = worst.strongest.attack + (", unsaturated" if worst.unsaturated else "")
        leaks.append(measured(name, worst.measure, note=note, best=leak(name, worst.measure) == best.get(name)))
    done = [cell for cell in cells if not cell.run.failed]
    failed = len(cells) - len(done)
    over = f"over {len(done)} run{'s' * (len(done) != 1)}" + (f", {failed} failed" if failed else "")
    entries = (
        Entry(defense),
        Entry("worst case", note=over),
        Entry("any"),
        measured("accuracy", lowest_accuracy(cells)),
        *leaks,
        _bytes(done[0].run.result),
        fastest(cells),
        Entry(MISSING),
    )
    return Row(entries, "worst", _keys(defense, "worst case", "any", "worst"))


# -- notes and floors ------------------------------------------------------------------------------


def _unprotected(result: RunResult) -> str:
    if result.utility is None:
        return ""
    return f"unprotected {measured('accuracy', result.utility.unprotected.accuracy).text}"


def _ceiling(result: RunResult, name: str) -> str:
    """What the same attack gets from an unprotected face."""
    ceiling: Measure | None = None
    if result.recovery is not None and name in _QUALITY:
        ceiling = getattr(result.recovery.ceiling, name)
    elif result.recovery is not None and name in _IDENTITY:
        ceiling = getattr(result.recovery.ceiling.identity, name)
    elif result.linkage is not None and name == "linkage":
        ceiling = result.linkage.plain.accuracy
    return "" if ceiling is None or ceiling.value is None else f"ceiling {measured(name, ceiling).text}"


def _quality(quality: Quality, name: str) -> Measure | None:
    found: Measure | None = getattr(quality if name in _QUALITY else quality.identity, name)
    return found


def _floors(setting: Setting) -> tuple[Row, ...]:
    """The trivial floors: of several runs the highest, so that nothing looks better than guessing which is not."""
    found: dict[str, list[Quality]] = {}
    for cell in setting.measured:
        if cell.run.result.recovery is not None:
            for name, floor in cell.run.result.recovery.floors.items():
                found.setdefault(name, []).append(floor)
    rows: list[Row] = []
    for name, floors in found.items():
        label = f"floor: {name.replace('_', ' ')}"
        values: list[Entry] = []
        for figure in LEAKS:
            if figure in _QUALITY or figure in _IDENTITY:
                highest = max((_quality(floor, figure) for floor in floors), key=lambda one: leak(figure, one))
                values.append(measured(figure, highest))
            else:
                values.append(Entry(MISSING))
        rows.append(_floor(label, values))
    linkages = [linkage for cell in setting.measured if (linkage := cell.run.result.linkage) is not None]
    if linkages:
        chance = max((one.d_sys_chance for one in linkages if one.d_sys_chance is not None), default=None)
        guess = {"linkage": 0.5, "d_sys": chance}
        values = [
            measured(name, Measure(value=guess[name], direction="leakage")) if guess.get(name) else Entry(MISSING)
            for name in LEAKS
        ]
        rows.append(_floor("floor: guessing", values))
    return tuple(rows)


def _floor(label: str, values: Sequence[Entry]) -> Row:
    blank = Entry(MISSING)
    return Row((Entry(label), blank, blank, blank, *values, blank, blank, blank), "floor")


def _bytes(result: RunResult) -> Entry:
    if result.defense is None:
        return Entry(MISSING)
    return Entry(f"{result.defense.bytes_per_face:,}", float(result.defense.bytes_per_face))


def speed(result: RunResult, stage: str) -> Entry:
    """Faces per second of one stage, with its quartiles."""
    found = (result.throughput or {}).get(stage)
    return Entry(MISSING) if found is None else _rate(found.images_per_second)


def fastest(cells: Sequence[Cell]) -> Entry:
    """How fast a defence protects: the run that other work on the machine slowed down least."""
    return max((speed(cell.run.result, "protect") for cell in cells), key=lambda entry: entry.number or 0.0)


def _attack_speed(result: RunResult) -> Entry:
    """Of a composite attack the slowest member: all of them have to run."""
    rates = [
        one.images_per_second for name, one in (result.throughput or {}).items() if name.startswith(("recover", "link"))
    ]
    return _rate(min(rates, key=lambda rate: rate.median)) if rates else Entry(MISSING)


def _rate(rate: Quartiles) -> Entry:
    return Entry(f"{rate.median:,.0f}", rate.median, f"[{rate.q1:,.0f}, {rate.q3:,.0f}]")


def recovery_table(setting: Setting, number: int) -> Table | None:
    """Each recovery attack between the floors and its own ceiling, by every figure there is."""
    names = (*_QUALITY, *_IDENTITY)
    rows = []
    for cell in setting.measured:
        recovery = cell.run.result.recovery
        if recovery is None:
            continue
        parts: dict[str, tuple[Quality, str]] = {"attack": (recovery, "worst")}
        parts |= {f"floor: {name.replace('_', ' ')}": (floor, "floor") for name, floor in recovery.floors.items()}
        parts["ceiling"] = (recovery.ceiling, "floor")
        for part, (quality, kind) in parts.items():
            entries = (Entry(cell.label), Entry(part), *(measured(name, _quality(quality, name)) for name in names))
            rows.append(Row(entries, "worst" if kind == "worst" else "floor" if kind == "floor" else "measured"))
    if not rows:
        return None
    caption = (
        f"Recovery between floors and ceiling: {subject(setting)}. The ceiling is the same attack on unprotected faces."
    )
    columns = (Column("run", numeric=False), Column("of", numeric=False), *(column(name) for name in names))
    return Table(f"recovery-{number}", caption, columns, tuple(rows), headers=2)


def failures(settings: Sequence[Setting]) -> list[tuple[str, str]]:
    """(label, reason) of every run that has no figures."""
    return [
        (cell.label, cell.run.result.error or cell.run.result.status)
        for setting in settings
        for cell in setting.cells
        if cell.run.failed
    ]
