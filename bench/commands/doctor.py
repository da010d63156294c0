"""``bench doctor``: what works on this machine, what is missing, and how to get it.

Compiled dependencies are imported in a child process only, so that a broken installation (a missing library, a torch
and a torchvision of different builds, a crash at import) is reported instead of ending the report.
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

#: ImageNet's AlexNet, on which LPIPS stands; as in ``bench.metrics.perceptual``, which needs torch.
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


# -- Python and packages ---------------------------------------------------------------------------


def check_python() -> Check:
    """The interpreter; one that is too old cannot even import this."""
    return Check("Python", "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})")


def unmet(requirements: Collection[str], extra: str = "") -> list[str]:
    """The requirements (PEP 508 strings) of one extra, or of none, that the installed versions do not meet."""
    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue  # a requirement of the project itself
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
        detail = f"{DISTRIBUTION} is not installed, so they are unknown"
        return [Check("dependencies", "warn", detail, "pip install -e .")]
    requirements = importlib.metadata.requires(DISTRIBUTION) or []
    checks = [Check("dependencies", "ok", f"{DISTRIBUTION} {metadata['Version']}, all installed")]
    if problems := unmet(requirements):
        checks = [Check("dependencies", "fail", "; ".join(problems), f"pip install --upgrade {DISTRIBUTION}")]
    for extra in metadata.get_all("Provides-Extra") or []:
        absent = unmet(requirements, extra)
        detail = f"not installed ({'; '.join(absent)})" if absent else "installed"
        remedy = f"only if wanted: pip install '{DISTRIBUTION}[{extra}]'" if absent else None
        checks.append(Check(f"extra {extra!r}", "ok", detail, remedy))
    return checks


def check_torch(found: Mapping[str, Any]) -> list[Check]:
    """torch and torchvision, one at a time and as a pair; ``found`` is what :data:`TORCH_PROBE` printed."""
    torch, vision = installed("torch"), installed("torchvision")
    if reason := found.get("crash") or found.get("torch_error"):
        if torch is None:
            return [Check("torch", "fail", f"not installed ({_one_line(reason)})", "pip install torch torchvision")]
        detail = f"{torch} is installed and does not import: {_one_line(reason)}"
        return [Check("torch", "fail", detail, ONE_INDEX)]
    build = f"CUDA {found['cuda_build']} build" if found.get("cuda_build") else "CPU-only build"
    checks = [Check("torch", "ok", f"{found['torch']} ({build})")]
    reason = _one_line(found.get("torchvision_error", ""))
    if not reason:
        detail = f"{found['torchvision']}, its operators load with torch {found['torch']}"
        return [*checks, Check("torchvision", "ok", detail)]
    detail = f"{vision} does not import with torch {found['torch']}: {reason}"
    if vision is None and "ModuleNotFoundError" in reason:
        detail = "not installed"
    elif "torchvision::nms" in reason or "undefined symbol" in reason:
        detail = (
            f"torchvision {vision} was built for another torch than the {found['torch']} ({build}) that is installed, "
            f"so its compiled operators are not loaded ({reason})"
        )
    return [*checks, Check("torchvision", "fail", detail, ONE_INDEX)]


# -- Hardware --------------------------------------------------------------------------------------


def nvidia_driver_present() -> bool:
    """Whether an NVIDIA driver is loaded here, whatever torch makes of it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def check_devices(found: Mapping[str, Any], driver: bool) -> Check:
    """Accelerators and bfloat16, by what :data:`TORCH_PROBE` printed and whether an NVIDIA ``driver`` is there."""
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

    memory = psutil.virtual_memory()
    total = memory.total
    # Where there is no cgroup (version 2) limit, the file is absent or says "max".
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(limit_file.read_text(encoding="ascii")))
    available = min(memory.available, total)
    detail = f"{available / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB available"
    if available < COMFORTABLE_MEMORY:
        return Check("memory", "warn", detail, "close something, or take --preset quick and a smaller batch_size")
    return Check("memory", "ok", detail)


# -- Folders and files -----------------------------------------------------------------------------


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
    if free < MINIMUM_DISK:
        return Check(name, "fail", detail, f"free some disk space, or {choose}")
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
    """onnxruntime, by what :data:`ONNX_PROBE` printed, and the evaluator that BENCH_EVALUATOR names."""
    path = environment.get("BENCH_EVALUATOR")
    if reason := found.get("crash") or found.get("error"):
        detail = f"does not import: {_one_line(reason)}; an ONNX evaluator cannot be used"
        status: Status = "fail" if path else "warn"
        return [Check("onnxruntime", status, detail, "pip install --force-reinstall onnxruntime")]
    providers = ", ".join(provider.removesuffix("ExecutionProvider") for provider in found["providers"])
    runtime = Check("onnxruntime", "ok", f"{found['version']} ({providers})")
    if not path:
        detail = "BENCH_EVALUATOR is not set: each run trains its own judge of identity leakage"
        return [runtime, Check("evaluator", "ok", detail)]
    shapes = f"{' '.join(map(str, found.get('inputs', ())))} -> {' '.join(map(str, found.get('outputs', ())))}"
    if not Path(path).is_file():
        problem = f"BENCH_EVALUATOR={path} is no file"
    elif "model_error" in found:
        problem = f"{path} is no model that onnxruntime can load: {_one_line(found['model_error'])}"
    elif (
        [len(shape) for shape in found["inputs"]] != [4] or found["inputs"][0][1] != 3 or len(found["outputs"][0]) != 2
    ):
        problem = f"{path} maps {shapes}, not (N, 3, H, W) to (N, D)"
    else:
        return [runtime, Check("evaluator", "ok", f"{path}: {shapes}")]
    remedy = "point BENCH_EVALUATOR to an ONNX face recogniser, or unset it: one is then trained in each run"
    return [runtime, Check("evaluator", "fail", problem, remedy)]


def _embeds_faces(inputs: list[list[Any]], outputs: list[list[Any]]) -> bool:
    return [len(shape) for shape in inputs] == [4] and inputs[0][1] == 3 and len(outputs[0]) == 2


def check_data_root(environment: Mapping[str, str]) -> Check:
    """The real faces that BENCH_DATA_ROOT names."""
    named = environment.get("BENCH_DATA_ROOT")
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
    if missing := {"train.rec", "train.idx"} - names if {"train.rec", "train.idx"} & names else set():
        raise ValueError(f"holds {described}; {missing.pop()} is missing")
    return described


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


def diagnose(*, out: Path | None = None, environment: Mapping[str, str] | None = None) -> list[Check]:
    """Look at everything a run depends on; ``fail`` stands for something without which a run ends in an error.

    Args:
        out: the folder for runs; by default ``BENCH_OUT``, else ``runs``.
        environment: environment variables; by default those of this process.
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
