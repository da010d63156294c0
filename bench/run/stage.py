"""The stage cache: what was computed once under the same options, inputs and code is not computed again."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bench.files import drop_beside, keep, parse_json, sha256, write_text
from bench.memory import current
from bench.progress import ProgressBars, Report, no_report
from bench.recognition.state import write_tensors
from bench.run.launch import uncollected

KEY_LENGTH = 16

#: The modules of the harness that decide what a kind of stage makes, beside its options and its inputs. A key holds
#: options by their values, and plug-ins by their own code (:func:`plugin_code`).
CODE: Mapping[str, tuple[str, ...]] = {
    "rendered faces": ("bench.data.synthetic",),
    "faces on disk": (
        "bench.data.decode",
        "bench.data.encoded",
        "bench.data.recordio",
        "bench.data.sources",
        "bench.data.verification_pack",
    ),
    "split": ("bench.data.splits", "bench.data.base", "bench.data.faces", "bench.data.pairs"),
    "recogniser": (
        "bench.nets",
        "bench.graphs",
        "bench.muon",
        "bench.recognition.learner",
        "bench.recognition.partial_fc",
        "bench.recognition.training",
        "bench.data.stream.sampler",
    ),
    "verification": ("bench.recognition.embed", "bench.metrics.verification"),
    "identification": ("bench.data.ijb", "bench.metrics.identification", "bench.run.identification"),
    "templates": ("bench.run.enrolment", "bench.run.templates"),
    "evaluation": ("bench.metrics.evaluator", "bench.nets"),
    "attack": ("bench.run.service",),
    "victims": ("bench.run.attacker", "bench.run.service", "bench.metrics.identity"),
}

#: Where the code of plug-ins lives, and what theirs may be built of.
_PLUGIN_PACKAGES = (
    "attacks",
    "defenses",
    "bench.nets",
    "bench.graphs",
    "bench.muon",
    "bench.images",
    "bench.randomness",
)


@functools.cache
def code_version(module: str) -> str:
    """SHA-256 over what a module, or every module of a package, does: comments, docstrings and layout do not count.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    origin, is_package = _source(module)
    digest = hashlib.sha256()
    for file in sorted(origin.parent.rglob("*.py")) if is_package else [origin]:
        digest.update(f"{file.relative_to(origin.parent)}\0".encode())
        digest.update(_read_code(file.read_bytes())[0])
    return digest.hexdigest()


def _source(module: str) -> tuple[Path, bool]:
    """The file of a module, and whether it is a package."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin), spec.submodule_search_locations is not None


def _is_description(node: Any) -> bool:
    """Whether it is an argument ``description=...`` of a call."""
    return type(node) is ast.keyword and node.arg == "description"


#: Nodes without fields, as :func:`ast.dump` writes them.
_BARE = {
    kind: f"{kind.__name__}()"
    for base in (ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop)
    for kind in base.__subclasses__()
}


@functools.cache
def _read_code(source: bytes) -> tuple[bytes, tuple[ast.AST, ...]]:
    """What a file does, as :func:`ast.dump` writes it, and its import statements.

    What a reader is told is left out: docstrings, and the descriptions of options. A plan reads some 80 files: one walk
    of each takes a quarter of what a transformer, a dump and a search for imports do.
    """
    imports: list[ast.AST] = []

    def dump(node: Any) -> str:
        kind = type(node)
        if kind in _BARE:
            return _BARE[kind]
        if kind is list:
            return f"[{', '.join([dump(each) for each in node if not _is_description(each)])}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return "Pass()"
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        fields = [(name, getattr(node, name, None)) for name in node._fields]
        shown = [f"{name}={dump(value)}" for name, value in fields if value is not None or not hasattr(kind, name)]
        return f"{kind.__name__}({', '.join(shown)})"

    with uncollected():
        return dump(ast.parse(source)).encode(), tuple(imports)


@functools.cache
def plugin_code(module: str) -> tuple[str, ...]:
    """The module of a plug-in and the modules that it is built of.

    These are what it imports, directly or not, of its own package, of the contracts and shared parts of plug-ins, and
    of the networks that everybody may use.
    """
    packages = {module.partition(".")[0], *_PLUGIN_PACKAGES} - {"bench"}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or not any(f"{name}.".startswith(f"{package}.") for package in packages):
            continue
        seen.add(name)
        file, is_package = _source(name)
        for node in _read_code(file.read_bytes())[1]:
            waiting += _imported(node, name if is_package else name.rpartition(".")[0])
    return tuple(sorted(seen))


def _imported(node: ast.AST, package: str) -> list[str]:
    """The modules that an import statement names; ``from a import b`` names ``a.b`` where that is a file."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    if base.partition(".")[0] not in ("bench", "attacks", "defenses", package.partition(".")[0]):
        return []  # finding a module imports the packages that it lies in
    file, is_package = _source(base)
    if not is_package:
        return [base]
    parts = {path.stem if path.is_file() else path.name for path in file.parent.iterdir()}
    return [base, *(f"{base}.{alias.name}" for alias in node.names if alias.name in parts)]


