"""The pointwise worst case over several attacks: a face is as safe as under the one that did best on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from pydantic import Field, model_validator

from attacks.base import Adversary, AttackOptions, CompositeAttack


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

    def prepare(self, adversary: Adversary) -> NoReturn:
        """Not how it works.

        Raises:
            TypeError: always: its members are prepared, one by one.
        """
        raise TypeError("a composite attack is not prepared: prepare its members")
