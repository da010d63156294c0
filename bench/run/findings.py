"""What a run finds out about its attacks, whichever kind they are: the attacks' side of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench.errors import BenchError
from bench.measures import KINDS
from bench.metrics.bootstrap import ALIKE
from bench.results import (
    NO_BETTER,
    AttackInfo,
    AttackResult,
    EvaluatorInfo,
    FloorTest,
    Measure,
    Recovery,
    StrengthCurve,
    StrengthPoint,
    Throughput,
)
from bench.run.attack_config import AttackConfig, check_coverage
from bench.run.attacker import AttackStages
from bench.run.config import DATA, DOUBLING, Budget
from defenses.base import Defense

Point = TypeVar("Point")


@dataclass
class Findings:
    """What a run found out about its attacks.

    Attributes:
        several: whether there are several attacks: warnings and speeds then say which one they are about.
        results: by the attack's name.
        failed: why an attack gave up, by its name.
        worst_case: of several recovery attacks, per victim and figure the value under the one from which most leaks.
        worst_case_test: whether that is more than the pointwise worst case of the floors.
        evaluators: by name, the recognisers that scored identities, if any did.
        warnings: for the result.
        throughput: operation -> speed.
    """

    several: bool
    results: dict[str, AttackResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    worst_case: Recovery | None = None
    worst_case_test: FloorTest | None = None
    evaluators: dict[str, EvaluatorInfo] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    throughput: dict[str, Throughput] = field(default_factory=dict)

    @property
    def judges(self) -> dict[str, Any]:
        """The fields of the result that tell of the judges: one stands alone."""
        infos = list(self.evaluators.values())
        return {"evaluator": infos[0]} if len(infos) == 1 else {"evaluators": self.evaluators}

    def add(
        self,
        info: AttackInfo,
        strength: StrengthCurve | None,
        over: FloorTest,
        plain: FloorTest,
        speed: Mapping[str, Throughput],
        *,
        opens: frozenset[str] = frozenset(),
        canary: str = "",
        **figures: Any,
    ) -> None:
        """Take in one attack, marked by what follows from its report, its strength curve and the floors.

        Args:
            info: what it says of itself.
            strength: its curve.
            over: whether it gets more than the floors.
            plain: whether it does out of unprotected faces.
            speed: operation -> speed.
            opens: the kinds of canary that the attack says it opens.
            canary: the kind of canary that was attacked; empty where it was none.
            figures: the parts of its :class:`~bench.results.AttackResult`.
        """
        warnings = []
        if over.above is False:
            warnings.append(f"{NO_BETTER} ({over.told()})")
        if plain.above is False:
            warnings.append(f"broken: on unprotected faces the attack is no better than a floor ({plain.told()})")
        if over.above is False and not opens:
            warnings.append("the attack names no canary that it opens: it may open unprotected faces alone")
        unopened = over.above is False and canary in opens
        if unopened:
            warnings.append(f"broken: the attack says that it opens the canary {canary}, and is no better than a floor")
        if info.saturated is False:
            warnings.append(
                "unsaturated: the attack was still improving when its budget ended; its figure is a lower bound"
            )
        if strength is not None and strength.unsaturated:
            gains = ", ".join(
                f"{name} {measure.value:+.3f}"
                for name, measure in strength.gain_of_last_doubling.items()
                if measure.value is not None
            )
            warnings.append(f"unsaturated in {strength.axis}: the last doubling still gained ({gains}); a lower bound")
            info = info.model_copy(update={"saturated": False})
        if over.above is False:
            # Neither says anything of an attack that has not begun to work.
            info = info.model_copy(update={"saturated": None})
            if strength is not None and strength.unsaturated is False:
                strength = strength.model_copy(update={"unsaturated": None})
        warnings += _of_states(info)
        broken = True if unopened else None if plain.above is None else not plain.above
        tests = {"above_floor": over.above, "broken": broken, "floor_test": over, "plain_test": plain}
        name, info = info.name, info.model_copy(update=tests)
        self.results[name] = AttackResult(attack=info, strength=strength, **figures)
        self.warnings += [f"{name}: {warning}" if self.several else warning for warning in warnings]
        self.throughput |= {f"{operation} {name}" if self.several else operation: t for operation, t in speed.items()}

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Where one of several attacks gives up within, keep why, and let the others go on.

        What is wrong with the defence, the data or what was asked for is wrong for all of them.
        """
        try:
            yield
        except BenchError as error:
            if not self.several or type(error) is not BenchError:
                raise
            self.failed[name] = str(error)
            self.warnings.append(f"{name} failed, and the worst case is incomplete without it: {error}")

    def add_worst_case(self, worst_case: Recovery, over: FloorTest) -> None:
        """Take in the worst case of several recovery attacks, and whether it is more than that of the floors."""
        self.worst_case, self.worst_case_test = worst_case, over
        if over.above is False:
            self.warnings.append(f"worst case: {NO_BETTER} ({over.told()})")


def _of_states(info: AttackInfo) -> list[str]:
    """What a reader has to know of how the attack came by the defence's maps, and by the states of faces."""
    told = []
    if info.states_covered is False:
        told.append(
            f"states not told apart: the attack reads the state of {info.details['state_accuracy']:.0%} of public "
            "faces right; its figure is a lower bound"
        )
    if (linearity := info.details.get("linearity")) not in (None, "declared"):
        found = info.details.get("states_found")
        states = "" if found is None else f" ({found} states found)"
        told.append(f"{linearity}{states}: the attack took the defence's linear map off its own runs")
    return told


