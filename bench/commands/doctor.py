"""``bench doctor``: what works on this machine, what is missing, and how to get it.

Compiled dependencies are imported in a child process only, so that a broken installation (a missing library, a torch
and a torchvision of different builds, a crash at import) is reported instead of ending the report.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.text import Text

from bench.commands.console import show, table
from bench.commands.flags import AsJson
from bench.errors import MissingError
from bench.files import DISTRIBUTION, cache_folder
from bench.run.config import PREFIX, listed, unknown_variables

Status = Literal["ok", "warn", "fail"]

#: Where this package lies, for child processes.
_ROOT = str(Path(__file__).parents[2])

GIGABYTE = 1e9
MINIMUM_DISK, COMFORTABLE_DISK = 0.5 * GIGABYTE, 5 * GIGABYTE
COMFORTABLE_MEMORY = 4 * GIGABYTE

PROBE_TIMEOUT = 180  # seconds; a first import of torch from a cold network disk takes most of a minute

ONE_INDEX = (
    "reinstall both from one place: pip uninstall -y torch torchvision && pip install torch torchvision "
    "(for a CPU-only pair add --index-url https://download.pytorch.org/whl/cpu); "
    "if it comes back, look in `pip config list` for a find-links that offers only one of the two"
)

#: What child processes run: every step adds to ``probed``, and the first that fails says so as ``<step>_error``.
PROBE = """
import contextlib, json, sys
probed = {}
@contextlib.contextmanager
def step(name):
    try:
        yield
    except Exception as error:
        probed[name + "_error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(probed))
        sys.exit()
"""
TORCH_PROBE = f"""{PROBE}
with step("torch"):
    import torch
    probed["torch"] = torch.__version__
    probed["cuda_build"] = torch.version.cuda or getattr(torch.version, "hip", None)
    probed["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        probed["devices"] = [{{"name": p.name, "memory": p.total_memory}} for p in properties]
        probed["bf16"] = torch.cuda.is_bf16_supported()
    probed["mps"] = torch.backends.mps.is_available()
with step("torchvision"):
    import torchvision
    probed["torchvision"] = torchvision.__version__
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # one compiled operator
with step("lpips"):
    sys.path.append(sys.argv[1])
    from bench.metrics.perceptual import Lpips, find_alexnet
    Lpips(find_alexnet())
    probed["lpips"] = str(find_alexnet())
print(json.dumps(probed))
"""
ONNX_PROBE = f"""{PROBE}
with step("onnxruntime"):
    import onnxruntime
    probed["onnxruntime"] = onnxruntime.__version__
    probed["providers"] = onnxruntime.get_available_providers()
with step("model"):
    sys.path.append(sys.argv[1])
    from pathlib import Path
    from bench.nets.brought import open_recogniser
    probed["evaluators"] = []
    for path in sys.argv[2:]:
        network = open_recogniser(Path(path), pictures=True)
        size = "x".join(map(str, network.input_size))
        probed["evaluators"].append(f"{{path}}: {{network.layout}} {{size}} -> {{network.embedding_size}}")
print(json.dumps(probed))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what to do about it, if anything.

    Its status is ``ok``, ``warn`` (the suite runs, with less) or ``fail`` (a run would end in an error).
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


def first_case(name: str, *cases: tuple[object, Status, str, str | None]) -> Check:
    """The first of (condition, status, detail, remedy) whose condition holds."""
    return next(Check(name, status, detail, remedy) for holds, status, detail, remedy in cases if holds)


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def probe(source: str, *arguments: str) -> dict[str, Any]:
    """Run Python code that prints one JSON object, in a child process of this interpreter.

    Returns:
        What it printed; ``{"crash": why}`` where it died, hung or printed something else.
    """
    # -P: a file called torch.py in the current folder must not be taken for torch.
    command = [sys.executable, "-P", "-c", source, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"crash": f"no answer within {PROBE_TIMEOUT} s"}
    if done.returncode < 0:
        return {"crash": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode > 0:
        return {"crash": _one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])}
    with contextlib.suppress(json.JSONDecodeError):
        answer = json.loads((done.stdout.strip().splitlines() or [""])[-1])
        if isinstance(answer, dict):
            return answer
    return {"crash": f"unexpected output: {_one_line(done.stdout)}"}


def installed(distribution: str) -> str | None:
    """Version of an installed distribution from its metadata, without importing it; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(extra: str = "") -> list[str]:
    """The declared requirements of one extra, or of the project itself, that the installed versions do not meet."""
    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or []):
        marker, version = requirement.marker, installed(requirement.name)
        with_extra, without = (marker is None or marker.evaluate({"extra": name}) for name in (extra, ""))
        if not with_extra or (extra and without):
            continue
        if version is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, needs {requirement.specifier}")
    return problems


def check_dependencies() -> list[Check]:
    """The declared dependencies, then one check per optional extra."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        detail = f"{DISTRIBUTION} is not installed, so they are unknown"
        return [Check("dependencies", "warn", detail, "pip install -e .")]
    checks = [Check("dependencies", "ok", f"{DISTRIBUTION} {metadata['Version']}, all installed")]
    if problems := unmet():
        checks = [Check("dependencies", "fail", "; ".join(problems), f"pip install --upgrade {DISTRIBUTION}")]
    for extra in metadata.get_all("Provides-Extra") or []:
        absent = unmet(extra)
        detail = f"not installed ({'; '.join(absent)})" if absent else "installed"
        remedy = f"only if wanted: pip install '{DISTRIBUTION}[{extra}]'" if absent else None
        checks.append(Check(f"extra {extra!r}", "ok", detail, remedy))
    return checks


def check_torch(probed: Mapping[str, Any]) -> list[Check]:
    """torch and torchvision, one at a time and as a pair; ``probed`` is what :data:`TORCH_PROBE` printed."""
    torch, vision = installed("torch"), installed("torchvision")
    if reason := _one_line(probed.get("crash") or probed.get("torch_error") or ""):
        if torch is None:
            return [Check("torch", "fail", f"not installed ({reason})", "pip install torch torchvision")]
        return [Check("torch", "fail", f"{torch} is installed and does not import: {reason}", ONE_INDEX)]
    torch = probed["torch"]
    build = f"CUDA {probed['cuda_build']} build" if probed.get("cuda_build") else "CPU-only build"
    reason = _one_line(probed.get("torchvision_error", ""))
    mismatch = (
        f"torchvision {vision} was built for another torch than the {torch} ({build}) that is installed, "
        f"so its compiled operators are not loaded ({reason})"
    )
    pair = first_case(
        "torchvision",
        (not reason, "ok", f"{probed.get('torchvision')}, its operators load with torch {torch}", None),
        (vision is None and "ModuleNotFoundError" in reason, "fail", "not installed", ONE_INDEX),
        ("torchvision::nms" in reason or "undefined symbol" in reason, "fail", mismatch, ONE_INDEX),
        (True, "fail", f"{vision} does not import with torch {torch}: {reason}", ONE_INDEX),
    )
    return [Check("torch", "ok", f"{torch} ({build})"), pair]


def check_devices(probed: Mapping[str, Any], driver: bool) -> Check:
    """Accelerators and bfloat16, by what :data:`TORCH_PROBE` printed and whether an NVIDIA ``driver`` is there."""
    devices, build = probed.get("devices", []), probed.get("cuda_build")
    names = ", ".join(f"{device['name']} ({device['memory'] / GIGABYTE:.0f} GB)" for device in devices)
    here = "an NVIDIA driver is here, and torch"
    rebuild = "install a CUDA build of both: pip install --force-reinstall torch torchvision"
    look = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES; an old driver needs an update or an older torch"
    return first_case(
        "devices",
        ("torch" not in probed, "warn", "unknown while torch does not import", None),
        (devices and probed.get("bf16"), "ok", f"{names}; bfloat16", None),
        (devices, "warn", f"{names}; no bfloat16, so training runs in float32, more slowly", None),
        (probed.get("mps"), "ok", "Apple GPU (mps)", None),
        (driver and not build, "warn", f"{here} is a CPU-only build", rebuild),
        (driver, "warn", f"{here} (CUDA {build}) finds no usable GPU", look),
        (True, "ok", "CPU only", None),
    )


def check_compiler(probed: Mapping[str, Any], compiler: str | None) -> list[Check]:
    """The C compiler that Triton calls, by name, where a GPU is there to compile for."""
    if not probed.get("devices"):
        return []
    if compiler:
        return [Check("C compiler", "ok", compiler)]
    without = "none: block DCTs run as plain operations, more slowly, and torch.compile compiles nothing"
    return [Check("C compiler", "warn", without, "install gcc, or name a compiler by CC")]


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by a cgroup quota (version 2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Where there is no quota, the file is absent or says "max".
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split())
        cores = max(1, min(cores, quota // period))
    return cores


def check_threads(threads: int | None, cores: int) -> Check:
    """torch's threads, where they are known, against the usable cores."""
    detail = f"{cores} usable cores, torch uses {threads} threads"
    return first_case(
        "CPU",
        (threads is None, "ok", f"{cores} usable cores", None),
        ((threads or 0) > cores, "warn", f"{detail}: they get in each other's way", f"export OMP_NUM_THREADS={cores}"),
        (True, "ok", detail, None),
    )


def check_memory(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> Check:
    """Memory that is free for this process."""
    import psutil

    memory = psutil.virtual_memory()
    total = memory.total
    # Where there is no cgroup (version 2) limit, the file is absent or says "max".
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(limit_file.read_text(encoding="ascii")))
    available = min(memory.available, total)
    detail = f"{available / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB available"
    low, remedy = available < COMFORTABLE_MEMORY, "close something, or take --preset quick and a smaller batch_size"
    return first_case("memory", (low, "warn", detail, remedy), (True, "ok", detail, None))


def check_folder(name: str, folder: Path, flag: str) -> Check:
    """Whether ``folder`` can be made (or is there), written to, and has room; ``flag`` chooses another one."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    choose = f"choose another folder with {flag}"
    if not existing.is_dir():
        return Check(name, "fail", f"{existing} is a file", choose)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(name, "fail", f"{existing} is not writable: {error.strerror}", choose)
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {free / GIGABYTE:.1f} GB free"
    return first_case(
        name,
        (free < MINIMUM_DISK, "fail", detail, f"free some disk space, or {choose}"),
        (free < COMFORTABLE_DISK, "warn", detail, "enough for a small run; free some disk space before a large one"),
        (True, "ok", detail, None),
    )


def check_lpips(probed: Mapping[str, Any]) -> Check:
    """The AlexNet trunk that LPIPS needs; without it LPIPS is null, never computed on a random trunk."""
    problem, _, remedy = probed.get("lpips_error", "").rpartition("LPIPS: ")[2].partition("; ")
    named = os.environ.get("BENCH_LPIPS_WEIGHTS")
    return first_case(
        "LPIPS weights",
        ("lpips" in probed, "ok", f"{probed.get('lpips')} (checksum right)", None),
        (not problem, "warn", "unknown while torch and torchvision do not import", None),
        (named, "fail", problem, remedy or None),
        (True, "warn", f"{problem}: LPIPS is left out (null)", remedy or None),
    )


def probe_evaluators() -> dict[str, Any]:
    """What :data:`ONNX_PROBE` prints of the evaluators that BENCH_EVALUATOR names."""
    return probe(ONNX_PROBE, _ROOT, *listed(os.environ.get("BENCH_EVALUATOR", "")))


def check_evaluator(probed: Mapping[str, Any]) -> list[Check]:
    """onnxruntime, by what :data:`ONNX_PROBE` printed, and the evaluators that BENCH_EVALUATOR names."""
    paths = listed(os.environ.get("BENCH_EVALUATOR", ""))
    if reason := probed.get("crash") or probed.get("onnxruntime_error"):
        detail = f"does not import: {_one_line(reason)}; an ONNX evaluator cannot be used"
        status: Status = "fail" if paths else "warn"
        return [Check("onnxruntime", status, detail, "pip install --force-reinstall onnxruntime")]
    providers = ", ".join(provider.removesuffix("ExecutionProvider") for provider in probed["providers"])
    absent = ", ".join(path for path in paths if not Path(path).is_file())
    broken = _one_line(probed.get("model_error", "")).removeprefix("ValueError: ")
    remedy = "point BENCH_EVALUATOR to face recognisers, or unset it: one is then trained in each run"
    evaluator = first_case(
        "evaluator",
        (not paths, "ok", "BENCH_EVALUATOR is not set: each run trains its own judge of identity leakage", None),
        (absent, "fail", f"BENCH_EVALUATOR: {absent} is no file", remedy),
        (broken, "fail", broken, remedy),
        (True, "ok", "; ".join(probed.get("evaluators", [])), None),
    )
    return [Check("onnxruntime", "ok", f"{probed['onnxruntime']} ({providers})"), evaluator]


def check_data_root() -> Check:
    """The real faces that BENCH_DATA_ROOT names."""
    named = os.environ.get("BENCH_DATA_ROOT")
    if not named:
        return Check("data", "ok", "BENCH_DATA_ROOT is not set: synthetic faces unless --data-root is given")
    try:
        return Check("data", "ok", f"{named}: {_contents(Path(named))}")
    except OSError as error:
        problem = f"BENCH_DATA_ROOT={named} cannot be read: {error.strerror}"
    except ValueError as error:
        problem = f"{named} {error}"
    return Check("data", "fail", problem, "point BENCH_DATA_ROOT to a face dataset, or unset it")


def _contents(root: Path) -> str:
    """What a data root holds; :raises ValueError: it holds no dataset."""
    if root.is_file():
        with root.open("rb"):
            return "one file"
    names = {entry.name for entry in root.iterdir()}
    if not names:
        raise ValueError("is empty")
    known: list[str] = [name for name in ("train.rec", "train.idx", "property", "pairs.txt") if name in names]
    known += sorted(name for name in names if name.endswith(".bin"))
    if folders := sum((root / name).is_dir() for name in names):
        known.append(f"{folders} folders")
    described = ", ".join(known) or f"{len(names)} files"
    if len(missing := {"train.rec", "train.idx"} - names) == 1:
        raise ValueError(f"holds {described}; {missing.pop()} is missing")
    return described


def check_lfw() -> Check:
    """Labeled Faces in the Wild where it is downloaded to; only ``--dataset lfw`` needs it."""
    folder = cache_folder() / "lfw"
    if names := sorted(entry.name for entry in folder.glob("lfw*")):
        return Check("LFW", "ok", f"in {folder}: {', '.join(names)}")
    return Check("LFW", "ok", f"not in {folder}", "only if wanted: --dataset lfw downloads it on first use")


def check_variables() -> Check:
    """BENCH_* variables; those that mean nothing are warned of, since the prefix may be somebody else's, too."""
    names = sorted(name for name in os.environ if name.startswith(PREFIX))
    unknown = unknown_variables(os.environ)
    return first_case(
        "environment",
        (unknown, "warn", f"unknown: {', '.join(unknown)}", "unset them if they were meant for bench"),
        (names, "ok", f"set: {', '.join(names)}", None),
        (True, "ok", "no BENCH_* variable is set", None),
    )


def _guarded(name: str, check: Callable[[], Check | list[Check]]) -> list[Check]:
    """Run one check; one that breaks on this machine is reported as such and does not end the report."""
    try:
        checks = check()
    except ModuleNotFoundError as error:
        return [Check(name, "warn", f"could not be checked without {error.name}", f"pip install {error.name}")]
    except Exception as error:
        detail = f"could not be checked: {type(error).__name__}: {_one_line(str(error))}"
        return [Check(name, "warn", detail, "please report this")]
    return checks if isinstance(checks, list) else [checks]


def diagnose() -> list[Check]:
    """Look at everything a run depends on; ``fail`` stands for something without which a run ends in an error."""
    torch, onnx = probe(TORCH_PROBE, _ROOT), probe_evaluators()
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    python = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    out = Path(os.environ.get("BENCH_OUT") or "runs")
    checks: dict[str, Callable[[], Check | list[Check]]] = {
        "Python": lambda: Check("Python", "ok", python),
        "torch": lambda: check_torch(torch),
        "dependencies": check_dependencies,
        "devices": lambda: check_devices(torch, driver),
        "C compiler": lambda: check_compiler(torch, compiler),
        "CPU": lambda: check_threads(torch.get("threads"), usable_cores()),
        "memory": check_memory,
        "run folder": lambda: check_folder("run folder", out, "--out"),
        "cache folder": lambda: check_folder("cache folder", cache_folder(), "BENCH_CACHE"),
        "evaluator": lambda: check_evaluator(onnx),
        "LPIPS weights": lambda: check_lpips(torch),
        "data": check_data_root,
        "LFW": check_lfw,
        "environment": check_variables,
    }
    return [check for name, function in checks.items() for check in _guarded(name, function)]


def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, what is missing and how to get it."""
    checks = diagnose()
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    rows = ((Text(c.status, style=colours[c.status]), c.name, c.detail, c.remedy) for c in checks)
    show([asdict(c) for c in checks], as_json, lambda: table(rows, "", "check", "found", "what to do"))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(MissingError.exit_code)
