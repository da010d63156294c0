"""One run, from its configuration to its archive. The package can be called: ``bench.run("none", "unet")``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.results import RunResult


class Package(ModuleType):
    """A package and a function: the import of any of its modules binds the package's name in :mod:`bench`."""

    def __call__(
        self,
        defense: str | None = None,
        attack: str | None = None,
        *,
        config: str | Path | None = None,
        **settings: Any,
    ) -> RunResult:
        """Do what ``bench run`` does: compute or take up a run, write its folder, and return its result.

        Args:
            defense, attack: names; settings as the others.
            config: a TOML file with settings.
            settings: fields of :class:`bench.run.config.RunConfig`; what is not given comes from the ``BENCH_*``
                variables, the file, the preset and the defaults, in this order.

        Raises:
            BenchError: as ``bench run``, with the same message.
        """
        from rich.console import Console

        from bench.errors import UsageError
        from bench.run.config import resolve

        named = {"defense": defense, "attack": attack}
        given = settings | {name: value for name, value in named.items() if value is not None}
        resolved = resolve(given, os.environ, None if config is None else Path(config))

        from bench.run.pipeline import Pipeline  # imports torch: a mistake is told at once

        pipeline = Pipeline(resolved, console=Console(stderr=True))
        if pipeline.launch.size > 1:
            raise UsageError("bench.run is one process: several train together with torchrun -m bench run")
        return pipeline.run()


sys.modules[__name__].__class__ = Package
