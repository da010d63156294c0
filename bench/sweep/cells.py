"""The cells of a sweep: every combination resolved, and refused before any compute where it cannot be run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from bench import plugins
from bench.attempt import Attempt
from bench.composite import members
from bench.config import RunConfig, merge, resolve
from bench.errors import UsageError
from bench.pipeline import Pipeline
from bench.store import run_id
from bench.sweep.options import SweepRequest
from bench.sweep.state import CellState


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination.

    Attributes:
        config: of its run.
        refusal: why it cannot be run, or None.
    """

    config: RunConfig
    refusal: str | None = None

    @property
    def run_id(self) -> str:
        """Name of its run directory."""
        return run_id(self.config)

    @property
    def group(self) -> tuple[str, str, int]:
        """Cells of one group need the same recogniser: the first of them trains it."""
        config = self.config
        return config.defense, str(sorted(config.defense_options.items())), config.seed

    def state(self) -> CellState:
        """Its state before anything was run."""
        config = self.config
        return CellState(
            defense=config.defense,
            attack=config.attack,
            knowledge=config.knowledge,
            seed=config.seed,
            defense_options=config.defense_options,
            attack_options=config.attack_options,
            run_id=self.run_id,
            status="refused" if self.refusal else "pending",
            error=self.refusal,
        )


def expand(request: SweepRequest) -> list[RunConfig]:
    """The configuration of every combination, each once; those that share recognisers stand together.

    Raises:
        UsageError: an unknown key or an invalid value.
    """
    options = request.options
    grid = itertools.product(options.seeds, options.defenses, options.attacks, options.knowledge)
    configs: dict[str, RunConfig] = {}
    for seed, defense, attack, knowledge in grid:
        names = {"defense_options": defense, "attack_options": attack}
        in_file = {kind: getattr(options, kind).get(name, {}) for kind, name in names.items()}
        own = {kind: request.own.get(kind, {}).get(name, {}) for kind, name in names.items()}
        axes = {"defense": defense, "attack": attack, "knowledge": knowledge, "seed": seed}
        config = resolve(merge(request.below, in_file, request.flags, own, axes), {})
        configs.setdefault(run_id(config), config)
    return list(configs.values())


def check(configs: Sequence[RunConfig], *, here: bool = True) -> list[Cell]:
    """Find out what cannot be run, without any compute.

    A mistake (an unknown name, an invalid option) refuses the sweep; a pair that does not go together is a refused
    cell.

    Args:
        configs: the cells.
        here: whether they run on this machine; if not, only those machines can tell whether they have the device.

    Raises:
        UsageError: a mistake, or no cell that can be run.
        MissingError: a file that is not there.
    """
    for config in configs:
        plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
        members(Attempt(config.attack, config.preset, config.attack_options))
    cells = [Cell(config, _refusal(config, here)) for config in configs]
    if all(cell.refusal for cell in cells):
        of_all = f"none of the {len(cells)} cells can be run: " if len(cells) > 1 else ""
        raise UsageError(f"{of_all}{cells[0].refusal}")
    return cells


def _refusal(config: RunConfig, here: bool) -> str | None:
    if not here:
        training = config.training.model_copy(update={"precision": "auto"})
        config = config.model_copy(update={"device": "cpu", "training": training})
    try:
        Pipeline(config, console=Console(quiet=True))
    except UsageError as error:
        return str(error)
    return None
