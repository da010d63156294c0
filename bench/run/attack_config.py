"""One attack as a run carries it out: its options, and how much of what an attacker can spend it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attacks.base import GRANTS, Attack, FitReport, Knowledge
from bench import plugins
from bench.errors import BenchError, MissingError, NotApplicableError, UsageError
from bench.nets.brought import digest_of
from bench.run.config import DATA, INTERCEPTIONS, Budget, RunConfig
from defenses.base import Defense


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
        """This configuration with the budget ``value`` on ``axis``.

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


def attack_configs(config: RunConfig) -> dict[str, list[AttackConfig]]:
    """By its name, each attack of a run: a configuration per budget, in rising order; the last is the run's own.

    Raises:
        UsageError: no attack, one that is named twice, options that belong to none, a budget that an attack cannot be
            given, or one that contradicts another setting.
    """
    names = [name.strip() for name in config.attack.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--attack {config.attack}: name each attack once, separated by commas")
    budget = None if config.budget is None else Budget.parse(config.budget)
    if budget and budget.axis == INTERCEPTIONS and config.queries not in (1, budget.values[-1]):
        raise UsageError(f"--queries {config.queries} is not the largest budget of --budget {config.budget}")
    configs = {}
    for name, options in _options_of(names, config.attack_options).items():
        whole = AttackConfig(name, config.preset, options, interceptions=config.queries)
        configs[name] = [whole.spending(budget.axis, value) for value in budget.values] if budget else [whole]
    return configs


def _options_of(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each attack: ``unet.images`` is for ``unet``, ``images`` for every attack that has such an option.

    Raises:
        UsageError: an option that none of several attacks has.
    """
    by_key = {name.replace("-", "_"): name for name in names}
    general: dict[str, dict[str, Any]] = {name: {} for name in names}
    specific: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in given.items():
        if (name := by_key.get(key.replace("-", "_"))) is not None:
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"-a {key}={value}: {name} is one of the attacks, set an option of it: {key}.OPTION=VALUE"
                )
            specific[name] |= value
            continue
        # One attack alone says itself which options it has.
        alone = len(names) == 1
        takers = [name for name in names if alone or key in plugins.attacks().get(name).Options.model_fields]
        if not takers:
            raise UsageError(f"-a {key}: none of {', '.join(names)} has such an option (bench list attack NAME)")
        for name in takers:
            general[name][key] = value
    return {name: general[name] | specific[name] for name in names}


#: Share of public faces whose state an attack has to read right, for its figure to be about all states.
STATES_READ = 0.9


def check_coverage(report: FitReport, defense: Defense, knowledge: str) -> bool | None:
    """Whether the states that the attack was trained on cover what the defence emits.

    None where there are no states to cover, or where the attacker guesses the secret: the states of a
    guessed table are not those of the real one. False where the attack hinges on reading states and misreads more than
    1 - :data:`STATES_READ` of those of public faces.

    Raises:
        BenchError: they do not: the number would be that of an attacker who was mis-driven.
    """
    states = defense.states()
    if report.states_read is not None and report.states_read < STATES_READ:
        return False
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


def option_files(attack: Attack) -> dict[str, str]:
    """Option -> digest of the file that it names (:func:`bench.nets.brought.digest_of`), where it is there.

    Of an attack that is made of others theirs, too, as ``NAME.OPTION``.

    Raises:
        MissingError: an ONNX file keeps weights in one that is not there.
    """
    digests = {}
    try:
        for member in attack.members:
            for option, value in member.options:
                if isinstance(value, Path) and value.is_file():
                    digests[option if member is attack else f"{member.name}.{option}"] = digest_of(value)
    except ValueError as error:
        raise MissingError(f"attack {attack.name}: {error}") from error
    return digests


def check_attack(
    attack: Attack,
    defense: Defense,
    knowledge: str,
    evaluators: Sequence[Path] = (),
    teacher: Path | None = None,
    recogniser: Path | None = None,
    plain_recogniser: Path | None = None,
) -> None:
    """Refuse, before any compute, an attack that cannot work, or that was given another role's recogniser.

    Raises:
        UsageError: it needs what the rung ``knowledge`` does not grant (the message names the rungs that would do), or
            an option of it is one of the ``evaluators``, or the provider's ``teacher`` or one of its recognisers,
            under whatever name.
        MissingError: a file keeps weights in another that is not there.
        NotApplicableError: the attack says that it cannot work on this defence.
    """
    if missing := attack.needs - GRANTS[Knowledge(knowledge)]:
        enough = ", ".join(rung for rung, grants in GRANTS.items() if attack.needs <= grants)
        raise UsageError(
            f"attack {attack.name} needs {', '.join(sorted(missing))}, which --knowledge {knowledge} does not grant: "
            f"use --knowledge {enough or 'of another attack'}"
        )
    taken = {digest_of(file): (file, "evaluator") for file in evaluators if file.is_file()}
    brought = (("teacher", teacher), ("recogniser", recogniser), ("plain-recogniser", plain_recogniser))
    taken |= {digest_of(file): (file, role) for role, file in brought if file is not None}
    why = {
        "evaluator": "that judges leakage",
        "teacher": "that the provider's is trained by",
        "recogniser": "that is the provider's",
        "plain-recogniser": "that is the provider's",
    }
    for option, digest in option_files(attack).items():
        if digest in taken:
            file, role = taken[digest]
            raise UsageError(
                f"-a {option}={getattr(attack.options, option, '...')} is the {role} {file.name}: the recogniser "
                f"{why[role]} may not be one that the attack has used; give the attack, or --{role}, another"
            )
    if (reason := attack.inapplicable(defense)) is not None:
        message = f"attack {attack.name} does not apply to defence {defense.name}: {reason}"
        raise NotApplicableError(message, attack.name)
