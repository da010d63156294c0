"""What a report says of a setting: its summary, recovery between floors and ceilings, and all of it in short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from bench.measures import KINDS, interval, leak, shown
from bench.results import (
    NO_BETTER,
    EvaluatorInfo,
    Inversion,
    Measure,
    TemplateProtection,
    Verification,
    measures,
)
from reports.cells import Cell, Setting, Worst, floors, lowest_accuracy, worst_case, worst_floor
from reports.published import matching
from reports.table import Column, Entry, Row, Table, measured

#: Figures of the summary that an attack earned, in their order.
LEAKS = tuple(name for name, kind in KINDS.items() if kind.headline)
_RECOVERY = tuple(name for name, kind in KINDS.items() if kind.place.startswith("recovery."))
#: Of templates, before what an attack makes of them.
_TEMPLATES = tuple(name for group in ("template", "inversion") for name, kind in KINDS.items() if kind.group == group)

SYNTHETIC = "synthetic faces"

#: Of the summary.
COLUMNS = (
    Column.of_text("defence"),
    Column.of_text("attack"),
    Column.of_text("knowledge", "What the attacker knows: blackbox, whitebox or oracle."),
    *map(Column.of_figure, ("accuracy", *LEAKS, "bytes", "protect", "recover")),
    Column.of_text("declares", "Entropy of what is drawn for a face in bits, and epsilon by element and by image."),
)


def subject(setting: Setting) -> str:
    """What the figures of a setting are of, for captions: dataset, size, protocol, and whether faces are synthetic."""
    return f"{setting.title} ({SYNTHETIC})" if setting.synthetic and SYNTHETIC not in setting.title else setting.title


def judged(setting: Setting) -> str:
    """Who judges identities in a setting and how well, each judge at its worst, and who taught the recognisers.

    The last sentences of a caption.
    """
    taught = [cell.run.result.teacher.name for _, cell in setting.runs if cell.run.result.teacher is not None]
    by = f" Recognisers were taught by {', '.join(dict.fromkeys(taught))}." if taught else ""
    judges: dict[str, EvaluatorInfo] = {}
    for _, cell in setting.runs:
        for name, judge in cell.run.result.judges.items():
            if name not in judges or (judge.accuracy.value or 0.0) < (judges[name].accuracy.value or 0.0):
                judges[name] = judge
    return f" Identity is judged by {', '.join(judge.told for judge in judges.values())}.{by}" if judges else by


def summary(setting: Setting, number: int) -> Table:
    """Defence against attack: one row for each run, for each defence's worst case and for each published figure."""
    worst = worst_rows(setting)
    rows: list[Row] = []
    for defense, cells in setting.defenses.items():
        rows += [worst[defense]] if defense in worst else []
        rows += map(_measured, cells)
        rows += printed_rows(defense, cells)
    caption = (
        f"Defence against attack: {subject(setting)}. In brackets the 95 % interval over identities (of speeds: the "
        "quartiles). 'Worst case' rows take, victim by victim, the attack that leaks most, beside the trivial guess "
        "that gets most; bold is the best defence by its worst case, where all were tried by the same attacks, which "
        f"were better than a guess. Figures that no run has are left out.{judged(setting)}"
    )
    table = Table(f"summary-{number}", caption, COLUMNS, tuple(rows), tuple(floor_rows(setting)), headers=3)
    return table.without_empty_columns()


def printed_rows(defense: str, cells: Sequence[Cell]) -> list[Row]:
    """What papers printed of a defence, under one of the attacks that it was tried by."""
    rows = []
    for printed in matching(cells[0].run.manifest.config.get("defense"), {cell.name for cell in cells}):
        figures = {name: measured(name, printed.measure(name)) for name in ("accuracy", *LEAKS)}
        attack = printed.attack or "none", f"published: {printed.source.short}"
        rows.append(_row("published", defense, *attack, printed.knowledge or Entry().text, figures))
    return rows


