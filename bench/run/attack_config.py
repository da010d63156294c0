"""One attack as a run carries it out: its options, and how much of what an attacker can spend it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from pydantic import Field, model_validator

from attacks.base import GRANTS, Adversary, Attack, AttackOptions, CompositeAttack, FitReport, Knowledge, RecoveryAttack
from bench import plugins
from bench.errors import BenchError, UsageError
from bench.files import sha256
from bench.run.config import DATA, INTERCEPTIONS, Budget, RunConfig
from defenses.base import Defense


class CompositeOptions(AttackOptions):
    """Options of :class:`Composite`.

    Attributes:
        attacks: names of at least two recovery attacks; ``"linear,unet"`` on the command line.
        options: attack -> options of it. Any other key that names one of the attacks is put here, so that
            ``-a linear.rank=200`` (``{"linear": {"rank": 200}}`` in a configuration) is an option of ``linear``.
    """

    attacks: tuple[str, ...] = Field(min_length=2)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _sort_out_members(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        attacks = values.get("attacks")
        if isinstance(attacks, str):
            attacks = [name for part in attacks.split(",") if (name := part.strip())]
        if not isinstance(attacks, list | tuple) or not all(isinstance(name, str) for name in attacks):
            return values
        # Keys of the command line come with underscores, names of attacks have dashes.
        names = {name.replace("-", "_"): name for name in attacks}
        own = {key: value for key, value in values.items() if key.replace("-", "_") not in names}
        options = dict(values.get("options", {}))
        for key, value in values.items():
            if key in own:
                continue
            name = names[key.replace("-", "_")]
            if not isinstance(value, Mapping):
                raise ValueError(f"{key} is one of the attacks: set an option of it, {key}.OPTION=VALUE")
            options[name] = {**options.get(name, {}), **value}
        return {**own, "attacks": tuple(attacks), "options": options}

    @model_validator(mode="after")
    def _are_different_attacks(self) -> CompositeOptions:
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError("an attack is named twice")
        strangers = sorted(set(self.options) - set(self.attacks))
        if strangers:
            raise ValueError(f"options are given for {', '.join(strangers)}, not one of the attacks")
        return self


class Composite(CompositeAttack):
    """Runs several recovery attacks and reports, per victim and measure, the one from which most leaks.

    The suite fits and runs every member as if it were alone, so it needs of an adversary what its members need
    together. Averages over attacks would hide that different victims fall to different ones (per-example evaluation in
    Carlini et al., On Evaluating Adversarial Robustness, arXiv 1902.06705).
    """

    name: ClassVar[str] = "composite"
    summary: ClassVar[str] = "per victim the worst of several recovery attacks: -a attacks=A,B [-a A.OPTION=VALUE]"
    cost: ClassVar[str] = "that of all its attacks; those that ran before are not run again"
    reference: ClassVar[str] = "On Evaluating Adversarial Robustness (per-example worst case), arXiv 1902.06705"
    Options: ClassVar[type[AttackOptions]] = CompositeOptions
    options: CompositeOptions

    def members(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Names of the attacks in the order given, and the options asked for each."""
        return tuple((name, dict(self.options.options.get(name, {}))) for name in self.options.attacks)

    def fit(self, adversary: Adversary) -> NoReturn:
        """Not how it works.

        Raises:
            TypeError: always: its members are fitted, one by one.
        """
        raise TypeError("a composite attack is not fitted: fit its members")

    def build(self, adversary: Adversary) -> NoReturn:
        """Not how it works.

        Raises:
            TypeError: always: its members are prepared, one by one.
        """
        raise TypeError("a composite attack is not prepared: prepare its members")


