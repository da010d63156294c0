"""Runs cells as Ray tasks, on a cluster or on this machine. Ray is an optional dependency."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from bench.errors import BenchError, MissingError, UsageError, first_line
from bench.run.config import OTHER_VARIABLES, RunConfig
from bench.sweep.workers import GRACE, CellEnd, Runner, run_cell, use_threads

if TYPE_CHECKING:
    from bench.sweep.cells import Cell

#: What decides a cell's figures and cache keys.
_CODE = ("attacks", "bench", "defenses")


def _code() -> str:
    """SHA-256 of all their files: each cell asks, and files are read in a hundredth of the time that code is."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(file for package in _CODE for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sweep was started: its current folder, to which paths on the command line are relative, the lock in the
    sweep's directory (absolute), which is held there, and the SHA-256 of its code."""

    folder: Path
    lock: Path
    code: str

    @classmethod
    def here(cls, lock: Path) -> Origin:
        """This machine, which holds the ``lock`` of the sweep."""
        return cls(Path.cwd(), lock.resolve(), _code())

    def problem(self) -> str | None:
        """Why the process that calls this must not run a cell, in one line; None where it may.

        It has to see the sweep's files, and its lock: without locks across machines two cells would make the same
        stage in the same folder.
        """
        host, lock = platform.node(), self.lock
        if not self.folder.is_dir():
            return f"{host} has no folder {self.folder}: start the sweep in a folder that all machines share"
        if not lock.exists():
            return f"{host} does not see {lock.parent}: --out must lie on a file system that all machines share"
        # Whoever started the sweep holds the lock.
        with suppress(Timeout), FileLock(lock, timeout=0):
            return f"{host} is not kept out by the lock on {lock}: --out needs a file system with locks (NFS 4, say)"
        if self.code != _code():
            return (
                f"{host} runs other code than the sweep was started with: install one version, and leave it meanwhile"
            )
        return None

    def enter(self) -> None:
        """Make the paths of the command line mean what they meant there."""
        os.chdir(self.folder)


#: Seconds after which the size of the cluster is looked at again.
LOOK = 2.0


class RayWorkers:
    """The machines of a Ray cluster, each of which sees the sweep's ``lock``, which is held.

    Without the ``address`` of a cluster, one is started on this machine for the time of the sweep. A cell needs so many
    ``cpus`` and ``gpus``.

    Raises:
        MissingError: Ray is not installed.
        BenchError: no cluster there, or one of its machines does not share the files or the code.
        UsageError: no machine has what a cell needs.
    """

    def __init__(self, runner: Runner, lock: Path, *, address: str | None, cpus: int, gpus: float) -> None:
        self._ray = _import_ray()
        self._cpus, self._gpus = cpus, gpus
        self._origin = Origin.here(lock)
        self._tasks: dict[Any, Cell] = {}
        environment = {name: value for name, value in os.environ.items() if name in OTHER_VARIABLES}
        self._leave = ExitStack()
        # What Ray has to say of machines and workers goes to stdout: the result has that for itself.
        self._leave.enter_context(redirect_stdout(sys.stderr))
        try:
            _connect(self._ray, address)
            self._leave.callback(self._ray.shutdown)
            if address is not None:
                self._check_machines()
            if self._room() < 1:
                needs = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
                raise UsageError(f"no machine of the Ray cluster has {needs}: lower --cpus-per-cell or --gpus-per-cell")
            self._work = self._remote(_work, num_cpus=cpus, num_gpus=gpus)
            self._shared = [self._ray.put(shared) for shared in (runner, self._origin, environment, cpus)]
        except BaseException:
            self._leave.close()
            raise

    def _remote(self, function: Any, **needs: Any) -> Any:
        # Lost workers are retried by the sweep, which counts and writes down. A process runs one cell only: its
        # memory and its accelerator are free after it.
        return self._ray.remote(max_retries=0, max_calls=1, **needs)(function)

    def _check_machines(self) -> None:
        """Ask every machine whether it may be trusted with a cell."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = self._remote(Origin.problem, num_cpus=0)
        nodes = [NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False) for node in self._machines()]
        try:
            problems = self._ray.get([ask.options(scheduling_strategy=node).remote(self._origin) for node in nodes])
        except self._ray.exceptions.RayError as error:
            cause = first_line(getattr(error, "cause", error))
            raise BenchError(f"a machine of the Ray cluster cannot run ppfr-bench: {cause}") from None
        for problem in filter(None, problems):
            raise BenchError(problem)

    def _machines(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _room(self) -> int:
        """How many cells fit on the machines that are there now."""
        needs = {name: need for name, need in (("CPU", self._cpus), ("GPU", self._gpus)) if need}
        return sum(
            min(int(round(node["Resources"].get(name, 0.0) / need, 6)) for name, need in needs.items())
            for node in self._machines()
        )

    @property
    def slots(self) -> int:
        """As many cells as fit. Where machines were lost, one waits until others come."""
        return max(1, self._room())

    def start(self, cell: Cell) -> None:
        """Submit a cell."""
        self._tasks[self._work.remote(*self._shared, cell.config)] = cell

    def wait(self) -> list[tuple[Cell, CellEnd]]:
        """The cells that ended within a short time."""
        ended, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=LOOK)
        return [self._collect(reference) for reference in ended]

    def _collect(self, reference: Any) -> tuple[Cell, CellEnd]:
        cell, errors = self._tasks.pop(reference), self._ray.exceptions
        lost = (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.LocalRayletDiedError,
            errors.ObjectLostError,
        )
        try:
            return cell, self._ray.get(reference)
        except errors.RayTaskError as error:
            # Not the cell's own error, which is how it ended: the worker could not even begin.
            return cell, CellEnd(error=f"the Ray worker failed: {first_line(error.cause)}")
        except errors.RayError as error:
            return cell, CellEnd(error=f"the Ray worker was lost: {first_line(error)}", lost=isinstance(error, lost))

    def stop(self) -> None:
        """Cancel what still runs and leave the cluster."""
        left = list(self._tasks)
        for reference in left:
            self._ray.cancel(reference)
        if left:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=GRACE)
        for reference in left:
            self._ray.cancel(reference, force=True)
        self._tasks.clear()
        self._leave.close()


def _work(runner: Runner, origin: Origin, environment: Mapping[str, str], threads: int, config: RunConfig) -> CellEnd:
    """The Ray task: run one cell."""
    problem = origin.problem()
    if problem is not None:
        return CellEnd(error=problem, lost=True)
    origin.enter()
    os.environ.update(environment)
    use_threads(threads)
    return run_cell(runner, config)


def _import_ray() -> Any:
    # A privacy benchmark does not report home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingError("--engine ray needs Ray: pip install ppfr-bench[ray]") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Start a cluster here, or join one, and keep what the command line does on SIGTERM."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        # Find out quickly what Ray finds out in minutes: that nobody listens there.
        try:
            socket.create_connection((host, int(port)), timeout=GRACE).close()
        except (OSError, OverflowError) as error:
            raise BenchError(f"no Ray cluster at {address}: {error} (ray start --head prints the address)") from None
    handler = signal.getsignal(signal.SIGTERM)
    only_here = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **only_here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BenchError(f"no Ray cluster at {address or 'this machine'}: {first_line(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
