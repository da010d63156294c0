"""Runners that take the place of the pipeline in sweeps: quick, and with every way to end. Workers import them."""

import os
import shutil
import signal
import time
from pathlib import Path

from rich.console import Console

from bench.errors import BenchError
from bench.results import RunResult, read_result
from bench.run.store import run_id
from bench.sweep.options import read_request

QUIET = Console(quiet=True)


def grid(out, **changes):
    """The request of a small sweep; ``changes`` are settings of the sweep, and ``flags`` those of its runs."""
    flags = {"out": out, "preset": "quick", "device": "cpu", **changes.pop("flags", {})}
    environment, file = changes.pop("environment", {}), changes.pop("file", None)
    options = {kind: changes.pop(kind, None) for kind in ("defense_options", "attack_options")}
    given = {"defenses": "none,partialface", "attacks": "unet", "seeds": "0,1", **changes}
    sweep = {name: value for name, value in given.items() if value is not None}
    return read_request(sweep, flags, environment, file, **options)


def sweep(out, runner, **changes):
    """A sweep that runs ``runner`` instead of the pipeline."""
    from bench.sweep.sweep import Sweep  # what it imports, no worker needs

    return Sweep(grid(out, **changes), console=QUIET, runner=runner)


def note(config, what="run"):
    """Leave a line for the test to count."""
    with (config.out / "calls").open("a") as file:
        file.write(f"{what} {config.defense} {config.seed}\n")


def calls(out, what="run"):
    """The lines of one kind, sorted."""
    file = Path(out) / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(line.removeprefix(f"{what} ") for line in lines if line.startswith(f"{what} "))


def light(config):
    """A successful run that wrote nothing but its result."""
    note(config)
    directory = config.out / run_id(config)
    directory.mkdir(parents=True, exist_ok=True)
    result = RunResult(run_id=run_id(config), status="success", seconds={"all": 1.0})
    (directory / "metrics.json").write_text(result.to_json())
    return result


def full(config):
    """A successful run with everything that reports read."""
    from run_folders import write_run

    note(config)
    directory = config.out / run_id(config)
    shutil.rmtree(directory, ignore_errors=True)
    write_run(
        directory, defense=config.defense, attack=config.attack, knowledge=config.knowledge, seed=config.seed,
        linkage=config.attack == "linkage", saturated=config.attack != "template", samples=False,
    )  # fmt: skip
    return read_result(directory)


def failing(config):
    """Fails at seed 1, by itself."""
    if config.seed == 1:
        note(config)
        raise BenchError("the loss is\nnot finite")
    return light(config)


def buggy(config):
    raise ZeroDivisionError("of all things")


def crowded(config):
    """One face is too many for the accelerator."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory.")


def interrupted(config):
    """Ctrl-C at seed 1."""
    if config.seed == 1:
        raise KeyboardInterrupt
    return light(config)


def every_end(config):
    """By seed: well, failing, killed, killed after its work, killed the first time."""
    if config.seed == 1:
        raise BenchError("the loss is not finite")
    first = config.seed == 4 and not calls(config.out, "killed")
    if first:
        note(config, "killed")
    if first or config.seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    result = light(config)
    if config.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def exits(config):
    """A library ends the process."""
    os._exit(7)


def endless(config):
    """Runs until it is interrupted, and says that it was."""
    note(config, "began")
    try:
        for _ in range(3000):  # not in one piece: Ray's interruptions come between two instructions
            time.sleep(0.1)
    except KeyboardInterrupt:
        note(config, "cancelled")
        raise


def until_a_loss(config):
    """Takes until the test has taken a machine away."""
    note(config, "began")
    while not (config.out / "lost").exists():
        time.sleep(0.1)
    return light(config)


def sharing(config):
    """All cells need one stage, which takes a while to make; each reads what was made."""
    import torch

    from bench.run.stage import StageCache

    note(config, f"{torch.get_num_threads()} threads")
    with StageCache(config.out / "cache").entry("stage", "shared") as entry:
        if not entry.complete:
            note(config, "made")
            for part in range(20):
                (entry.partial / str(part)).write_text("whole")
                time.sleep(0.05)
    assert [(entry.path / str(part)).read_text() for part in range(20)] == ["whole"] * 20
    return light(config)


if __name__ == "__main__":  # a sweep in a process of its own, to be interrupted
    import sys

    import bench.sweep.workers

    bench.sweep.workers.START = sys.argv[2]
    import bench.cli

    def command(**_):
        sweep(Path(sys.argv[1]), endless, jobs=2).run()

    bench.cli.app = command  # what ends it is dealt with as in every command
    bench.cli.main()
