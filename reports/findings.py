"""What a setting says in short: how well each defence recognises, and what the strongest attack got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.measures import KINDS, interval, leak, shown
from bench.results import Measure
from reports.cells import Cell, Setting, floors, lowest_accuracy, worst_case

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