def _row(
    kind: Literal["measured", "worst", "published", "failed"],
    defense: str,
    attack: str,
    note: str,
    knowledge: str,
    figures: Mapping[str, Entry],
) -> Row:
    named = {"defence": Entry(defense), "attack": Entry(attack, note=note), "knowledge": Entry(knowledge)}
    return Row({**named, **figures}, kind)


def _measured(cell: Cell) -> Row:
    result, utility = cell.result, cell.run.result.utility
    if result is None:
        return _row("failed", cell.defense, cell.attack, cell.verdict, cell.knowledge, {})
    figures = {}
    if utility is not None:
        unprotected = f"unprotected {shown('accuracy', utility.unprotected.accuracy)}"
        figures["accuracy"] = measured("accuracy", utility.accuracy, note=unprotected)
    for name in LEAKS:
        ceiling = result.ceiling(name)
        note = "" if ceiling is None or ceiling.value is None else f"ceiling {shown(name, ceiling)}"
        figures[name] = measured(name, result.figure(name), note=note)
    figures |= {"bytes": _bytes(cell), "protect": speed(cell, "protect"), "declares": _declared(cell)}
    figures["recover"] = speed(cell, f"recover {cell.name}", f"link {cell.name}", "recover", "link")
    return _row("measured", cell.defense, cell.attack, cell.verdict, cell.knowledge, figures)


def floor_rows(setting: Setting) -> Iterator[Row]:
    """The trivial floors, the highest of all runs."""
    guesses = {name: floors(setting.cells, name) for name in LEAKS}
    for label in dict.fromkeys(label for by_label in guesses.values() for label in by_label):
        figures = {name: measured(name, guesses[name].get(label)) for name in LEAKS}
        yield Row({"defence": Entry(f"floor: {label}"), **figures}, "floor")


def _bytes(cell: Cell) -> Entry:
    defense = cell.run.result.defense
    return Entry() if defense is None else Entry(f"{defense.bytes_per_face:,}", float(defense.bytes_per_face))


def _declared(cell: Cell) -> Entry:
    """The entropy and the privacy budgets that a defence claims."""
    if (defense := cell.run.result.defense) is None:
        return Entry()
    entropy = [f"{defense.entropy_bits:,.1f} bits"] if defense.entropy_bits else []
    budgets = defense.details.get("epsilon", {})
    epsilon = ["ε " + ", ".join(f"{value:,.3g} by {name}" for name, value in budgets.items())] if budgets else []
    return Entry("; ".join(entropy + epsilon) or Entry().text)


def _client(cells: Sequence[Cell]) -> Entry:
    """How fast a client protects many faces, and how long it needs for one."""
    timed = (cell.run.result.throughput or {} for cell in cells)
    times = [operations["protect"].latency_ms.median for operations in timed if "protect" in operations]
    return replace(fastest(cells), note=f"{min(times):.3g} ms for one" if times else "")


def speed(cell: Cell, *operations: str) -> Entry:
    """Faces per second of the first of ``operations`` that the run has timed, with its quartiles."""
    timed = cell.run.result.throughput or {}
    rate = next((timed[name].images_per_second for name in operations if name in timed), None)
    if rate is None:
        return Entry()
    return Entry(f"{rate.median:,.0f}", rate.median, f"[{rate.q1:,.0f}, {rate.q3:,.0f}]")


def fastest(cells: Sequence[Cell]) -> Entry:
    """How fast a defence protects: the run that other work on the machine slowed down least."""
    return max((speed(cell, "protect") for cell in cells), key=lambda entry: entry.number or 0.0)


# -- the worst case of a defence -------------------------------------------------------------------


def same_attacks(setting: Setting) -> bool:
    """Whether every defence was tried by the same attacks: only then is one worst case better than another."""
    tried = [{(cell.attack, cell.knowledge) for cell in cells} for cells in setting.defenses.values()]
    return all(attacks == tried[0] for attacks in tried)


