"""Looks at this machine: what works, what is missing, and how to get it.

Nothing here imports torch or another compiled dependency into this process. They are tried in a child
process, so that a broken installation (a missing library, a torch and a torchvision of different builds, a crash at
import) is reported instead of ending the report.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.text import Text

from bench.commands.console import out as stdout
from bench.commands.console import print_json, table
from bench.commands.flags import AsJson
from bench.errors import MissingError
from bench.files import sha256
from bench.run.config import PREFIX, unknown_variables

Status = Literal["ok", "warn", "fail"]

DISTRIBUTION = "ppfr-bench"
MINIMUM_PYTHON = (3, 11)

#: The ImageNet AlexNet that LPIPS stands on; torchvision names a checkpoint after the start of its SHA-256. The same
#: values as in ``bench.metrics.perceptual``, which needs torch and so cannot be imported here.
LPIPS_TRUNK = "alexnet-owt-7be5be79.pth"
LPIPS_TRUNK_URL = f"https://download.pytorch.org/models/{LPIPS_TRUNK}"
LPIPS_TRUNK_SHA256_PREFIX = "7be5be79"

GIGABYTE = 1e9
MINIMUM_DISK, COMFORTABLE_DISK = 0.5 * GIGABYTE, 5 * GIGABYTE
COMFORTABLE_MEMORY = 4 * GIGABYTE

PROBE_TIMEOUT = 180  # seconds; a first import of torch from a cold network disk takes most of a minute

ONE_INDEX = (
    "reinstall both from one place: pip uninstall -y torch torchvision && pip install torch torchvision "
    "(for a CPU-only pair add --index-url https://download.pytorch.org/whl/cpu); "
    "if it comes back, look in `pip config list` for a find-links that offers only one of the two"
)

TORCH_PROBE = """
import json
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["cuda_build"] = torch.version.cuda or getattr(torch.version, "hip", None)
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["devices"] = [{"name": p.name, "memory": p.total_memory} for p in properties]
        found["bf16"] = torch.cuda.is_bf16_supported()
    found["mps"] = torch.backends.mps.is_available()
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}"
else:
    try:
        import torchvision
        found["torchvision"] = torchvision.__version__
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # one compiled operator
    except Exception as error:
        found["torchvision_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""

ONNX_PROBE = """
import json, sys
found = {}
try:
    import onnxruntime
    found["version"] = onnxruntime.__version__
    found["providers"] = onnxruntime.get_available_providers()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
else:
    if sys.argv[1:]:
        try:
            session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
            found["inputs"] = [list(i.shape) for i in session.get_inputs()]
            found["outputs"] = [list(o.shape) for o in session.get_outputs()]
        except Exception as error:
            found["model_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is, in a few words.
        status: ``ok``, ``warn`` (the suite runs, with less) or ``fail`` (a run would end in an error).
        detail: what was found.
        remedy: what to do about it; None where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """The fields by name, for JSON."""
        return asdict(self)


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def probe(source: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python code that prints one JSON object, in a child process of this interpreter.

    Returns:
        What it printed; ``{"crash": why}`` where it died, hung or printed something else.
    """
    # -P: a file called torch.py in the current folder must not be taken for torch.
    command = [sys.executable, "-P", "-c", source, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PROBE_TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"crash": f"no answer within {PROBE_TIMEOUT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            found = json.loads(lines[-1])
        except json.JSONDecodeError:
            return {"crash": f"unexpected output: {_one_line(done.stdout)}"}
        if isinstance(found, dict):
            return found
        return {"crash": f"unexpected output: {_one_line(done.stdout)}"}
    if done.returncode < 0:
        return {"crash": f"killed by {signal.Signals(-done.returncode).name}"}
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return {"crash": _one_line(last[0])}


def installed(distribution: str) -> str | None:
    """Version of an installed distribution from its metadata, without importing it; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- Python and packages ---------------------------------------------------------------------------


def check_python(version: tuple[int, int, int] = sys.version_info[:3]) -> Check:
    """The interpreter's version."""
    detail = f"{'.'.join(map(str, version))} ({platform.system()} {platform.machine()})"
    if version[:2] < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        return Check("Python", "fail", detail, f"make a virtual environment with Python {wanted} or later")
    return Check("Python", "ok", detail)


def unmet(requirements: Collection[str], extra: str = "") -> list[str]:
    """The requirements (PEP 508 strings) of one extra, or of none, that the installed versions do not meet."""
    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, requirements):
        if extra and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue  # a requirement of the project itself
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = installed(requirement.name)
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
        return [
            Check("dependencies", "warn", f"{DISTRIBUTION} is not installed, so they are unknown", "pip install -e .")
        ]
    requirements = importlib.metadata.requires(DISTRIBUTION) or []
    problems = unmet(requirements)
    checks = [
        Check("dependencies", "fail", "; ".join(problems), f"pip install --upgrade {DISTRIBUTION}")
        if problems
        else Check("dependencies", "ok", f"{DISTRIBUTION} {metadata['Version']}, all installed")
    ]
    for extra in metadata.get_all("Provides-Extra") or []:
        absent = unmet(requirements, extra)
        if absent:
            detail = f"not installed ({'; '.join(absent)})"
            checks.append(
                Check(f"extra {extra!r}", "ok", detail, f"only if wanted: pip install '{DISTRIBUTION}[{extra}]'")
            )
        else:
            checks.append(Check(f"extra {extra!r}", "ok", "installed"))
    return checks


def check_torch(found: Mapping[str, Any]) -> list[Check]:
    """torch and torchvision, one at a time and as a pair.

    Args:
        found: what :data:`TORCH_PROBE` printed.
    """
    torch, vision = installed("torch"), installed("torchvision")
    if "crash" in found or "torch_error" in found:
        reason = _one_line(found.get("crash") or found["torch_error"])
        if torch is None:
            return [Check("torch", "fail", f"not installed ({reason})", "pip install torch torchvision")]
        return [Check("torch", "fail", f"{torch} is installed and does not import: {reason}", ONE_INDEX)]
    checks = [Check("torch", "ok", f"{found['torch']} ({_build(found)})")]
    if "torchvision_error" not in found:
        detail = f"{found['torchvision']}, its operators load with torch {found['torch']}"
        return [*checks, Check("torchvision", "ok", detail)]
    reason = _one_line(found["torchvision_error"])
    if vision is None and "ModuleNotFoundError" in reason:
        return [*checks, Check("torchvision", "fail", "not installed", ONE_INDEX)]
    if "torchvision::nms" in reason or "undefined symbol" in reason:
        detail = (
            f"torchvision {vision} was built for another torch than the {found['torch']} ({_build(found)}) that is "
            f"installed, so its compiled operators are not loaded ({reason})"
        )
    else:
        detail = f"{vision} does not import with torch {found['torch']}: {reason}"
    return [*checks, Check("torchvision", "fail", detail, ONE_INDEX)]


def _build(found: Mapping[str, Any]) -> str:
    return f"CUDA {found['cuda_build']} build" if found.get("cuda_build") else "CPU-only build"


# -- Hardware --------------------------------------------------------------------------------------


def nvidia_driver_present() -> bool:
    """Whether an NVIDIA driver is loaded here, whatever torch makes of it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def check_devices(found: Mapping[str, Any], driver: bool) -> Check:
    """Accelerators and bfloat16.

    Args:
        found: what :data:`TORCH_PROBE` printed.
        driver: whether an NVIDIA driver is there.
    """
    if "torch" not in found:
        return Check("devices", "warn", "unknown while torch does not import")
    if devices := found.get("devices"):
        names = ", ".join(f"{d['name']} ({d['memory'] / GIGABYTE:.0f} GB)" for d in devices)
        if found["bf16"]:
            return Check("devices", "ok", f"{names}; bfloat16")
        return Check("devices", "warn", f"{names}; no bfloat16, so training runs in float32, more slowly")
    if found.get("mps"):
        return Check("devices", "ok", "Apple GPU (mps)")
    if driver and not found["cuda_build"]:
        remedy = "install a CUDA build of both: pip install --force-reinstall torch torchvision"
        return Check("devices", "warn", "an NVIDIA driver is here, and torch is a CPU-only build", remedy)
    if driver:
        detail = f"an NVIDIA driver is here, and torch (CUDA {found['cuda_build']}) finds no usable GPU"
        remedy = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES; an old driver needs an update or an older torch"
        return Check("devices", "warn", detail, remedy)
    return Check("devices", "ok", "CPU only")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by a cgroup quota (version 2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def check_threads(threads: int | None, cores: int) -> Check:
    """torch's threads against the usable cores."""
    if threads is None:
        return Check("CPU", "ok", f"{cores} usable cores")
    detail = f"{cores} usable cores, torch uses {threads} threads"
    if threads > cores:
        return Check("CPU", "warn", f"{detail}: they get in each other's way", f"export OMP_NUM_THREADS={cores}")
    return Check("CPU", "ok", detail)


def check_memory(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> Check:
    """Memory that is free for this process."""
    import psutil

    available = psutil.virtual_memory().available
    total = psutil.virtual_memory().total
    # Where there is no cgroup (version 2) limit, the file is absent or says "max".
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(limit_file.read_text(encoding="ascii")))
    available = min(available, total)
    detail = f"{available / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB available"
    if available < COMFORTABLE_MEMORY:
        return Check("memory", "warn", detail, "close something, or take --preset quick and a smaller batch_size")
    return Check("memory", "ok", detail)


# -- Folders and files -----------------------------------------------------------------------------


def check_folder(name: str, folder: Path, flag: str) -> Check:
    """Whether ``folder`` can be made (or is there), written to, and has room. Leaves nothing behind.

    Args:
        name: of the check.
        folder: need not exist.
        flag: how to choose another folder, for the remedy.
    """
    folder = folder.absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not place.is_dir():
        return Check(name, "fail", f"{place} is a file", f"choose another folder with {flag}")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check(name, "fail", f"{place} is not writable: {error.strerror}", f"choose another folder with {flag}")
    free = shutil.disk_usage(place).free
    detail = f"{folder}, {free / GIGABYTE:.1f} GB free"
    if free < MINIMUM_DISK:
        return Check(name, "fail", detail, f"free some disk space, or choose another folder with {flag}")
    if free < COMFORTABLE_DISK:
        return Check(name, "warn", detail, "enough for a small run; free some disk space before a large one")
    return Check(name, "ok", detail)


def torch_hub_checkpoints(environment: Mapping[str, str]) -> Path:
    """Where ``torch.hub`` keeps checkpoints, by its documented rule and without importing torch."""
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(environment.get("TORCH_HOME") or cache / "torch").expanduser() / "hub" / "checkpoints"


def check_lpips(environment: Mapping[str, str]) -> Check:
    """The AlexNet trunk that LPIPS needs; without it LPIPS is null, never computed on a random trunk."""
    named = environment.get("BENCH_LPIPS_WEIGHTS")
    default = torch_hub_checkpoints(environment) / LPIPS_TRUNK
    path = Path(named) if named else default
    get = f"download {LPIPS_TRUNK_URL} to {default}, or point BENCH_LPIPS_WEIGHTS to a copy"
    if not path.is_file():
        if named:
            return Check("LPIPS weights", "fail", f"BENCH_LPIPS_WEIGHTS={named} is no file", get)
        return Check("LPIPS weights", "warn", f"{path} is not there: LPIPS is left out (null)", get)
    try:
        digest = sha256(path)
    except OSError as error:
        return Check("LPIPS weights", "fail", f"{path} cannot be read: {error.strerror}", get)
    if not digest.startswith(LPIPS_TRUNK_SHA256_PREFIX):
        detail = f"{path} has SHA-256 {digest[:8]}…, not {LPIPS_TRUNK_SHA256_PREFIX}…: truncated, or another network"
        return Check("LPIPS weights", "fail" if named else "warn", detail, get)
    return Check("LPIPS weights", "ok", f"{path} (checksum right)")


def check_evaluator(found: Mapping[str, Any], environment: Mapping[str, str]) -> list[Check]:
    """onnxruntime, and the evaluator that BENCH_EVALUATOR names.

    Args:
        found: what :data:`ONNX_PROBE` printed.
        environment: the environment variables.
    """
    path = environment.get("BENCH_EVALUATOR")
    reason = found.get("crash") or found.get("error")
    if reason:
        status: Status = "fail" if path else "warn"
        detail = f"does not import: {_one_line(reason)}; an ONNX evaluator cannot be used"
        return [Check("onnxruntime", status, detail, "pip install --force-reinstall onnxruntime")]
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in found["providers"])
    checks = [Check("onnxruntime", "ok", f"{found['version']} ({providers})")]
    remedy = "point BENCH_EVALUATOR to an ONNX face recogniser, or unset it: one is then trained in each run"
    if not path:
        detail = "BENCH_EVALUATOR is not set: each run trains its own judge of identity leakage"
        return [*checks, Check("evaluator", "ok", detail)]
    if not Path(path).is_file():
        return [*checks, Check("evaluator", "fail", f"BENCH_EVALUATOR={path} is no file", remedy)]
    if "model_error" in found:
        detail = f"{path} is no model that onnxruntime can load: {_one_line(found['model_error'])}"
        return [*checks, Check("evaluator", "fail", detail, remedy)]
    inputs, outputs = found["inputs"], found["outputs"]
    shapes = f"{' '.join(map(str, inputs))} -> {' '.join(map(str, outputs))}"
    if len(inputs) != 1 or len(inputs[0]) != 4 or inputs[0][1] != 3 or len(outputs[0]) != 2:
        detail = f"{path} maps {shapes}, not (N, 3, H, W) to (N, D)"
        return [*checks, Check("evaluator", "fail", detail, remedy)]
    return [*checks, Check("evaluator", "ok", f"{path}: {shapes}")]