def make_key(inputs: Mapping[str, Any], modules: Sequence[str]) -> str:
    """Key of a stage: resolved options, keys of its inputs, and the code that made it."""
    document = {"inputs": inputs, "code": {module: code_version(module) for module in sorted(modules)}}
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


class Entry(NamedTuple):
    """Where a stage lies: in ``path`` if it was ``complete`` already, else it is made in ``partial``.

    ``resumed`` says whether ``partial`` holds what a killed run left.
    """

    path: Path
    partial: Path
    complete: bool
    resumed: bool = False


class StageCache:
    """Folders ``<root>/<stage>-<key>``, made under a lock and renamed into place when finished.

    Each lists the SHA-256 of its files: one that is not what was written (a full disk, an edited file) is made anew,
    with a warning. So is what a killed run left, where a file of it cannot be read. Without ``resume`` neither finished
    nor partial stages of earlier runs are used.
    """

    def __init__(self, root: Path, *, resume: bool = True) -> None:
        self.root = root
        self.resume = resume
        self._made: set[Path] = set()
        self._whole: set[Path] = set()

    def path(self, stage: str, key: str) -> Path:
        """Where a finished stage lies."""
        return self.root / f"{stage}-{key}"

    def holds(self, stage: str, key: str) -> bool:
        """Whether a finished result is there and may be used."""
        path = self.path(stage, key)
        return path.is_dir() and (self.resume or path in self._made)

    def _lock(self, stage: str, key: str) -> FileLock:
        return FileLock(self.root / f"{stage}-{key}.lock")

    def wanting(self, stage: str, key: str) -> bool:
        """Whether a stage is not there, and nobody is at it."""
        if self.holds(stage, key):
            return False
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock(stage, key).acquire(blocking=False):
                return True
        except Timeout:
            return False

    @contextmanager
    def entry(self, stage: str, key: str) -> Iterator[Entry]:
        """Work on a stage. If the block ends well, ``partial`` becomes ``path``.

        If it fails, ``partial`` stays for the next run to resume from.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.path(stage, key)
        partial = self.root / f"{stage}-{key}.partial"
        with self._lock(stage, key):
            if self.holds(stage, key) and self._keeps(path, damage):
                yield Entry(path, partial, complete=True)
                return
            if not self.resume or (partial.is_dir() and not self._keeps(partial, unreadable)):
                _remove(partial)
            resumed = partial.is_dir()
            partial.mkdir(exist_ok=True)
            drop_beside(partial)
            yield Entry(path, partial, complete=False, resumed=resumed)
            list_files(partial)
            if self.resume and path.is_dir():
                # Made by a machine whose files this one saw late (network file systems do that): somebody may be
                # reading them, and they are as good.
                shutil.rmtree(partial)
                return
            _remove(path)
            partial.rename(path)
            self._made.add(path)
            self._whole.add(path)

    def _keeps(self, folder: Path, fault: Callable[[Path], str | None]) -> bool:
        """Whether nothing is wrong with a folder of this cache; else it is removed, with a warning."""
        if folder not in self._whole and (problem := fault(folder)) is not None:
            logging.getLogger("bench").warning("bench: the cached stage %s is damaged (%s): made anew", folder, problem)
            _remove(folder)
            return False
        self._whole.add(folder)
        return True


def _remove(folder: Path) -> None:
    """Remove a stage, as a whole for others: half of one might be taken for one of a version without a listing."""
    going = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)  # of a run that was killed here
    if folder.is_dir():
        folder.rename(going)
        shutil.rmtree(going)


#: Lists the files of a finished stage, with the SHA-256 of each.
LISTING = "files.json"

#: What a stage took, and under what circumstances: for plans, and no part of what was made.
SECONDS = "seconds.json"

#: What a result has to tell of how a stage was made, by topic; only where there is something.
NOTES = "notes.json"


def list_files(folder: Path) -> None:
    """Write the listing of a finished stage."""
    files = [file for file in _files(folder) if file.name not in (LISTING, SECONDS)]
    digests = {str(file.relative_to(folder)): sha256(file) for file in files}
    write_text(folder / LISTING, json.dumps(digests, indent=2))


def damage(folder: Path) -> str | None:
    """What is wrong with a finished stage by its listing; None where nothing is, or where an old one has no listing."""
    listing = folder / LISTING
    if not listing.is_file():
        return None
    try:
        digests = dict(parse_json(listing.read_bytes()))
    except (ValueError, TypeError):
        return f"{LISTING} cannot be read"
    there = {str(file.relative_to(folder)): file for file in _files(folder)}
    for name, digest in digests.items():
        if name not in there:
            return f"{name} is missing"
        if sha256(there[name]) != digest:
            return f"{name} is not what was written"
    return None


def unreadable(folder: Path) -> str | None:
    """A file of an unfinished stage that cannot be read, and why; None where all can."""
    for file in _files(folder):
        try:
            if not file.stat().st_size:
                return f"{file.name} is empty"
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # compares the length with what the header says
                    pass
            elif file.suffix == ".json":
                parse_json(file.read_bytes())
            elif file.suffix == ".ckpt" and zipfile.ZipFile(file).testzip() is not None:
                return f"{file.name} is not what was written"
        except Exception:  # a damaged file surfaces as nearly any exception type
            return f"{file.name} cannot be read"
    return None


def _files(folder: Path) -> list[Path]:
    """The files below a folder, without those that a killed run had not yet put in their place."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One stage: how it is called and keyed, how it is made in a folder and read back from it."""

    stage: str
    key: str
    what: str
    make: Callable[[Path, Report], None]
    read: Callable[[Path], T]


