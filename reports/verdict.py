"""The verdict on a setting: which defence leaks least under an attacker, at what accuracy, and whether it is worth it.

Defences are compared by one figure at their worst case. A comparison is of means over seeds, on people that are drawn
together (:mod:`bench.gate.comparison`), and held against as many others as there are (multiple comparisons with the
best; Hsu, Ann. Stat. 12(3), 1984; here by Bonferroni's inequality).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from bench.gate.comparison import quantile, victims_variance
from bench.measures import KINDS, Measure, interval, leak, shown
from reports.cells import Cell, Recognition, Setting, Worst, once, recognition, seed_half, worst_case, worst_floor

#: A defence is worth it if it leaves at most this share of what the same attack gets without it, from floor to ceiling,
LEAVES_AT_MOST = 0.5
#: and costs at most this much accuracy. Both are asked of the unfavourable end of the 95 % interval.
COSTS_AT_MOST = 0.05

#: Figures by which defences are ranked -> what they say; the first that half of the defences have.
HEADLINES = {
    "pass_renewed_1e3": "{} of inverted templates pass at FAR 1e-3 after the key was renewed",
    "type2_far_1e3": "{} of recovered faces pass for their person at FAR 1e-3",
    "pass_renewed": "{} of inverted templates pass at FAR 1e-2 after the key was renewed",
    "type2_tar": "{} of recovered faces pass for their person",
    "linkage": "{} of pairs of a protected and a plain face are told apart",
    "ssim": "recovered faces have an SSIM of {}",
}
#: Figures of inverted templates -> the false acceptance rate at which they stand, which is what guessing gets.
_FARS = {"pass_renewed_1e3": "1e-3", "pass_renewed": "1e-2"}
#: What is measured beside all defences, and is none.
UNPROTECTED = "none"
#: One-sided error of a comparison, before it is shared out over all of them.
_ERROR = 0.05

Worth = Literal["worth it", "not worth it", "not shown"]


@dataclass(frozen=True)
class Standing:
    """How a defence stands under attackers of one rung, by one figure.

    Attributes:
        defense: its label.
        cells: the attacks on it.
        name: the figure.
        worst: its worst case over all of them; None where nothing was measured.
        objection: why less may leak than would under other attacks, so that it is not compared; empty for none.
    """

    defense: str
    cells: tuple[Cell, ...]
    name: str
    worst: Worst | None
    objection: str

    @property
    def unprotected(self) -> bool:
        """Whether this is no defence."""
        return self.cells[0].run.manifest.config.get("defense") == UNPROTECTED

    @cached_property
    def recognition(self) -> Recognition | None:
        """Accuracy behind it and without it."""
        return recognition(self.cells)

    @cached_property
    def floor(self) -> Measure | None:
        """What guessing gets."""
        if (far := _FARS.get(self.name)) is not None:
            return Measure(value=float(far), direction="leakage")
        return worst_floor(self.cells, self.name)

    @cached_property
    def ceiling(self) -> Measure | None:
        """What the strongest attack gets of unprotected faces; of stored templates, how often unprotected ones pass."""
        if self.worst is None or (result := self.worst.strongest.result) is None:
            return None
        if (far := _FARS.get(self.name)) is None:
            return result.ceiling(self.name)
        utility = self.worst.strongest.run.result.utility
        return None if utility is None else utility.unprotected.tar_at_far.get(far)

    @cached_property
    def left(self) -> tuple[float, float, float] | None:
        """Where it stands between floor (0) and ceiling (1): the value and both ends of its interval.

        None where that is not known, or where the attack gets no more than guesses even of unprotected faces.
        """
        if self.worst is None or self.floor is None or self.ceiling is None:
            return None
        low, high = _ends(self.name, self.worst.measure, self.worst.scores[0].victims)
        bottom, top = (leak(self.name, measure) for measure in (self.floor, self.ceiling))
        if not top > bottom:
            return None
        sign = KINDS[self.name].leaks
        value, *ends = ((sign * end - bottom) / (top - bottom) for end in (self.worst.measure.value or 0.0, low, high))
        return value, min(ends), max(ends)

    @cached_property
    def cost(self) -> tuple[float, float, float] | None:
        """Accuracy that it costs: the value and both ends of its interval; None where that was not measured."""
        if self.recognition is None or (plain := self.recognition.unprotected.value) is None:
            return None
        low, high = _ends("accuracy", self.recognition.protected, self.recognition.protected.n)
        return plain - (self.recognition.protected.value or 0.0), plain - high, plain - low

    @property
    def worth(self) -> tuple[Worth, str]:
        """Whether the defence is worth it, and why not.

        That it is not may be said in spite of an objection: further attacks only get more.
        """
        against = []
        if self.left is not None and self.left[1] > LEAVES_AT_MOST:
            against.append(f"leaves {self.left[0]:.0%} of what leaks without it")
        if self.cost is not None and self.cost[1] > COSTS_AT_MOST:
            against.append(f"costs {100 * self.cost[0]:.1f} points of accuracy")
        if against:
            return "not worth it", " and ".join(against)
        if self.objection:
            return "not shown", self.objection
        unknown = []
        if self.left is None:
            unknown.append("floor or ceiling were not measured, or are alike")
        elif self.left[2] > LEAVES_AT_MOST:
            unknown.append(f"it may leave {self.left[2]:.0%} of what leaks without it")
        if self.cost is None:
            unknown.append("recognition was not measured")
        elif self.cost[2] > COSTS_AT_MOST:
            unknown.append(f"it may cost {100 * self.cost[2]:.1f} points of accuracy")
        return ("not shown", " and ".join(unknown)) if unknown else ("worth it", "")

    @property
    def told(self) -> str:
        """Its verdict in a few words."""
        if self.unprotected:
            return "no defence"
        verdict, why = self.worth
        return f"{verdict}: {why}" if why else verdict


def _ends(name: str, measure: Measure, people: int) -> tuple[float, float]:
    """Both ends of an interval; of a rate that is the same for all people Wilson's."""
    value = measure.value or 0.0
    if measure.ci95 is not None or KINDS[name].unit != "%":
        return measure.ci95 or (value, value)
    from bench.metrics.bootstrap import wilson

    return wilson(value, max(1, people), quantile(0.975, math.inf))