def worst_rows(setting: Setting) -> dict[str, Row]:
    """Defence -> its row at the worst case over all attacks; none for a defence of which nothing was measured."""
    worst = {
        defense: {name: case for name in LEAKS if (case := worst_case(cells, name)) is not None}
        for defense, cells in setting.defenses.items()
        if not all(cell.result is None for cell in cells)
    }
    # What an attack that failed would have got, nobody knows, and what no attack has opened was not tried.
    judged = [defense for defense in worst if _whole(setting.defenses[defense]) and _above(setting.defenses[defense])]
    best: dict[str, float] = {}
    for name in LEAKS if same_attacks(setting) else ():
        leakages = [leak(name, worst[defense][name].measure) for defense in judged if name in worst[defense]]
        if len(leakages) > 1:  # one defence alone is not the best
            best[name] = min(leakages)
    return {
        defense: _worst_row(defense, setting.defenses[defense], cases, best if defense in judged else {})
        for defense, cases in worst.items()
    }


def _whole(cells: Sequence[Cell]) -> bool:
    """Whether every attack of a worst case has figures."""
    return all(cell.result is not None for cell in cells)


def _above(cells: Sequence[Cell]) -> bool:
    """Whether any attack of a worst case is better than the floors, as far as it is known."""
    return not all(cell.no_better for cell in cells if cell.result is not None)


def _worst_row(defense: str, cells: Sequence[Cell], cases: Mapping[str, Worst], best: Mapping[str, float]) -> Row:
    figures = {"accuracy": measured("accuracy", lowest_accuracy(cells))}
    for name, worst in cases.items():
        note = worst.strongest.attack + (", unsaturated" if worst.strongest.unsaturated else "")
        if (floor := worst_floor(cells, name)) is not None:
            note += f"; floor {shown(name, floor)}"
        figures[name] = measured(name, worst.measure, note=note, best=leak(name, worst.measure) == best.get(name))
    done = [cell for cell in cells if cell.result is not None]
    failed = len(cells) - len(done)
    over = f"over {len(done)} attack run{'s' * (len(done) != 1)}"
    over += "" if _whole(cells) else f"; incomplete: {failed} failed"
    over += "" if _above(cells) else f"; {NO_BETTER}"
    figures |= {"bytes": _bytes(done[0]), "protect": _client(cells), "declares": _declared(done[0])}
    return _row("worst", defense, "worst case", over, "any", figures)


def recovery_table(setting: Setting, number: int) -> Table | None:
    """Each recovery attack between the floors and its own ceiling, by every figure there is."""
    rows = []
    for cell, result in setting.measured:
        for part, quality in result.recovery.parts("attack").items() if result.recovery is not None else ():
            figures = {name: measured(name, quality.figure(name)) for name in _RECOVERY}
            kind: Literal["worst", "floor"] = "worst" if part == "attack" else "floor"
            rows.append(Row({"run": Entry(cell.label), "of": Entry(part), **figures}, kind))
            for judge, identity in quality.judges.items():
                figures = {name: measured(name, getattr(identity, name, None)) for name in _RECOVERY}
                rows.append(Row({"run": Entry(cell.label), "of": Entry(f"{part}, by {judge}"), **figures}, "floor"))
    caption = (
        f"Recovery between floors and ceiling: {subject(setting)}. The ceiling is the same attack on unprotected faces."
        f"{judged(setting)}"
    )
    columns = (Column.of_text("run"), Column.of_text("of"), *map(Column.of_figure, _RECOVERY))
    return Table(f"recovery-{number}", caption, columns, tuple(rows), headers=2) if rows else None