def check_data_root(environment: Mapping[str, str]) -> Check:
    """The real faces that BENCH_DATA_ROOT names."""
    named = environment.get("BENCH_DATA_ROOT")
    if not named:
        return Check("data", "ok", "BENCH_DATA_ROOT is not set: synthetic faces unless --data-root is given")
    root = Path(named)
    remedy = "point BENCH_DATA_ROOT to a face dataset, or unset it"
    if not root.exists():
        return Check("data", "fail", f"BENCH_DATA_ROOT={named} does not exist", remedy)
    try:
        if root.is_file():
            with root.open("rb"):
                return Check("data", "ok", f"{root} (one file)")
        names = {entry.name for entry in root.iterdir()}
    except OSError as error:
        return Check("data", "fail", f"{root} cannot be read: {error.strerror}", remedy)
    if not names:
        return Check("data", "fail", f"{root} is empty", remedy)
    known = [name for name in ("train.rec", "train.idx", "property", "pairs.txt") if name in names]
    packs = sorted(name for name in names if name.endswith(".bin"))
    folders = sum((root / name).is_dir() for name in names)
    detail = ", ".join([*known, *packs, *([f"{folders} folders"] if folders else [])]) or f"{len(names)} files"
    if ("train.rec" in names) != ("train.idx" in names):
        missing = "train.idx" if "train.rec" in names else "train.rec"
        return Check("data", "fail", f"{root} holds {detail}; {missing} is missing", remedy)
    return Check("data", "ok", f"{root}: {detail}")


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where downloads are kept: BENCH_CACHE, else the user's cache folder."""
    import platformdirs

    named = environment.get("BENCH_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path(DISTRIBUTION)


def check_lfw(folder: Path) -> Check:
    """Labeled Faces in the Wild where it is downloaded to; only ``--dataset lfw`` needs it."""
    names = sorted(entry.name for entry in folder.glob("lfw*")) if folder.is_dir() else []
    if names:
        return Check("LFW", "ok", f"in {folder}: {', '.join(names)}")
    return Check("LFW", "ok", f"not in {folder}", "only if wanted: --dataset lfw downloads it on first use")


def check_variables(environment: Mapping[str, str]) -> Check:
    """BENCH_* variables; those that mean nothing are warned of, since the prefix may be somebody else's, too."""
    names = sorted(name for name in environment if name.startswith(PREFIX))
    if unknown := unknown_variables(environment):
        return Check("environment", "warn", f"unknown: {', '.join(unknown)}", "unset them if they were meant for bench")
    return Check("environment", "ok", f"set: {', '.join(names)}" if names else "no BENCH_* variable is set")


# -- All of it -------------------------------------------------------------------------------------


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


def diagnose(
    *,
    out: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Check]:
    """Look at everything a run depends on.

    Args:
        out: the folder for runs; by default ``BENCH_OUT``, else ``runs``.
        environment: environment variables; by default those of this process.

    Returns:
        The checks in reading order. ``fail`` stands for something without which a run ends in an error.
    """
    environment = dict(os.environ) if environment is None else environment
    out = Path(environment.get("BENCH_OUT") or "runs") if out is None else out
    evaluator = environment.get("BENCH_EVALUATOR")
    torch = probe(TORCH_PROBE, environment=environment)
    onnx = probe(ONNX_PROBE, *([evaluator] if evaluator else []), environment=environment)
    each: list[tuple[str, Callable[[], Check | list[Check]]]] = [
        ("Python", check_python),
        ("torch", functools.partial(check_torch, torch)),
        ("dependencies", check_dependencies),
        ("devices", lambda: check_devices(torch, nvidia_driver_present())),
        ("CPU", lambda: check_threads(torch.get("threads"), usable_cores())),
        ("memory", check_memory),
        ("run folder", functools.partial(check_folder, "run folder", out, "--out")),
        ("cache folder", lambda: check_folder("cache folder", cache_folder(environment), "BENCH_CACHE")),
        ("evaluator", functools.partial(check_evaluator, onnx, environment)),
        ("LPIPS weights", functools.partial(check_lpips, environment)),
        ("data", functools.partial(check_data_root, environment)),
        ("LFW", lambda: check_lfw(cache_folder(environment) / "lfw")),
        ("environment", functools.partial(check_variables, environment)),
    ]
    return [check for name, function in each for check in _guarded(name, function)]


def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, what is missing and how to get it."""
    checks = diagnose()
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        rows = ((Text(c.status, style=colours[c.status]), c.name, c.detail, c.remedy) for c in checks)
        stdout.print(table(rows, "", "check", "found", "what to do"))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(MissingError.exit_code)
