"""The cells of a sweep: every combination resolved, and refused before any compute where it cannot be run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field
from rich.console import Console

from bench import plugins
from bench.errors import NotApplicableError, UsageError
from bench.measures import Measure, ResultModel, leak
from bench.results import RunResult
from bench.run.attack_config import attack_configs
from bench.run.config import RunConfig, merge, resolve
from bench.run.pipeline import Pipeline
from bench.run.store import run_id
from bench.sweep.options import SweepRequest, Variant, addressed

SCHEMA_VERSION = "1"

Status = Literal["pending", "running", "success", "failed", "refused", "not applicable"]


class KeyFigure(ResultModel):
    """A figure, what the best guess without an attack scores, and the same figure of unprotected faces."""

    value: Measure
    floor: Measure | None = None
    ceiling: Measure | None = None


class CellState(ResultModel):
    """One cell of a sweep, as it is written down.

    ``refused`` cells cannot be run as they were asked for, ``not applicable`` ones not at all: the attack cannot work
    on the defence. ``error`` says why, or why a cell failed, or how it lost its worker before it is started again.
    """

    defense: str
    attack: str
    knowledge: str
    queries: int = 1
    seed: int
    defense_options: dict[str, Any] = Field({})
    attack_options: dict[str, Any] = Field({})
    run_id: str = Field(description="Name of its run directory; two cells with the same one are the same cell.")
    directory: str | None = Field(None, description="The run directory, once the cell has been started.")
    left_out: dict[str, str] = Field({}, description="Attack of several -> why it cannot work on the defence.")
    status: Status = "pending"
    attempts: int = Field(0, ge=0, description="How often it was started, in all calls of the sweep.")
    seconds: float | None = Field(None, description="Of the last start.")
    error: str | None = Field(None, description="In one line.")
    unsaturated: bool = Field(False, description="The attack would have gained from more training: lower bounds.")
    no_better: bool = Field(False, description="An attack of it is no better than a floor.")
    figures: dict[str, KeyFigure] = Field({})
    warnings: list[str] = Field([])

    @property
    def name(self) -> str:
        """The cell in words."""
        several = f", k = {self.queries}" if self.queries > 1 else ""
        return f"{self.attack} ({self.knowledge}{several}) on {self.defense}, seed {self.seed}"

    def changed(self, **changes: Any) -> Self:
        """This state with some fields replaced."""
        return self.model_copy(update=changes)


class SweepState(ResultModel):
    """All cells of a sweep, in the order in which they are run."""

    schema_: str = Field(SCHEMA_VERSION, alias="schema")
    sweep: str
    directory: str
    cells: list[CellState]

    def count(self, *statuses: Status) -> int:
        """How many cells are in one of ``statuses``."""
        return sum(cell.status in statuses for cell in self.cells)

    def to_json(self) -> str:
        """The document as stored and printed."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def measured(result: RunResult) -> dict[str, Any]:
    """What a cell's state takes over from the result of its run."""
    return {
        "figures": key_figures(result),
        "warnings": result.warnings,
        "unsaturated": any(part.attack.saturated is False for part in result.attack_results.values()),
        "no_better": any(part.attack.above_floor is False for part in result.attack_results.values()),
    }


