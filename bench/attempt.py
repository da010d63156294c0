"""One attack as a run carries it out: its options, and how much of what an attacker can spend it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attacks.base import Attack
from bench import plugins
from bench.budget import DATA, INTERCEPTIONS, Budget
from bench.config import RunConfig
from bench.errors import UsageError


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attack with its options and budget.

    Attributes:
        name: the attack's.
        preset: the layer of defaults below ``options``.
        options: as asked for; not validated.
        public: how many of the public faces it learns from: a share up to 1, or a number above 1.
        interceptions: representations intercepted of each victim image, k.
    """

    name: str
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    public: float = 1.0
    interceptions: int = 1

    def make(self) -> Attack:
        """The attack, not fitted.

        Raises:
            UsageError: unknown name, or options that are unknown or invalid.
        """
        return plugins.make_attack(self.name, dict(self.options), self.preset)

    def spending(self, axis: str, value: float) -> Attempt:
        """This attempt with the budget ``value`` on ``axis``.

        Raises:
            UsageError: the attack has no such axis; the message lists those it has.
        """
        if axis == DATA:
            return replace(self, public=value)
        if axis == INTERCEPTIONS:
            return replace(self, interceptions=int(value))
        budgets = plugins.attacks().get(self.name).budgets
        if axis not in budgets:
            raise UsageError(
                f"--budget: {self.name} has no axis {axis!r} (axes: {', '.join((DATA, INTERCEPTIONS, *budgets))})"
            )
        if budgets[axis] in self.options:
            raise UsageError(f"--budget {axis} and -a {budgets[axis]} both set {budgets[axis]} of {self.name}")
        return replace(self, options={**self.options, budgets[axis]: int(value)})


def attempts(config: RunConfig) -> list[Attempt]:
    """The attempts of a run: one per budget, in rising order, the last of which is the run's own.

    Raises:
        UsageError: a budget that the attack cannot be given, or that contradicts another setting.
    """
    own = Attempt(config.attack, config.preset, config.attack_options, interceptions=config.queries)
    if config.budget is None:
        return [own]
    budget = Budget.parse(config.budget)
    if budget.axis == INTERCEPTIONS and config.queries not in (1, budget.values[-1]):
        raise UsageError(f"--queries {config.queries} is not the largest budget of --budget {config.budget}")
    return [own.spending(budget.axis, value) for value in budget.values]