def protocol_table(setting: Setting, number: int) -> Table | None:
    """Recognition under each verification protocol, as papers print it, of each run behind its defence and without it.

    None where no run has verified further packs.
    """
    rows, packs, victims = list[Row](), dict[str, Column](), "victims"
    for label, cell in setting.runs:
        if (utility := cell.run.result.utility) is None or not utility.protocols:
            continue
        if (dataset := cell.run.result.dataset) is not None and "pack" in dataset.details:
            victims = str(dataset.details["pack"]).removesuffix(".bin")
        packs |= {name: _protocol_column(name, name) for name in utility.protocols}
        for of, official in (("protected", utility), ("unprotected", utility.unprotected)):
            parts = {"": official, **{name: getattr(protocol, of) for name, protocol in utility.protocols.items()}}
            figures = {
                f"pack {name}": measured("accuracy", part.accuracy, note=_strict(part)) for name, part in parts.items()
            }
            row = Row({"run": Entry(label), "of": Entry(of), **figures}, "measured" if of == "protected" else "floor")
            rows.append(row)
    caption = (
        f"Recognition by protocol: {subject(setting)}. Accuracy (LFW View 2), and below it the TAR at the lowest FAR "
        "that its impostor pairs allow. Victims are attacked; the people of the other packs are verified alone."
    )
    columns = (*map(Column.of_text, ("run", "of")), _protocol_column("", victims), *packs.values())
    return Table(f"protocols-{number}", caption, columns, tuple(rows), headers=2) if rows else None


def _protocol_column(pack: str, heading: str) -> Column:
    return Column(f"pack {pack}", f"{heading}, %", KINDS["accuracy"].meaning)


def _strict(pairs: Verification) -> str:
    """TAR at the lowest FAR at which it was measured."""
    known = [(far, tar) for far, tar in pairs.tar_at_far.items() if tar.value is not None]
    far, tar = min(known, key=lambda one: float(one[0]), default=("", None))
    return "" if tar is None else f"TAR@FAR {far}: {shown('tar_at_far', tar)}"


#: Place of a figure of templates or of a search -> what it is called in :data:`bench.measures.KINDS`, and its heading.
_SEARCHED = {
    **{f"tar_at_far.1e-{n}": ("tar_at_far", f"TAR@FAR 1e-{n}") for n in range(1, 7)},
    "rank1": ("identified", "rank-1"),
    **{f"tpir_at_fpir.1e-{n}": ("tpir_at_fpir", f"TPIR@FPIR 1e-{n}") for n in (1, 2)},
}


def identification_table(setting: Setting, number: int) -> Table | None:
    """Templates of several images (IJB-B, IJB-C) and large galleries; None where no run has measured them."""
    rows = []
    for label, cell in setting.runs:
        utility = cell.run.result.utility
        for name, of, figures in utility.templates_and_galleries() if utility is not None else ():
            entries = {
                place: measured(kind, figures[place]) for place, (kind, _) in _SEARCHED.items() if place in figures
            }
            among = [
                f"{int(size):,}: {shown('identified', rate)}"
                for size, rate in _among(figures)
                if rate.value is not None
            ]
            if among and "rank1" in entries:
                entries["rank1"] = replace(entries["rank1"], note=f"among {'; '.join(among)}")
            named = {"run": Entry(label), "of": Entry(of), "benchmark": Entry(name)}
            rows.append(Row({**named, **entries}, "measured" if of == "protected" else "floor"))
    caption = (
        f"Templates and large galleries: {subject(setting)}. 1:1, the TAR (1 - FNMR) at a FAR (FMR); 1:N, rank-1 and "
        "the TPIR at an FPIR, of several galleries their mean (ISO/IEC 19795-1)."
    )
    columns = (
        *map(Column.of_text, ("run", "of", "benchmark")),
        *(Column(place, f"{heading}, %", KINDS[kind].meaning) for place, (kind, heading) in _SEARCHED.items()),
    )
    table = Table(f"galleries-{number}", caption, columns, tuple(rows), headers=3)
    return table.without_empty_columns() if rows else None


