"""What torchrun says about this process. Imports nothing heavy: the command line asks before it imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bench.errors import UsageError


@dataclass(frozen=True, slots=True)
class Launch:
    """One of the processes that torchrun started, or the only one.

    Attributes:
        rank, size: number of this process, from 0, and how many there are on all machines.
        local_rank, local_size: the same on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """From the environment; without torchrun's, a single process.

        Raises:
            UsageError: torchrun's variables are incomplete, or machines have different numbers of processes.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            launch = cls(*(int(environment[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"torchrun's environment is incomplete ({error}): start with torchrun, or without it"
            ) from None
        if launch.size % launch.local_size:
            raise UsageError(
                f"{launch.size} processes do not divide into machines of {launch.local_size}: give every machine the "
                "same --nproc-per-node"
            )
        return launch

    @property
    def leads(self) -> bool:
        """Whether this process is the one that runs everything, prints and writes; the others help it to train."""
        return self.rank == 0
