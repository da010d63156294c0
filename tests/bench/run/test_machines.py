"""Devices and precision by name."""

from __future__ import annotations

import gc
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models import linear_model

from bench.errors import UsageError
from bench.nets.checkpoints import load_recogniser
from bench.run.launch import FreeCores, Launch, forget_peak, peak_bytes
from bench.run.machines import (
    choose_machine,
    make_shared_fabric,
    native_bfloat16,
    resolve_precision,
    use_free_cores,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_cpu():
    fabric = choose_machine("cpu", "32-true").fabric
    assert fabric.device == torch.device("cpu")
    assert fabric._precision.precision == "32-true"


def test_auto_takes_what_is_there():
    kind = choose_machine("auto", "auto").device.type
    assert kind == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cpu:1", "cuda:x", "", "mps:0"])
def test_unknown(name):
    with pytest.raises(UsageError, match="unknown device"):
        choose_machine(name, "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent():
    with pytest.raises(UsageError, match="no CUDA device here"):
        choose_machine("cuda", "auto")


def test_neither_fabric_nor_what_a_run_prints_brings_what_draws(tmp_path):
    (tmp_path / "torchmetrics.py").write_text("import matplotlib\n__version__ = '1.0'")
    code = (
        "import sys, reports.terminal\n"
        "from bench.run.machines import choose_machine\n"
        "choose_machine('cpu', '32-true').fabric\n"
        "heavy = {'torchmetrics', 'matplotlib', 'torchvision', 'scipy.stats', 'scipy.signal'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import torchmetrics\n"
        "assert 'matplotlib' in sys.modules"
    )
    found = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_torchrun_there_is_one_process():
    assert Launch.here({}) == Launch.here({"WORLD_SIZE": "4", "RANK": "1"}) == Launch(0, 1, 0, 1)  # another launcher's
    assert Launch.here({}).leads


def test_torchrun_is_noticed():
    launch = Launch.here(TORCHRUN)
    assert launch == Launch(rank=3, size=4, local_rank=1, local_size=2)
    assert not launch.leads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "x"}, "torchrun's environment is incomplete"),
        ({"WORLD_SIZE": "5"}, "5 processes do not divide into machines of 2"),
    ],
)
def test_an_impossible_launch_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        Launch.here(TORCHRUN | change)
    with pytest.raises(UsageError, match="incomplete"):
        Launch.here({name: value for name, value in TORCHRUN.items() if name != "RANK"})


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
def test_each_process_takes_the_gpu_of_its_number():
    def choose(device, launch):
        return choose_machine(device, "32-true", launch).device

    assert choose("cuda", Launch.here(TORCHRUN)) == torch.device("cuda", 1)
    assert choose("auto", Launch()) == torch.device("cuda", 0)
    assert choose("cuda:2", Launch()) == torch.device("cuda", 2)
    with pytest.raises(UsageError, match="cuda:2 is one device: under torchrun use --device cuda"):
        choose("cuda:2", Launch.here(TORCHRUN))
    with pytest.raises(UsageError, match="no device cuda:4 here: there are 4"):
        choose("cuda", Launch(4, 5, 4, 5))


def test_processes_cannot_share_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="MPS is one device"):
        make_shared_fabric("mps", "32-true", Launch(0, 2, 0, 2))


ROOT = Path(__file__).parents[3]
RUN = (
    *("run", "--defense", "none", "--attack", "linear", "--preset", "quick", "--head", "partial-fc", "--device", "cpu"),
    *("--image-size", "32", "--probes", "4", "--set", "training.epochs=2", "--set", "training.batch_size=16"),
    *("--set", "training.sample_rate=0.5", "--set", "dataset_options.identities=30"),
    *("--set", "dataset_options.images_per_identity=6", "--json"),
)


TORCHRUN_TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(folder: Path, *commands: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The commands of ``bench``, one after another in the same two processes."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *TORCHRUN_TWO, str(ROOT / "tests" / "support" / "runs_at_work.py"), json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_two_processes_make_one_run_and_end_together_where_one_fails(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(3 * 8 * 8, 12)).astype(np.float32)
    teacher = linear_model(tmp_path / "teacher.onnx", weights, ("n", 3, 8, 8))
    good = (*RUN, "--teacher", str(teacher), "--set", "training.classification=1")
    diverging = (*RUN, "--set", "training.learning_rate=1e30", "--out", "broken")
    done = torchrun(tmp_path, good, diverging)
    assert done.returncode != 0
    assert [json.loads((tmp_path / f"codes-{rank}.json").read_text()) for rank in (0, 1)] == [[0, 3]] * 2, done.stderr
    result, end = json.JSONDecoder().raw_decode(done.stdout)
    failed = json.loads(done.stdout[end:])  # a document each: one process printed
    assert result["status"] == "success"
    (directory,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "cache")
    assert json.loads((directory / "metrics.json").read_text())["run_id"] == result["run_id"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["processes"], manifest["status"]) == (2, "success")
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("started") == 1
    trained = [event for event in events if event.get("task", "").startswith("train provider")]
    assert trained[-1]["done"] == trained[-1]["total"]
    (file,) = (tmp_path / "runs" / "cache").glob("recogniser-provider-none-*/recogniser.safetensors")
    recogniser, details = load_recogniser(file)
    assert (details["processes"], recogniser.spec.embedding_size) == (2, 12)
    assert not list((tmp_path / "runs" / "cache").glob("*.partial"))
    said = [line for line in done.stderr.splitlines() if line.startswith("bench: ")]
    assert len(said) == 1
    assert "training diverged" in said[0]
    assert failed["status"] == "error"


@pytest.mark.parametrize(
    ("precision", "native", "expected"),
    [("auto", True, "bf16-mixed"), ("auto", False, "32-true"), ("16-mixed", True, "16-mixed")],
)
def test_auto_is_bfloat16_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, native: bool, expected: str
) -> None:
    monkeypatch.setattr("bench.run.machines.native_bfloat16", lambda _: native)
    assert resolve_precision(precision, torch.device("cpu")) == expected


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision '64-true'"):
        resolve_precision("64-true", torch.device("cpu"))