@once
def standings(setting: Setting, knowledge: str, name: str) -> list[Standing]:
    """The defences that were attacked on a rung, from the one that leaks least, unmeasured ones last."""
    groups = {defense: cells for (defense, rung), cells in setting.rungs.items() if rung == knowledge}
    tried = Counter(frozenset(cell.attack for cell in cells) for cells in groups.values())
    # Compared are those that met the same attacks: as many as can be, and of two sets of as many the larger one.
    met = max(tried, key=lambda attacks: (tried[attacks], len(attacks)), default=frozenset())
    made = []
    for defense, cells in groups.items():
        worst = worst_case(cells, name)
        made.append(Standing(defense, tuple(cells), name, worst, _objection(cells, worst, name, met)))
    return sorted(made, key=lambda one: math.inf if one.worst is None else leak(name, one.worst.measure))


def _objection(cells: Sequence[Cell], worst: Worst | None, name: str, met: frozenset[str]) -> str:
    """Why what leaks at worst may be less than it would be, so that the defence is not compared; empty for none."""
    if all(cell.result is None for cell in cells):
        return "every attack failed"
    if worst is None:
        return f"{KINDS[name].heading} was not measured"
    if any(cell.result is None for cell in cells):
        return "an attack failed"
    by_seed: dict[int, set[str]] = {}
    for cell in cells:
        by_seed.setdefault(cell.seed, set()).add(cell.attack)
    if len({frozenset(attacks) for attacks in by_seed.values()}) > 1:
        return "its seeds did not meet the same attacks"
    if (tried := {cell.attack for cell in cells}) != met:
        return f"it met other attacks: {', '.join(sorted(tried))} instead of {', '.join(sorted(met))}"
    if all(cell.no_better for cell in cells):
        return "no attack is better than a floor"
    if worst.strongest.result is not None and worst.strongest.result.attack.broken:
        return "its attack is broken"
    if any(cell.unsaturated for cell in cells):
        return "an attack was unsaturated: a lower bound"
    return ""


def least(ranked: Sequence[Standing]) -> list[Standing]:
    """Of standings that nothing is held against, the one that leaks least, and those that cannot be told from it."""
    judged = [one for one in ranked if not one.objection]
    if not judged:
        return []
    first, *others = judged
    return [first, *(other for other in others if not _leaks_more(other, first, len(others)))]


