"""What a sweep was asked for: its own settings, and the layers of settings from which each cell is resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from bench.errors import UsageError
from bench.plugins import explain
from bench.run.config import merge, nested, parse_assignments, read_environment, read_file

#: Setting of a sweep -> the setting of a run that it goes through.
AXES = {
    "defenses": "defense",
    "attacks": "attack",
    "knowledge": "knowledge",
    "queries": "queries",
    "seeds": "seed",
}


def _items(value: Any) -> Any:
    """``"a, b"`` as a list; anything else as it is, one value as a list of one."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
        if not all(value):
            raise ValueError("separate the values by single commas")
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


_LISTED = BeforeValidator(_items)
Names = Annotated[list[str], _LISTED, Field(min_length=1)]


class Variant(BaseModel):
    """A defence with options of its own, beside the same one under others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    defense: str
    options: dict[str, Any] = Field({}, description="As -o gives them.")
    weakened: bool = Field(False, description="With the options below these under which it hides next to nothing.")
    also: str = Field("", description="Attacks that are made for it, A,B, beside those of each entry of the sweep.")


class SweepOptions(BaseModel):
    """The settings of a sweep beside those of its runs: flags, or the table ``[sweep]`` of a config file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    defenses: Names = Field(description="Defences to test.", json_schema_extra={"metavar": "A,B,..."})
    attacks: Names = Field(description="Attacks to run against each.", json_schema_extra={"metavar": "X,Y,..."})
    knowledge: Annotated[list[Literal["blackbox", "whitebox", "oracle"]], _LISTED] = Field(
        ["whitebox"], min_length=1, description="What the adversary knows.", json_schema_extra={"metavar": "RUNG,..."}
    )
    queries: Annotated[list[Annotated[int, Field(ge=1)]], _LISTED] = Field(
        [1],
        min_length=1,
        description="Intercepted representations, or stolen templates, per victim image.",
        json_schema_extra={"metavar": "N,..."},
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], _LISTED] = Field(
        [0], min_length=1, description="Seeds.", json_schema_extra={"metavar": "N,..."}
    )
    engine: Literal["local", "ray"] = Field("local", description="This machine, or a Ray cluster (extra ray).")
    address: str | None = Field(
        None,
        description="The Ray cluster, auto or HOST:PORT; without it one is started here.",
        json_schema_extra={"metavar": "ADDRESS"},
    )
    jobs: int = Field(1, ge=1, description="Cells at the same time, each in a process of its own (local).")
    cpus_per_cell: int | None = Field(
        None, ge=1, description="Processor threads of a cell; else those of this machine are shared out (ray: 1)."
    )
    gpus_per_cell: float | None = Field(
        None, ge=0, description="Accelerators of a cell, also a part of one (ray); else one with --device cuda."
    )
    retries: int = Field(2, ge=0, description="New starts of a cell whose process or machine was lost.")
    variants: list[Variant] = Field(
        [],
        description="Further defences, each with options of its own: tables [[sweep.variants]] of a file.",
        json_schema_extra={"type": "object"},  # which has no flag
    )
    defense_options: dict[str, dict[str, Any]] = Field({}, description="By defence, options that only it gets.")
    attack_options: dict[str, dict[str, Any]] = Field({}, description="By attack, options that only it gets.")

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
    """A sweep as asked for: its own settings, and those of every run from below and from the command line.

    Options that only one defence or attack gets stand in a table of its name among ``defense_options`` and
    ``attack_options``.
    """

    options: SweepOptions
    below: Mapping[str, Any]
    flags: Mapping[str, Any]


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

    Flags come by the names of :class:`SweepOptions` (``sweep``) and :class:`bench.run.config.RunConfig` (``flags``),
    absent ones left out, and options as ``KEY=VALUE`` for all, ``NAME.KEY=VALUE`` for one defence or attack.

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
    given = {
        "defense_options": nested(parse_assignments(defense_options or [], "-o"), "-o"),
        "attack_options": nested(parse_assignments(attack_options or [], "-a"), "-a"),
    }
    return SweepRequest(options, below=merge(settings, variables), flags=merge(flags, given))


def addressed(options: Mapping[str, Any], name: str, names: Sequence[str]) -> dict[str, Any]:
    """Of options for all ``names``, and in tables for one of them, those for ``name``.

    What stands before the first dot of ``-o`` or ``-a`` is a name if it is one of the sweep's; else it is part of the
    option. A ``name`` of several attacks (``"linear,unet"``), or a chain of defences (``"blur+quantise"``), keeps the
    tables of its parts.
    """
    parts = _parts(name)
    known = {part for other in names for part in _parts(other)}
    tables = {key: value for key, value in options.items() if key in known and isinstance(value, Mapping)}
    kept = {key: value for key, value in options.items() if key not in tables or key in parts}
    return merge(kept, kept.pop(name.replace("-", "_"), {})) if len(parts) == 1 else kept


def _parts(name: str) -> list[str]:
    """The attacks or defences that a name is made of, as they stand before the dot of an option."""
    return re.split(r"\s*[,+]\s*", name.replace("-", "_").strip())