@pytest.mark.parametrize("probe", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_processor_is_asked_for_bfloat16_and_may_not_know(monkeypatch: pytest.MonkeyPatch, probe: str) -> None:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in probes:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not native_bfloat16(torch.device("cpu"))  # an older torch
    for name in probes:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not native_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, probe, lambda: True, raising=False)
    assert native_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cuda_has_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_bfloat16(torch.device("cuda")) is native
    assert not native_bfloat16(torch.device("mps"))


# -- threads beside neighbours -----------------------------------------------------------------------


class Watched(FreeCores):
    """Four cores; what each reading says is set by the test."""

    def __init__(self, *readings):
        self._readings = iter(readings)
        super().__init__()
        self._cores = [0, 1, 2, 3]

    def _read(self):
        return next(self._readings)


@pytest.mark.parametrize(
    ("idle", "own", "free"),
    [(40.0, 0.0, 4), (20.0, 0.0, 2), (20.0, 10.0, 3), (0.0, 0.0, 0), (0.0, 10.0, 1), (39.0, 9.0, 4)],
)
def test_cores_are_free_where_they_idle_or_work_for_us(idle, own, free):
    assert Watched((5.0, 100.0, 1.0), (5.0 + idle, 140.0, 1.0 + own)).count() == pytest.approx(free)


def test_a_system_that_says_nothing_leaves_the_threads_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    assert Watched((0.0, 0.0, 0.0), (0.0, 0.0, 1.0)).count() is None
    assert use_free_cores(Watched((0.0, 0.0, 0.0), (0.0, 0.0, 1.0))) is None
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("idle", "remembered", "pinned", "threads"),
    [
        (40.0, None, False, 4),
        (18.0, None, False, 2),
        (0.0, None, False, 1),
        (40.0, 3, False, 3),
        (0.0, 3, False, 3),
        (40.0, 8, False, 4),
        (0.0, 1, True, 4),
    ],
)
def test_threads_are_those_that_are_free_remembered_or_pinned(
    monkeypatch, set_threads, idle, remembered, pinned, threads
):
    if not pinned:
        monkeypatch.delenv("OMP_NUM_THREADS")
    set_threads(4)
    note = use_free_cores(Watched((0.0, 0.0, 0.0), (idle, 40.0, 0.0)), remembered)
    assert torch.get_num_threads() == threads
    assert (note is None) == (threads == 4)
    assert note is None or f"{threads} of 4" in note


def test_the_counters_of_this_machine_are_read():
    free = FreeCores()
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    counted = free.count()
    # A tenth of a second of our own counts as free, whatever others do.
    assert counted is None or 0 < counted <= os.cpu_count()


_TOUCH = """
import ctypes, resource, sys
from bench.run.launch import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        pieces = [library.malloc(4 << 20) for _ in range(4)]
        for piece in pieces:
            library.memset(ctypes.c_void_p(piece), 1, 4 << 20)
        for piece in pieces:
            library.free(ctypes.c_void_p(piece))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")
def test_memory_that_is_freed_is_faulted_in_once() -> None:
    """Twenty rounds of four pieces of 4 MiB, each a thousand pages, that are written and freed."""
    told = subprocess.run([sys.executable, "-c", _TOUCH], capture_output=True, text=True, check=True).stdout
    returned, kept = map(int, told.split())
    assert kept < 100 < returned


def test_the_peak_of_memory_starts_anew():
    gc.collect()  # what other tests have left is not to be given back in between
    if not forget_peak():
        pytest.skip("the system keeps no peak that can be reset")
    before = peak_bytes()
    # Straight from the system: an allocator may have kept what other tests freed, which is resident as it is.
    with mmap.mmap(-1, 50 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert peak_bytes() - before > 40 * 2**20
    assert forget_peak()
    assert peak_bytes() - before < 20 * 2**20
