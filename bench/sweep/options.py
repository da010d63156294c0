"""What a sweep was asked for: its own settings, and the layers of settings from which each cell is resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from bench.errors import UsageError
from bench.plugins import explain
from bench.run.config import merge, nested, parse_assignments, read_environment, read_file

#: Setting of a sweep -> the setting of a run that it goes through.
AXES = {"defenses": "defense", "attacks": "attack", "knowledge": "knowledge", "seeds": "seed"}


def _items(value: Any) -> Any:
    """``"a, b"`` as a list; anything else as it is, one value as a list of one."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
        if not all(value):
            raise ValueError("separate the values by single commas")
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


_OneOrMore = Field(min_length=1)
Names = Annotated[list[str], BeforeValidator(_items), _OneOrMore]


class SweepOptions(BaseModel):
    """The settings of a sweep beside those of its runs: flags, or the table ``[sweep]`` of a config file.

    Attributes:
        defenses, attacks, knowledge, seeds: the axes of the grid; lists, or text with commas.
        engine: ``local`` (this process, or a pool of processes) or ``ray``.
        address: of a Ray cluster (``auto``: the one that this machine belongs to); None starts one here.
        jobs: processes of the local engine that run cells at the same time; 1 runs them all in this process.
        cpus_per_cell: processor threads of a cell; None shares those of this machine out (Ray: 1).
        gpus_per_cell: accelerators that Ray gives to a cell, also parts of one; None gives it one under
            ``--device cuda`` and none else.
        retries: how often a cell is started again after its process or machine was lost.
        defense_options, attack_options: by defence or attack, options that only it gets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    defenses: Names
    attacks: Names
    knowledge: Annotated[list[Literal["blackbox", "whitebox", "oracle"]], BeforeValidator(_items), _OneOrMore] = [
        "whitebox"
    ]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(_items), _OneOrMore] = [0]
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    jobs: PositiveInt = 1
    cpus_per_cell: PositiveInt | None = None
    gpus_per_cell: NonNegativeFloat | None = None
    retries: NonNegativeInt = 2
    defense_options: dict[str, dict[str, Any]] = {}
    attack_options: dict[str, dict[str, Any]] = {}

    @field_validator("gpus_per_cell")
    @classmethod
    def _part_or_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("more than one accelerator must be a whole number")
        return gpus

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.engine == "local" and (self.address is not None or self.gpus_per_cell is not None):
            raise ValueError("address and gpus_per_cell need --engine ray")
        if self.engine == "ray" and self.jobs != 1:
            raise ValueError("jobs is for --engine local: Ray runs as many cells as cpus_per_cell leaves room for")
        for kind, options, swept in (
            ("defence", self.defense_options, self.defenses),
            ("attack", self.attack_options, self.attacks),
        ):
            for name in options:
                if name not in swept:
                    raise ValueError(f"options for the {kind} {name!r}, which is not in the sweep ({', '.join(swept)})")
        return self


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """A sweep as asked for.

    Attributes:
        options: the sweep's own settings.
        below: settings of every run, from the environment and the config file.
        flags: settings of every run from the command line.
        own: ``defense_options`` and ``attack_options`` by name from the command line: they win over ``flags``, and
            those over the table in the file.
    """

    options: SweepOptions
    below: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)


def read_request(
    sweep: Mapping[str, Any],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None = None,
    *,
    defense_options: list[str] | None = None,
    attack_options: list[str] | None = None,
) -> SweepRequest:
    """A sweep from all its layers: flag > ``BENCH_*`` > config file (table ``[sweep]``, then the rest) > default.

    Args:
        sweep: flags with the names of :class:`SweepOptions`; absent ones left out.
        flags: flags with the names of :class:`bench.run.config.RunConfig`; absent ones left out.
        environment: usually ``os.environ``.
        file: a TOML file.
        defense_options, attack_options: ``KEY=VALUE`` for all, ``NAME.KEY=VALUE`` for one defence or attack.

    Raises:
        UsageError: an unknown key or an invalid value, in one line.
    """
    settings = read_file(file) if file else {}
    table = settings.pop("sweep", {})
    if not isinstance(table, Mapping):
        raise UsageError(f"config file {file}: sweep must be a table: [sweep]")
    variables = read_environment(environment)
    asked = {**table, **sweep}
    for axis, single in AXES.items():
        layers = (sweep.get(axis), variables.get(single), table.get(axis), settings.get(single))
        asked[axis] = next((value for value in layers if value is not None), None)
    if asked["defenses"] is None or asked["attacks"] is None:
        raise UsageError("a sweep needs --defenses and --attacks (bench list defenses, bench list attacks)")
    try:
        options = SweepOptions.model_validate({key: value for key, value in asked.items() if value is not None})
    except ValidationError as error:
        raise UsageError(explain(error, "sweep")) from None
    of_all_defenses, of_defenses = _addressed(defense_options or [], "-o", options.defenses)
    of_all_attacks, of_attacks = _addressed(attack_options or [], "-a", options.attacks)
    return SweepRequest(
        options,
        below=merge(settings, variables),
        flags=merge(flags, {"defense_options": of_all_defenses, "attack_options": of_all_attacks}),
        own={"defense_options": of_defenses, "attack_options": of_attacks},
    )


def _addressed(
    assignments: list[str], flag: str, names: list[str]
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Options for all of ``names``, and by name those for one of them.

    What stands before the first dot is a name if it is one of the sweep; else it is part of the option.
    """
    by_key = {name.replace("-", "_"): name for name in names}
    everyone: dict[str, Any] = {}
    own: dict[str, Mapping[str, Any]] = {}
    for key, value in nested(parse_assignments(assignments, flag), flag).items():
        if key in by_key and isinstance(value, Mapping):
            own[by_key[key]] = value
        else:
            everyone[key] = value
    return everyone, own