def _among(figures: Mapping[str, Measure]) -> list[tuple[str, Measure]]:
    return [(place.rpartition(".")[2], rate) for place, rate in figures.items() if place.startswith("rank1_among.")]


def template_table(setting: Setting, number: int) -> Table | None:
    """Template defences: verification under each key, what stolen templates give away, and how far they can be linked.

    One row for each attack on a template defence; None where there is no such defence.
    """
    rows = []
    for cell, result in setting.measured:
        if (template := cell.run.result.template) is None:
            continue
        known = dict(measures({"template": template, "inversion": result.inversion}))
        notes = _template_notes(template, result.inversion)
        figures = {name: measured(name, known.get(KINDS[name].place), note=notes.get(name, "")) for name in _TEMPLATES}
        named = {"defence": Entry(cell.defense), "attack": Entry(cell.attack, note=cell.verdict)}
        rows.append(Row({**named, "stolen": Entry(stolen(result.inversion)), **figures}))
    caption = (
        f"Template protection: {subject(setting)}. The properties are those of ISO/IEC 30136: accuracy under each key "
        "(below it the EER), irreversibility (the cosine of inverted templates, and how many of them pass) and "
        "unlinkability (D_sys and maximal linkability, with the bound that it sets to any test that links)."
    )
    columns = (*map(Column.of_text, ("defence", "attack", "stolen")), *map(Column.of_figure, _TEMPLATES))
    table = Table(f"templates-{number}", caption, columns, tuple(rows), headers=3)
    return table.without_empty_columns() if rows else None


def across_table(setting: Setting, number: int) -> Table | None:
    """D_sys of what is made of records of two systems, stolen with their keys: a row and a column for each defence.

    Where defences protect embeddings of one size, which are taken for those of one recogniser. None of fewer than two
    such defences. The record of the column is of another image, under another key.
    """
    systems: dict[str, tuple[int, pd.DataFrame]] = {}
    for cell, result in setting.measured:
        if (inversion := result.inversion) is None or not inversion.key or (table := cell.run.inverted) is None:
            continue
        if cell.defense not in systems or inversion.records < systems[cell.defense][0]:
            systems[cell.defense] = (inversion.records, table[table["attack"] == cell.name])
    if len(systems) < 2:
        return None
    rows = [
        Row(
            {"a record of": Entry(one)}
            | {other: measured("estimate_d_sys", _linked(first, second)) for other, (_, second) in systems.items()}
        )
        for one, (_, first) in systems.items()
    ]
    caption = (
        f"Unlinkability across systems: {subject(setting)}. D_sys of the cosine between what is made of a person's "
        "record in one system and of another in a second, both stolen with their keys: 0 unlinkable, 1 fully linkable."
    )
    columns = (
        Column.of_text("a record of"),
        *(Column(name, name, KINDS["estimate_d_sys"].meaning) for name in systems),
    )
    return Table(f"across-{number}", caption, columns, tuple(rows)).without_empty_columns()


def _linked(first: pd.DataFrame, second: pd.DataFrame) -> Measure | None:
    """D_sys over all pairs of two tables of estimates of the same people; None where these are of two sizes."""
    import torch

    from bench.metrics.unlinkability import unlinkability_estimate

    one, other = (
        torch.nn.functional.normalize(torch.from_numpy(np.stack(list(column))).float(), dim=1)
        for column in (first["first"], second["second"])
    )
    names = pd.factorize(pd.concat([first["identity"], second["identity"]]))[0]
    people = torch.cartesian_prod(*torch.from_numpy(names).long().split([len(one), len(other)]))
    same = people[:, 0] == people[:, 1]
    if one.shape[1] != other.shape[1] or not same.any() or same.all():
        return None
    return KINDS["estimate_d_sys"].measure(unlinkability_estimate((one @ other.mT).flatten(), same, people))


def stolen(inversion: Inversion | None) -> str:
    """What was stolen of each person: how many templates, and whether with their keys."""
    if inversion is None:
        return Entry().text
    count = f"{inversion.records} template{'s' * (inversion.records != 1)}"
    return f"{count}, {'with' if inversion.key else 'without'} keys"