@dataclass(frozen=True, slots=True)
class AttackConfig:
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

    def spending(self, axis: str, value: float) -> AttackConfig:
        """This attack_config with the budget ``value`` on ``axis``.

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


def attack_configs(config: RunConfig) -> list[AttackConfig]:
    """The attack_configs of a run: one per budget, in rising order, the last of which is the run's own.

    Raises:
        UsageError: a budget that the attack cannot be given, or that contradicts another setting.
    """
    own = AttackConfig(config.attack, config.preset, config.attack_options, interceptions=config.queries)
    if config.budget is None:
        return [own]
    budget = Budget.parse(config.budget)
    if budget.axis == INTERCEPTIONS and config.queries not in (1, budget.values[-1]):
        raise UsageError(f"--queries {config.queries} is not the largest budget of --budget {config.budget}")
    return [own.spending(budget.axis, value) for value in budget.values]


def check_needs(attack: Attack | type[Attack], knowledge: str) -> None:
    """Refuse an attack that needs what the chosen rung does not grant.

    Raises:
        UsageError: naming what is missing and the rungs that would do.
    """
    missing = attack.needs - GRANTS[Knowledge(knowledge)]
    if missing:
        enough = ", ".join(rung for rung, grants in GRANTS.items() if attack.needs <= grants)
        raise UsageError(
            f"attack {attack.name} needs {', '.join(sorted(missing))}, which --knowledge {knowledge} does not grant: "
            f"use --knowledge {enough or 'of another attack'}"
        )


def check_evaluator(attack: Attack, evaluator: Path | None) -> None:
    """Refuse an attack that was given the file of the recogniser which is to judge it, under whatever name.

    Raises:
        UsageError: naming the option.
    """
    if evaluator is None or not evaluator.is_file():
        return
    for option, value in attack.options:
        if isinstance(value, Path) and value.is_file() and sha256(value) == sha256(evaluator):
            raise UsageError(
                f"-a {option}={value} is the evaluator: the recogniser that judges leakage may not be one that the "
                f"attack has used; give the attack, or --evaluator, another one"
            )


def check_coverage(report: FitReport, defense: Defense, knowledge: str) -> bool | None:
    """Whether the states that the attack was trained on cover what the defence emits.

    None where there are no states to cover, or where the attacker guesses the secret: the states of a
    guessed table are not those of the real one.

    Raises:
        BenchError: they do not: the number would be that of an attacker who was mis-driven.
    """
    states = defense.states()
    if states is None or report.states_seen is None or knowledge == Knowledge.BLACKBOX:
        return None
    seen = {tuple(state) for state in report.states_seen.tolist()}
    unseen = [tuple(state) for state in states.tolist() if tuple(state) not in seen]
    if unseen:
        raise BenchError(
            f"the attack was trained on {len(seen)} of the {len(states)} states that {defense.name} emits "
            f"(never on {unseen[0]}): train it longer, its figure would be too kind to the defence"
        )
    return True


def members(attack_config: AttackConfig) -> dict[str, AttackConfig]:
    """By name, what ``attack_config`` consists of: of a composite attack one per member, else itself alone.

    A member has the preset, the public faces and the interceptions of the whole.

    Raises:
        UsageError: unknown names, unknown or invalid options, or a member that recovers no faces.
    """
    attack = attack_config.make()
    if not isinstance(attack, CompositeAttack):
        return {attack_config.name: attack_config}
    found = {name: replace(attack_config, name=name, options=options) for name, options in attack.members()}
    for name, member in found.items():
        if not isinstance(member.make(), RecoveryAttack):
            raise UsageError(
                f"-a of {attack_config.name}: {name} is no recovery attack, it cannot be compared face by face"
            )
    return found


def check_attack_config(attack_config: AttackConfig, knowledge: str, evaluator: Path | None = None) -> None:
    """Refuse an attack_config of which any part asks for what is not there, or for the file that is to judge it.

    Raises:
        UsageError: as :func:`members`, :func:`check_needs` and :func:`check_evaluator`.
    """
    for member in members(attack_config).values():
        attack = member.make()
        check_needs(attack, knowledge)
        check_evaluator(attack, evaluator)