def tensor_job(
    stage: str,
    key: str,
    what: str,
    file: str,
    compute: Callable[[Path, Report], Mapping[str, Tensor]],
    read: Callable[[dict[str, Tensor]], T],
) -> Job[T]:
    """A stage that keeps named tensors in ``file``.

    ``compute(resume, report)`` may leave in the folder ``resume`` what it goes on from when it was killed.
    """

    def make(folder: Path, report: Report) -> None:
        resume = folder / "resume"
        resume.mkdir(exist_ok=True)
        write_tensors(folder / file, compute(resume, report))
        shutil.rmtree(resume)

    return Job(stage, key, what, make, lambda folder: read(load_file(folder / file)))


Log = Callable[..., None]


class StageRunner:
    """Makes, stores and reloads what the stages of one run produce.

    Args:
        cache: where finished stages lie.
        bars: progress.
        log: called as ``log(event, **fields)``.

    Attributes:
        seconds: stage -> what it took, without the stages that it asked for; what it was waited for, if another process
            made it.
        cached: the stages that were reused.
        beside: the trainings that a second process of the run makes as well (:mod:`bench.run.beside`).
        together: closed when the second process is not needed any longer.
    """

    def __init__(self, cache: StageCache, bars: ProgressBars, log: Log) -> None:
        self.cache = cache
        self.bars = bars
        self.log = log
        self.seconds: dict[str, float] = {}
        self.cached: list[str] = []
        self.beside: Mapping[tuple[str, str], Job[Any]] = {}
        self.together = ExitStack()
        self._results: dict[tuple[str, str], Any] = {}

    def alone(self) -> None:
        """Go on without a second process, with all threads."""
        self.together.close()

    @contextmanager
    def timed(self, stage: str, what: str | None = None, *, step: bool = False) -> Iterator[Report]:
        """Charge the block to ``stage``, without the stages that it asks for, and show ``what`` it does, if told."""
        own = self._stopwatch()
        try:
            with nullcontext(no_report) if what is None else self.bars.task(what, step=step) as report:
                yield report
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + own()

    def _stopwatch(self) -> Callable[[], float]:
        """Starts now and tells the seconds since then, without those that were charged to a stage in between."""
        started, charged = time.perf_counter(), sum(self.seconds.values())
        # Verifying, for one, is not charged for training the recogniser.
        return lambda: time.perf_counter() - started - (sum(self.seconds.values()) - charged)

    def circumstances(self) -> dict[str, Any]:
        """What the seconds of a stage depend on; kept beside them."""
        return {}

    def assume(self, job: Job[T], value: T) -> None:
        """Take ``value`` for the result of a stage, in this run only; nothing is stored."""
        self._results[job.stage, job.key] = value

    def do(self, job: Job[T]) -> T:
        """Make the stage unless it is there, and read it back.

        It is read back in either case, so that a fresh result and a cached one cannot differ. Asked for again in the
        same run, it is the same object: not read twice, and not counted as reused.
        """
        if (job.stage, job.key) not in self._results:
            self._make_others(job)
            with self.timed(job.stage), self.cache.entry(job.stage, job.key) as entry:
                if entry.complete:
                    if (job.stage, job.key) in self.beside:
                        self.log("stage", stage=job.stage, key=job.key, beside=True)
                        self.bars.pass_step()
                    else:
                        self.cached.append(job.stage)
                        self.log("cached", stage=job.stage, key=job.key)
                    if (entry.path / NOTES).is_file():
                        current().notes.update(parse_json((entry.path / NOTES).read_bytes()))
                else:
                    self.log("stage", stage=job.stage, key=job.key)
                    own = self._stopwatch()
                    with self.bars.task(job.what, step=True) as report, current().collecting() as notes:
                        job.make(entry.partial, report)
                    if notes:
                        write_text(entry.partial / NOTES, json.dumps(notes, indent=2))
                    if not entry.resumed:  # else it took longer than this
                        took = {"seconds": round(own(), 3), **self.circumstances()}
                        keep(entry.partial / SECONDS, took)
            self._results[job.stage, job.key] = job.read(entry.path)
        result: T = self._results[job.stage, job.key]
        return result

    def _make_others(self, job: Job[Any]) -> None:
        """Make the next trainings while the second process is at this one."""
        if (job.stage, job.key) in self.beside:
            for key, other in self.beside.items():
                if self.cache.holds(job.stage, job.key) or self.cache.wanting(job.stage, job.key):
                    return
                if self.cache.wanting(*key):
                    self.do(other)