def _template_notes(template: TemplateProtection, inversion: Inversion | None) -> dict[str, str]:
    """Figure -> what it has to be read against."""
    notes = {f"{key}_accuracy": f"EER {shown('eer', pairs.eer)}" for key, pairs in template.verification.items()}
    notes["template_d_sys"] = "" if template.d_sys_chance is None else f"chance {template.d_sys_chance:.3f}"
    maximal = {"template_maximal": template.maximal}
    if inversion is not None:
        notes["embedding_cosine"] = f"floor {shown('embedding_cosine', inversion.floor)}"
        maximal["estimate_maximal"] = inversion.maximal
    bounds = {name: most_linked(measure) for name, measure in maximal.items()}
    return notes | {
        name: f"TMR at most {100 * bound:.1f} % at FMR 1e-2" for name, bound in bounds.items() if bound is not None
    }


def most_linked(maximal: Measure) -> float | None:
    """What maximal linkability leaves to any test that links: the highest TMR at an FMR of 1e-2; None where unknown."""
    from bench.metrics.unlinkability import tmr_bound

    return None if maximal.value is None else tmr_bound(maximal.value, 0.01)


def failures(settings: Sequence[Setting]) -> list[tuple[str, str]]:
    """(label, reason) of every run that has no figures, and of every attack that gave up in one that has."""
    runs = [
        (label, cell.run.result.error or cell.run.result.status)
        for setting in settings
        for label, cell in setting.runs
        if cell.run.failed
    ]
    gone = [(cell, cell.run.result.failed.get(cell.name)) for setting in settings for cell in setting.cells]
    return runs + [(cell.label, reason) for cell, reason in gone if reason is not None]


# -- in short ----------------------------------------------------------------------------------------

#: Figure -> what it answers.
_QUESTIONS = {
    "ssim": "How much of the picture comes back?",
    "type1_tar": "How many recovered faces pass for their person?",
    "linkage": "How often are protected and plain faces linked?",
    "pass_same": "How often does what is made of a stolen template pass for it?",
}


class Fact(NamedTuple):
    """One figure of a defence: what it answers, the figure with its interval, and what it stands between."""

    question: str
    figure: str
    context: str


def findings(setting: Setting) -> dict[str, list[Fact]]:
    """Defence -> a few figures, each at its worst case, in plain text."""
    return {defense: list(_facts(cells)) for defense, cells in setting.defenses.items()}


def _facts(cells: Sequence[Cell]) -> Iterator[Fact]:
    if (accuracy := lowest_accuracy(cells)) is not None:
        plain = next(cell.run.result.utility.unprotected for cell in cells if cell.run.result.utility is not None)
        context = f"without a defence {shown('accuracy', plain.accuracy)} %"
        yield Fact("How well does it recognise?", _figure("accuracy", accuracy), context)
    for name, question in _QUESTIONS.items():
        if (worst := worst_case(cells, name)) is None:
            continue
        floor = worst_floor(cells, name)
        result, strongest = worst.strongest.result, worst.strongest
        marks = {"floor": floor, "ceiling": result.ceiling(name) if result else None}
        context = f"strongest attack: {strongest.attack} ({strongest.knowledge})"
        context += f"; {strongest.verdict}" if strongest.verdict else ""
        context += "" if _whole(cells) else "; incomplete: an attack failed"
        for mark, measure in marks.items():
            context += "" if measure is None else f"; {mark} {shown(name, measure)}"
        yield Fact(question, _figure(name, worst.measure), context)


def _figure(name: str, measure: Measure) -> str:
    kind = KINDS[name]
    value = f"{shown(name, measure)} %" if kind.unit == "%" else f"{kind.heading} {shown(name, measure)}"
    return f"{value} {interval(name, measure)}".rstrip()
