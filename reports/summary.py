"""What a report says of a setting: its summary, recovery between floors and ceilings, and all of it in short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from bench.measures import KINDS, shown
from bench.results import (
    NO_BETTER,
    EvaluatorInfo,
    Inversion,
    Measure,
    TemplateProtection,
    Verification,
    measures,
)
from reports.cells import Cell, Setting, floors, once, over_seeds, recognition, worst_case, worst_floor
from reports.published import matching
from reports.table import Column, Entry, Row, Table, measured
from reports.verdict import Standing, Verdict, figure, least, standings

#: The figure of an attack that stands before all others.
HEADLINE = "type2_far_1e3"
#: Figures of the summary that an attack earned, in their order.
LEAKS = (HEADLINE, *(name for name, kind in KINDS.items() if kind.headline and name != HEADLINE))
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
        for knowledge in (rung for name, rung in setting.rungs if name == defense):
            rows += [worst[defense, knowledge]] if (defense, knowledge) in worst else []
            seeds: dict[str, list[Cell]] = {}
            for cell in setting.rungs[defense, knowledge]:
                seeds.setdefault(cell.attack if cell.result is not None else f"failed {cell.attack}", []).append(cell)
            rows += map(_measured, seeds.values())
        rows += printed_rows(defense, cells)
    caption = (
        f"Defence against attack: {subject(setting)}. In brackets the 95 % interval over identities (of speeds: the "
        "quartiles), of several seeds their mean. 'Worst case' rows take, victim by victim, the attack that leaks "
        "most, beside the trivial guess that gets most; bold are defences that leak least among those that met the "
        "same attacks, which were better than a guess, where they differ. Figures that no run has are left out."
        f"{judged(setting)}"
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


def _measured(cells: Sequence[Cell]) -> Row:
    """One attack on a defence, over all seeds of which there are runs."""
    cell, attack = cells[0], cells[0].attack
    verdicts = list(dict.fromkeys(cell.verdict for cell in cells if cell.verdict))
    seeds = sorted({cell.seed for cell in cells})
    runs = [f"mean of {len(seeds)} seeds: {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
    note = "; ".join(runs + verdicts)
    if all(one.result is None for one in cells):
        return _row("failed", cell.defense, attack, note, cell.knowledge, {})
    figures = {}
    if (recognised := recognition(cells)) is not None:
        unprotected = f"unprotected {shown('accuracy', recognised.unprotected)}"
        figures["accuracy"] = measured("accuracy", recognised.protected, note=unprotected)
    for name in LEAKS:
        if (case := worst_case(cells, name)) is None:
            continue
        highest = {one.seed: one.result.ceiling(name) for one in cells if one.result is not None}
        ceilings = [measure for measure in highest.values() if measure is not None and measure.value is not None]
        ceiling = f"ceiling {shown(name, over_seeds(name, ceilings))}" if ceilings else ""
        figures[name] = measured(name, case.measure, note=ceiling)
    figures |= {"bytes": _bytes(cell), "protect": fastest(cells), "declares": _declared(cell)}
    operations = f"recover {cell.name}", f"link {cell.name}", "recover", "link"
    figures["recover"] = max((speed(one, *operations) for one in cells), key=lambda entry: entry.number or 0.0)
    return _row("measured", cell.defense, attack, note, cell.knowledge, figures)


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


@once
def worst_rows(setting: Setting) -> dict[tuple[str, str], Row]:
    """Defence and rung -> its worst case over the attacks on that rung; none where nothing was measured."""
    cases: dict[tuple[str, str], dict[str, Standing]] = {
        place: {} for place, cells in setting.rungs.items() if not all(cell.result is None for cell in cells)
    }
    best = set()
    for knowledge in setting.knowledge:
        for name in LEAKS:
            ranked = standings(setting, knowledge, name)
            for one in ranked:
                if one.worst is not None:
                    cases[one.defense, knowledge][name] = one
            leaders = least([one for one in ranked if not one.unprotected])
            judged = [one for one in ranked if not one.objection]
            # Where all are alike, or nothing does better than no defence, nobody is the best.
            if len(leaders) < len(judged) and not any(one.unprotected for one in least(ranked)):
                best |= {(one.defense, knowledge, name) for one in leaders}
    return {
        (defense, knowledge): _worst_row(
            setting.rungs[defense, knowledge], found, {name for name in found if (defense, knowledge, name) in best}
        )
        for (defense, knowledge), found in cases.items()
    }


def _whole(cells: Sequence[Cell]) -> bool:
    """Whether every attack of a worst case has figures."""
    return all(cell.result is not None for cell in cells)


def _above(cells: Sequence[Cell]) -> bool:
    """Whether any attack of a worst case is better than the floors, as far as it is known."""
    return not all(cell.no_better for cell in cells if cell.result is not None)


def _worst_row(cells: Sequence[Cell], cases: Mapping[str, Standing], best: set[str]) -> Row:
    recognised = recognition(cells)
    figures = {"accuracy": measured("accuracy", None if recognised is None else recognised.protected)}
    for name, case in cases.items():
        if case.worst is None:
            continue
        strongest = case.worst.strongest
        note = strongest.attack + (", unsaturated" if strongest.unsaturated else "")
        if (floor := worst_floor(cells, name)) is not None:
            note += f"; floor {shown(name, floor)}"
        figures[name] = measured(name, case.worst.measure, note=note, best=name in best)
    done = [cell for cell in cells if cell.result is not None]
    failed, seeds = len(cells) - len(done), len({cell.seed for cell in done})
    over = f"over {len(done)} attack run{'s' * (len(done) != 1)}" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    over += "" if _whole(cells) else f"; incomplete: {failed} failed"
    over += "" if _above(cells) else f"; {NO_BETTER}"
    figures |= {"bytes": _bytes(done[0]), "protect": _client(cells), "declares": _declared(done[0])}
    return _row("worst", cells[0].defense, "worst case", over, cells[0].knowledge, figures)


def ranking(setting: Setting, verdict: Verdict, number: int) -> Table:
    """The defences of a verdict: what leaks, between floor and ceiling, at what accuracy, and whether that pays."""
    name, accuracy = verdict.name, "accuracy"
    rows = []
    for one in verdict.standings:
        recognised = one.recognition
        rows.append(
            Row(
                {
                    "defence": Entry(one.defense),
                    name: measured(name, None if one.worst is None else one.worst.measure),
                    "floor": measured(name, one.floor),
                    "ceiling": measured(name, one.ceiling),
                    accuracy: measured(accuracy, None if recognised is None else recognised.protected),
                    "unprotected": measured(accuracy, None if recognised is None else recognised.unprotected),
                    "verdict": Entry(one.told),
                },
                "worst",
            )
        )
    kind = KINDS[name]
    columns = (
        *(Column.of_text("defence"), Column.of_figure(name)),
        Column("floor", "floor", f"What guessing gets of the {kind.heading}."),
        Column("ceiling", "ceiling", f"The {kind.heading} of the same attack without a defence."),
        *(Column.of_figure(accuracy), Column("unprotected", "unprotected, %", "Accuracy without a defence.")),
        Column.of_text("verdict"),
    )
    caption = f"What leaks to an attacker at {verdict.knowledge}, from the least, at what accuracy: {subject(setting)}."
    slug = "".join(char if char.isalnum() and char.isascii() else "-" for char in verdict.knowledge)
    return Table(f"ranking-{number}-{setting.knowledge.index(verdict.knowledge)}-{slug}", caption, columns, tuple(rows))


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


def expression_table(setting: Setting, number: int) -> Table | None:
    """How often expressions of rendered people are told apart behind each defence, without it, and by chance.

    None where `bench explain` has looked at the expressions of no run.
    """
    rows = [
        Row(
            {
                "defence": Entry(defense),
                "protected": measured("accuracy", told.protected),
                "unprotected": measured("accuracy", told.unprotected),
                "chance": Entry(f"{100 * told.chance:.1f}", 100 * told.chance),
            }
        )
        for defense, cells in setting.defenses.items()
        for told in [run.explanation.expression for run in (cell.run for cell in cells) if run.explanation][:1]
        if told is not None
    ]
    columns = (
        Column.of_text("defence"),
        Column(
            "protected", "behind the defence, %", "Share of expressions that a classifier trained on it tells right."
        ),
        Column("unprotected", "on plain faces, %", "The same of a classifier trained on plain faces."),
        Column("chance", "chance, %"),
    )
    caption = (
        f"Expressions told apart behind each defence ({SYNTHETIC}): accuracy on rendered people of whom the classifier "
        "has seen nothing, with its 95 % interval over people."
    )
    return Table(f"expressions-{number}", caption, columns, tuple(rows)) if rows else None


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
    "type2_far_1e3": "How many recovered faces pass for their person, where one in a thousand strangers does?",
    "ssim": "How much of the picture comes back?",
    "linkage": "How often are protected and plain faces linked?",
    "pass_same": "How often does what is made of a stolen template pass for it?",
}


class Fact(NamedTuple):
    """One figure of a defence: what it answers, the figure with its interval, and what it stands between."""

    question: str
    figure: str
    context: str


def facts(cells: Sequence[Cell]) -> Iterator[Fact]:
    """A few figures of a defence on one rung, each at its worst case, in plain text."""
    if (recognised := recognition(cells)) is not None:
        context = f"without a defence {shown('accuracy', recognised.unprotected)} %"
        yield Fact("How well does it recognise?", figure("accuracy", recognised.protected), context)
    for name, question in _QUESTIONS.items():
        if (worst := worst_case(cells, name)) is None:
            continue
        floor = worst_floor(cells, name)
        result, strongest = worst.strongest.result, worst.strongest
        marks = {"floor": floor, "ceiling": result.ceiling(name) if result else None}
        context = f"strongest attack: {strongest.attack}"
        context += f"; {strongest.verdict}" if strongest.verdict else ""
        context += "" if _whole(cells) else "; incomplete: an attack failed"
        for mark, measure in marks.items():
            context += "" if measure is None else f"; {mark} {shown(name, measure)}"
        label = "" if KINDS[name].unit else f"{KINDS[name].heading} "
        yield Fact(question, label + figure(name, worst.measure), context)