def key_figures(result: RunResult) -> dict[str, KeyFigure]:
    """Recognition behind the defence and the leading figures of what leaks; those that were measured.

    Names are those of :data:`bench.measures.KINDS`. Chance is the floor of the linkage accuracy and has no measure.
    """
    figures = {}
    if (utility := result.utility) is not None:
        figures["accuracy"] = KeyFigure(value=utility.accuracy, ceiling=utility.unprotected.accuracy)
    if (recovery := result.recovery or result.worst_case) is not None:
        for name in ("ssim", "type1_tar"):
            floors = [quality.figure(name) for quality in recovery.floors.values()]
            figures[name] = KeyFigure(
                value=recovery.figure(name),
                floor=max(floors, key=functools.partial(leak, name), default=None),
                ceiling=recovery.ceiling.figure(name),
            )
    linkages = [part.linkage for part in result.attack_results.values() if part.linkage is not None]
    if linkages:
        linkage = max(linkages, key=lambda linked: leak("linkage", linked.protected_plain.accuracy))
        figures["linkage"] = KeyFigure(value=linkage.protected_plain.accuracy, ceiling=linkage.plain.accuracy)
    return {
        name: figure for name, figure in figures.items() if figure.value is not None and figure.value.value is not None
    }


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: the configuration of its run, why it cannot be run, or None, and what of it is left out."""

    config: RunConfig
    refusal: UsageError | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """Name of its run directory."""
        return run_id(self.config)

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return self.config.out / self.run_id

    @property
    def group(self) -> tuple[str, str, int]:
        """Cells of one group need the same recogniser: the first of them trains it."""
        config = self.config
        return config.defense, str(sorted(config.defense_options.items())), config.seed

    def state(self) -> CellState:
        """Its state before anything was run."""
        asked = ("defense", "attack", "knowledge", "queries", "seed", "defense_options", "attack_options")
        given = {name: getattr(self.config, name) for name in asked}
        state = CellState(run_id=self.run_id, left_out=dict(self.left_out), **given)
        if self.refusal is None:
            return state
        never = isinstance(self.refusal, NotApplicableError)
        return state.changed(status="not applicable" if never else "refused", error=str(self.refusal))


def expand(request: SweepRequest) -> list[RunConfig]:
    """The configuration of every combination, each once; those that share recognisers stand together.

    Raises:
        UsageError: an unknown key or an invalid value.
    """
    options = request.options
    configs: dict[str, RunConfig] = {}
    plain = [Variant(defense=name, options=options.defense_options.get(name, {})) for name in options.defenses]
    swept = [*plain, *options.variants]
    names = [variant.defense for variant in swept]
    product = itertools.product(options.seeds, swept, options.attacks, options.knowledge, options.queries)
    for seed, variant, attack, knowledge, queries in product:
        weakened = plugins.defenses().get(variant.defense).weakened if variant.weakened else {}
        own = merge(weakened, variant.options)
        tables = {"defense_options": own, "attack_options": options.attack_options.get(attack, {})}
        attack = f"{attack},{variant.also}" if variant.also else attack
        axes = {"defense": variant.defense, "attack": attack, "knowledge": knowledge, "queries": queries, "seed": seed}
        settings = merge(request.below, tables, request.flags, axes)
        settings["defense_options"] = addressed(settings["defense_options"], variant.defense, names)
        settings["attack_options"] = addressed(settings["attack_options"], attack, options.attacks)
        config = resolve(settings, {})
        configs.setdefault(run_id(config), config)
    return list(configs.values())


def check(configs: Sequence[RunConfig], *, here: bool = True) -> list[Cell]:
    """Find out what cannot be run, without any compute.

    A mistake (an unknown name, an invalid option) refuses the sweep; a pair that does not go together is a cell that
    is not run. Of several attacks of a cell those that cannot work on its defence are left out, as long as one is
    left. Where cells do not run ``here``, only their machines can tell whether they have the device.

    Raises:
        UsageError: a mistake, or no cell that can be run.
        MissingError: a file that is not there.
    """
    for config in configs:
        plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
        # A budget that an attack cannot be given is no mistake: that cell is refused.
        for attack in attack_configs(config.model_copy(update={"budget": None})).values():
            attack[-1].make()
    found = [_cell(config, here) for config in configs]
    cells = list({cell.run_id: cell for cell in reversed(found)}.values())[::-1]
    if all(cell.refusal for cell in cells):
        of_all = f"none of the {len(cells)} cells can be run: " if len(cells) > 1 else ""
        raise UsageError(f"{of_all}{cells[0].refusal}")
    return cells


def _cell(config: RunConfig, here: bool) -> Cell:
    left_out: dict[str, str] = {}
    while isinstance(refusal := _refusal(config, here), NotApplicableError) and "," in config.attack:
        kept = [name for name in map(str.strip, config.attack.split(",")) if name != refusal.attack]
        left_out[refusal.attack] = str(refusal)
        config = config.model_copy(update={"attack": ",".join(kept), "attack_options": _options_for(kept, config)})
    return Cell(config, refusal, left_out)


def _options_for(attacks: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """The attack options that concern one of ``attacks``."""
    fields = {name.replace("-", "_"): plugins.attacks().get(name).Options.model_fields for name in attacks}
    tables = {name.replace("-", "_") for name in plugins.attacks()}

    def concerns(key: str) -> bool:
        return key in fields if key in tables else any(key in known for known in fields.values())

    return {key: value for key, value in config.attack_options.items() if concerns(key)}


def _refusal(config: RunConfig, here: bool) -> UsageError | None:
    if not here:
        training = config.training.model_copy(update={"precision": "auto"})
        config = config.model_copy(update={"device": "cpu", "training": training})
    try:
        Pipeline(config, console=Console(quiet=True))
    except UsageError as error:
        return error
    return None