def attack_info(attacks: AttackStages, attack_config: AttackConfig, defense: Defense) -> AttackInfo:
    """What a fitted attack says of itself.

    Raises:
        BenchError: the states it was trained on do not cover those of the defence.
    """
    attack, report = attacks.fitted(attack_config, defense)
    knowledge = attacks.config.knowledge
    return AttackInfo(
        name=attack_config.name,
        options=attack.options.model_dump(mode="json"),
        knowledge=knowledge,
        saturated=report.saturated,
        states_covered=check_coverage(report, defense, knowledge),
        curve=list(report.curve),
        details=dict(report.details),
    )


#: What the lower end of the interval of a gain must exceed. Below this nobody would call one attack stronger than
#: another: published tables differ by ten times as much between two runs of one attack.
RECOVERY_TOLERANCE: Mapping[str, float] = {"ssim": 0.005, "cosine": 0.01}
LINKAGE_TOLERANCE: Mapping[str, float] = {"linkage": 0.005}

#: What the lower end of the interval of the difference to a floor must exceed, so that an attack counts as better: what
#: nobody would see in a picture (a quarter of a decibel, a hundredth of SSIM), nor call a likeness.
FLOOR_MARGINS: Mapping[str, float] = {"ssim": 0.01, "psnr_aligned": 0.25, "cosine": 0.02}
CHANCE_MARGINS: Mapping[str, float] = {"linkage": 0.01, "linkage_auc": 0.01}


def floor_test(gains: Mapping[str, Mapping[str, Measure]], margins: Mapping[str, float]) -> FloorTest:
    """Whether what an attack got is more than a trivial guess gets.

    It is where by one figure it is above every floor: the one that comes nearest decides.

    Args:
        gains: figure -> floor -> how much more leaks to the attack, paired over the victims; without a value where the
            figure cannot be measured.
        margins: figure -> what the lower end of that interval must exceed.
    """
    nearest, least = {}, {}
    for name, by_floor in gains.items():
        # Too few people for an interval decide nothing; what is the same in all of them needs none.
        known = {floor: gain for floor, gain in by_floor.items() if gain.ci95 or gain.reason == ALIKE}
        ends = {floor: end for floor, gain in known.items() if (end := _lower_end(gain)) is not None}
        if ends:
            nearest[name] = min(ends, key=ends.__getitem__)
            least[name] = ends[nearest[name]]
    return FloorTest(
        above=any(end > margins[name] for name, end in least.items()) if least else None,
        gains={name: gains[name][floor] for name, floor in nearest.items()},
        floors=nearest,
        margins={name: margins[name] for name in nearest},
    )


def chance_test(figures: Mapping[str, Measure]) -> FloorTest:
    """Whether linkage, figure -> value, is more than guessing gets (:attr:`bench.measures.Kind.guess`)."""

    def over(name: str, measure: Measure) -> Measure:
        guess = KINDS[name].guess
        if measure.value is None or guess is None:
            return measure
        low_high = None if measure.ci95 is None else (measure.ci95[0] - guess, measure.ci95[1] - guess)
        return measure.model_copy(update={"value": measure.value - guess, "ci95": low_high})

    return floor_test({name: {"guessing": over(name, measure)} for name, measure in figures.items()}, CHANCE_MARGINS)


def _lower_end(measure: Measure) -> float | None:
    """Of the interval; the value where there is none (every victim gains the same, or there is one victim)."""
    return measure.ci95[0] if measure.ci95 else measure.value


def strength_curve(
    attacks: AttackStages,
    attack_configs: Sequence[AttackConfig],
    points: Sequence[Point],
    leakage: Callable[[Point], Mapping[str, Measure]],
    gain: Callable[[str, Point, Point], Measure],
    tolerance: Mapping[str, float],
) -> StrengthCurve | None:
    """The curve through the budgets of an attack; None of a run without budgets.

    Args:
        attacks: knows the run, and the faces that a budget pays for.
        attack_configs: one per budget, rising.
        points: what the attack got at each budget.
        leakage: metric -> leakage at a point.
        gain: the paired difference by one metric from its third argument to its second, higher for more leakage.
        tolerance: metric -> as :data:`RECOVERY_TOLERANCE`; its metrics are those that decide.
    """
    if attacks.config.budget is None:
        return None
    budget = Budget.parse(attacks.config.budget)
    spent: Sequence[float] = budget.values
    if budget.axis == DATA:  # the number of faces, which whole identities make up
        spent = [float(len(attacks.public(attack_config))) for attack_config in attack_configs]
    before, last = spent[-2:]
    if last < DOUBLING * before:
        reason = f"the last two budgets, {before:g} and {last:g}, are less than a factor {DOUBLING:g} apart"
        gains = {name: Measure(value=None, direction="leakage", reason=reason) for name in tolerance}
    else:
        gains = {name: gain(name, points[-1], points[-2]) for name in tolerance}
    sure = {name: end for name, measure in gains.items() if (end := _lower_end(measure)) is not None}
    return StrengthCurve(
        axis=budget.axis,
        points=[StrengthPoint(budget=s, values=dict(leakage(point))) for s, point in zip(spent, points, strict=True)],
        gain_of_last_doubling=gains,
        tolerance=dict(tolerance),
        unsaturated=any(value > tolerance[name] for name, value in sure.items()) if sure else None,
    )