def _leaks_more(other: Standing, first: Standing, comparisons: int) -> bool:
    """Whether more leaks behind ``other``, for sure."""
    if other.worst is None or first.worst is None:
        return False
    kind, level = KINDS[first.name], 1 - _ERROR / comparisons
    sides = [(other.worst.scores, 1.0), (first.worst.scores, -1.0)]
    weighted = [(scores, sign / len(side)) for side, sign in sides for scores in side]
    gain = kind.leaks * sum(weight * scores.figures[first.name].value for scores, weight in weighted)
    people = victims_variance(first.name, weighted, rate=kind.unit == "%")
    if people is None or gain <= 0:
        return False
    values = [{scores.seed: scores.figures[first.name].value for scores in side} for side, _ in sides]
    if values[0].keys() == values[1].keys():  # of one seed, what is peculiar to it cancels
        seeds = seed_half(np.array([values[0][seed] - values[1][seed] for seed in values[0]]), level)
    else:
        seeds = math.hypot(*(seed_half(np.array(list(side.values())), level) for side in values))
    return gain > math.hypot(quantile(level, people.df) * math.sqrt(people.value), seeds)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a setting under attackers of one rung.

    Attributes:
        knowledge: the rung.
        name: the figure by which the defences are ranked.
        standings: who stands where, from the one that leaks least.
        sentence: all of it in one.
        unsettled: defences that may be worth it or not, and why that is not known.
    """

    knowledge: str
    name: str
    standings: tuple[Standing, ...]
    sentence: str
    unsettled: Mapping[str, str]


@once
def verdicts(setting: Setting) -> list[Verdict]:
    """A verdict for each rung on which there were attacks."""
    made = []
    for knowledge in setting.knowledge:
        name = _headline(setting, knowledge)
        ranked = standings(setting, knowledge, name)
        unsettled = {one.defense: one.worth[1] for one in ranked if not one.unprotected and one.worth[0] == "not shown"}
        made.append(Verdict(knowledge, name, tuple(ranked), f"{knowledge}: {_sentence(ranked)}", unsettled))
    return made


def _headline(setting: Setting, knowledge: str) -> str:
    """The figure by which defences are ranked: the first that half of those with any have."""
    groups = [cells for (_, rung), cells in setting.rungs.items() if rung == knowledge]
    defenses = [cells for cells in groups if cells[0].run.manifest.config.get("defense") != UNPROTECTED] or groups
    having = Counter(
        name
        for cells in defenses
        for name in HEADLINES
        if any(leak(name, cell.result.figure(name)) > -math.inf for cell in cells if cell.result is not None)
    )
    most = max(having.values(), default=0)
    return next((name for name in HEADLINES if 2 * having[name] >= max(1, most)), "type2_far_1e3")


def _sentence(ranked: Sequence[Standing]) -> str:
    defenses = [one for one in ranked if not one.unprotected]
    if not defenses:
        return "no verdict, as nothing but unprotected faces was attacked."
    worthy = [one for one in defenses if one.worth[0] == "worth it"]
    leaders = least(worthy or defenses)
    if worthy:
        others = f" of the {len(worthy)} that are" if len(worthy) > len(leaders) else ""
        least_of = f", and {_leak(leaders)} least{others}" if len(worthy) > 1 else ""
        return f"{_names(leaders)} {'is' if len(leaders) == 1 else 'are'} worth it{least_of}: {_told(leaders)}."
    count = {1: f"{defenses[0].defense} is not", 2: "neither of the 2 defences is"}
    start = count.get(len(defenses), f"none of the {len(defenses)} defences is")
    start += " worth it" if all(one.worth[0] == "not worth it" for one in defenses) else " shown to be worth it"
    if len(defenses) == 1:
        return f"{start} ({defenses[0].worth[1]}): {_told(defenses)}."
    if not leaders:
        reasons = Counter(one.objection for one in defenses)
        told = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
        return f"{start}, and none can be said to leak least: {told}."
    judged = sum(not one.objection for one in defenses)
    others = f" of the {judged} that can be compared" if judged > len(leaders) else ""
    return f"{start}; {_names(leaders)} {_leak(leaders)} least{others}: {_told(leaders)}."


def _leak(leaders: Sequence[Standing]) -> str:
    return "leaks" if len(leaders) == 1 else "cannot be told apart and leak"


def _names(leaders: Sequence[Standing]) -> str:
    names = [one.defense for one in leaders]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _told(leaders: Sequence[Standing]) -> str:
    """The figures of the first of them: what leaks, between floor and ceiling, at what accuracy."""
    first = leaders[0]
    if first.worst is None:
        return "nothing was measured"
    what = HEADLINES.get(first.name, f"{KINDS[first.name].heading} {{}}")
    told = (f"behind {first.defense} " if len(leaders) > 1 else "") + what.format(
        figure(first.name, first.worst.measure)
    )
    marks = {"without a defence": first.ceiling, "by guessing": first.floor}
    known = [f"{figure(first.name, mark, bounds=False)} {whose}" for whose, mark in marks.items() if mark is not None]
    told += f" ({', '.join(known)})" if known else ""
    if first.recognition is None:
        return f"{told}; recognition was not measured"
    plain = figure("accuracy", first.recognition.unprotected, bounds=False)
    return f"{told}, at {figure('accuracy', first.recognition.protected)} accuracy ({plain} without a defence)"


def figure(name: str, measure: Measure, *, bounds: bool = True) -> str:
    """A figure with its unit and its interval."""
    unit = f" {KINDS[name].unit}" if KINDS[name].unit else ""
    return f"{shown(name, measure)}{unit} {interval(name, measure) if bounds else ''}".rstrip()
