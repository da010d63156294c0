"""What runs how fast on this machine: the rows of ``bench speed``.

Each row times one of the suite's operations and, where there is one, the plain way of doing the same, in turns and in
one process: other load then slows both, and their ratio says more than either figure.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from attacks.base import Adversary, Knowledge, Observation, RecoveryAttack
from bench import __version__
from bench.data.decode import AT_ONCE, by_threads, decode_batch, decode_image, in_array, workers
from bench.data.faces import FaceSet
from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.graphs import BEFORE_CAPTURE
from bench.images import ssim, to_float
from bench.metrics.image_quality import ssim_and_psnr
from bench.nets.recogniser import InputNormalisation, build_recogniser
from bench.plugins import make_attack, make_defense
from bench.progress import Report, no_report
from bench.recognition.learner import make_learner
from bench.recognition.options import TrainingOptions
from bench.recognition.training import build_head
from bench.registry import pick
from bench.run.launch import forget_peak, peak_bytes
from bench.run.machines import choose_machine, synchronise
from bench.run.textbook import textbook_spectrum, textbook_unet
from defenses.frequency import CHANNELS, block_dct

#: Faces of a batch, and sides in pixels of faces to protect or read, and of those that networks are trained on here.
_BATCH, _SIZE, _SMALL = 256, 112, 64
#: Faces at once in the plain ways that take them one by one, or whose up-sampled pictures would not fit into memory.
_PLAIN_BATCH = 8
_IDENTITIES = 1000
#: Files of which a set is read.
_DECODED = 1024
_MOST_ROUNDS = 1000


class SpeedRow(BaseModel):
    """One row of the table. What a row does not measure is null; medians throughout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    what: str
    status: Literal["ok", "skipped", "failed"] = "ok"
    reason: str | None = Field(None, description="Why there are no figures.")
    batch: int | None = Field(None, description="Images a call, or a training step.")
    milliseconds: float | None = Field(None, description="Of a call, or a training step.")
    cpu_milliseconds: float | None = Field(None, description="The same in processor time of all threads.")
    images_per_second: float | None = None
    plain: str | None = Field(None, description="What it is compared with.")
    plain_images_per_second: float | None = None
    ratio: float | None = Field(None, description="Times as fast as the plain way.")
    gigabytes_per_second: float | None = Field(None, description="Read and written.")
    times_writing: float | None = Field(
        None, description="Time over that of writing the result alone, at the rate at which the device copies."
    )
    process_bytes: int | None = Field(None, description="Peak resident memory of the process during the row (Linux).")
    device_bytes: int | None = Field(None, description="Peak memory allocated on the accelerator during the row.")
    seconds: float = Field(0.0, description="That the row took, preparations included.")


class SpeedTable(BaseModel):
    """The rows, and the machine that they were measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    python: str
    torch: str
    device: str
    device_name: str
    precision: str
    threads: int
    load: float | None = Field(None, description="Processes that wanted a core in the minute before, on average.")
    rows: tuple[SpeedRow, ...]


class _Skipped(Exception):
    """Why a row has no figures here."""


@dataclass(frozen=True, slots=True)
class _Times:
    """Medians of a call: seconds by the clock, and of processor time."""

    wall: float
    processor: float


def race(ways: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, _Times]:
    """Time several ways of one thing in turns, after a call of each that is not timed.

    Rounds go on for about so many ``seconds``; there is at least one. Each call is timed by itself between two
    synchronisations of ``device``.

    >>> sorted(race({"slow": lambda: sum(range(10_000)), "fast": lambda: None}, torch.device("cpu"), 0.01))
    ['fast', 'slow']
    """
    for operation in ways.values():
        operation()
    synchronise(device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    end = time.monotonic() + seconds
    for _ in range(_MOST_ROUNDS):
        for name, operation in ways.items():
            processor, wall = time.process_time(), time.perf_counter()
            operation()
            synchronise(device)
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
        if time.monotonic() >= end:
            break
    return {name: _Times(*np.median(taken, axis=0).tolist()) for name, taken in times.items()}


@dataclass(eq=False)  # two are never the same, so that its faces can be kept
class _Machine:
    """Where rows are measured, and what several of them need."""

    fabric: Fabric
    seconds: float

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def copied_bytes_per_second(self) -> float:
        """Bytes read and written in a second by copying memory of the device, past its caches."""
        source = torch.ones(2**28 if self.cuda else 2**26, device=self.device)
        target = torch.empty_like(source)
        taken = race({"copy": lambda: target.copy_(source)}, self.device, min(1.0, self.seconds))["copy"]
        return 2 * source.nbytes / taken.wall

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long as the table is made
    def faces(self, size: int) -> tuple[Tensor, Tensor]:
        """Synthetic faces, uint8 (256, 3, size, size) on the CPU, and whose they are, int64 (256,).

        Large ones take long to draw, and nothing is learnt from them here: they are four times the same.
        """
        repeats = 4 if size > _SMALL else 1
        options = SyntheticOptions(identities=32 // repeats, images_per_identity=_BATCH // 32, image_size=size)
        faces = load_synthetic(options, device=self.device).faces
        assert isinstance(faces, FaceSet)
        return faces.images.repeat(repeats, 1, 1, 1), faces.labels.repeat(repeats)

    def compare(
        self,
        ours: Callable[[], object],
        images: int,
        plain: Callable[[], object] | None = None,
        plain_images: int | None = None,
        *,
        calls: int = 1,
    ) -> dict[str, Any]:
        """Figures of a call of ``ours`` and of ``plain``, which do ``calls`` things of so many images each."""
        ways = {"ours": ours} if plain is None else {"ours": ours, "plain": plain}
        taken = race(ways, self.device, self.seconds)
        figures = {
            "batch": images,
            "milliseconds": 1e3 * taken["ours"].wall / calls,
            "cpu_milliseconds": 1e3 * taken["ours"].processor / calls,
            "images_per_second": calls * images / taken["ours"].wall,
        }
        if plain is not None:
            figures["plain_images_per_second"] = rate = calls * (plain_images or images) / taken["plain"].wall
            figures["ratio"] = figures["images_per_second"] / rate
        return figures


# -- rows ----------------------------------------------------------------------------------------


def _copy(machine: _Machine) -> dict[str, Any]:
    return {"gigabytes_per_second": machine.copied_bytes_per_second / 1e9}


def _faces_at_once(machine: _Machine, written: int) -> int:
    """Faces of a batch, of each of which so many bytes are ``written``.

    On a GPU so many that launches are no part of the time, and their results a quarter of the free memory.
    """
    if not machine.cuda:
        return _BATCH
    free, _ = torch.cuda.mem_get_info(machine.device)
    return next((n for n in (times * _BATCH for times in (32, 16, 8, 4, 2)) if 4 * n * written <= free), _BATCH)


@torch.no_grad()
def _protect(
    machine: _Machine, way: Callable[[Tensor], Callable[[], Tensor]], maps: int, count: int | None = None
) -> dict[str, Any]:
    count = count or _faces_at_once(machine, 4 * maps * _SIZE * _SIZE)
    faces = to_float(machine.faces(_SIZE)[0].to(machine.device))
    ours, some = way(faces[torch.arange(count) % len(faces)]), faces[: min(count, _PLAIN_BATCH)]
    figures = machine.compare(ours, count, lambda: textbook_spectrum(some), len(some))
    written = ours().nbytes
    figures["gigabytes_per_second"] = written / figures["milliseconds"] / 1e6
    if machine.cuda:
        figures["times_writing"] = figures["milliseconds"] / 1e3 * machine.copied_bytes_per_second / written
    return figures


def _all_channels(faces: Tensor) -> Callable[[], Tensor]:
    channels = torch.arange(CHANNELS)
    return lambda: block_dct(faces, channels)


def _nine_channels(faces: Tensor) -> Callable[[], Tensor]:
    channels = torch.rand(len(faces), CHANNELS, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :9]
    return lambda: block_dct(faces, channels)


def _partialface(faces: Tensor) -> Callable[[], Tensor]:
    defense, generator = (
        make_defense("partialface", {}, "cpu", _SIZE).to(faces.device),
        torch.Generator().manual_seed(0),
    )
    return lambda: defense.protect(faces, generator).representation


M = TypeVar("M", bound=nn.Module)


def _plain_copy(module: M) -> M:
    """A copy in the order (N, C, H, W) from one convolution to the next."""
    plain = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return plain


def _train_recogniser(machine: _Machine, backbone: str, size: int, channels: int) -> dict[str, Any]:
    batch, steps = (128, 10) if machine.cuda else (32 if size <= _SMALL else 8, 1)
    options = TrainingOptions(compile=size > _SMALL)
    recogniser = build_recogniser(backbone, (channels, size, size), options.embedding_size).to(machine.device)
    head = build_head(options, _IDENTITIES).to(machine.device)
    generator = torch.Generator().manual_seed(0)
    sent = torch.randn(batch, channels, size, size, generator=generator).to(machine.device)
    labels = torch.randint(_IDENTITIES, (batch,), generator=generator).to(machine.device)
    recogniser.train()
    for _ in range(InputNormalisation.measured):
        recogniser.normalisation(sent)
    plain = _plain_copy(nn.Sequential(recogniser.normalisation, recogniser.backbone)).train()
    plain_head = copy.deepcopy(head).train()
    learner = make_learner(recogniser, head, options, machine.fabric)
    optimiser = torch.optim.SGD(
        [*plain.parameters(), *plain_head.parameters()],
        lr=0.01,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        foreach=False,
        fused=False,
    )

    def ours() -> None:
        for _ in range(steps):
            learner.step(sent, labels, rate=0.01, total=batch)

    def theirs() -> None:
        for _ in range(steps):
            loss, _ = plain_head(plain(sent), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss.item()

    if machine.cuda:  # what is captured is timed
        for _ in range(BEFORE_CAPTURE // steps + 1):
            ours()
    return machine.compare(ours, batch, theirs, calls=steps)


class _Enough(Exception):
    """Ends a training that has been timed for long enough."""


def _train_unet(machine: _Machine) -> dict[str, Any]:
    preset = "gpu" if machine.cuda else "cpu"
    images, labels = machine.faces(_SMALL)
    defense = make_defense("partialface", {}, preset, _SMALL)
    # States are neither read nor views tried: what is timed is the training, not what comes before.
    options = {"infer_state": False, "input": "raw", "steps": 10**6, "compile": machine.cuda}
    attack: Any = make_attack("unet", options, preset)
    batch, steps = attack.options.batch_size, 10 if machine.cuda else 1
    faces, generator = images.to(machine.device), torch.Generator().manual_seed(0)

    def plain_steps() -> Callable[[], None]:
        plain = _plain_copy(attack.network).train()
        optimiser = torch.optim.Adam(plain.parameters(), lr=1e-3, foreach=False, fused=False)
        weight = attack.options.ssim_weight if attack.options.loss == "l1+ssim" else 0.0

        def run() -> None:
            for _ in range(steps):
                target = to_float(faces[torch.randint(len(faces), (batch,), generator=generator).to(machine.device)])
                with torch.no_grad():
                    sent = defense.protect(target, generator).representation
                recovered = textbook_unet(plain, sent)
                loss = (recovered - target).abs().mean()
                if weight:
                    loss = loss + weight * (1 - ssim(recovered, target).mean())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                loss.item()

        return run

    def clocks() -> tuple[float, float]:
        synchronise(machine.device)
        return time.perf_counter(), time.process_time()

    ours: list[tuple[float, float]] = []
    plain: list[float] = []
    theirs: Callable[[], None] | None = None
    reached, resumed, end = 0, (0.0, 0.0), 0.0

    def report(done: int, total: int, **_: float) -> None:
        # Steps of the attack's own training lie between two reports, and those of the plain loop within each.
        nonlocal reached, resumed, theirs, end
        now = clocks()
        if machine.cuda and done <= (BEFORE_CAPTURE + 2) * batch:
            return  # not captured yet
        if theirs is None:
            theirs, end = plain_steps(), time.monotonic() + machine.seconds
            theirs()
        else:
            ours.append(((now[0] - resumed[0]) / (done - reached), (now[1] - resumed[1]) / (done - reached)))
            started = clocks()
            theirs()
            plain.append((clocks()[0] - started[0]) / (steps * batch))
            if time.monotonic() > end and len(ours) > 1:
                raise _Enough
        reached, resumed = done, clocks()

    adversary = Adversary(
        faces=faces,
        identities=labels,
        knowledge=Knowledge.WHITEBOX,
        mechanism=lambda _: defense,
        generator=torch.Generator().manual_seed(0),
        fabric=machine.fabric,
        report=report,
    )
    with contextlib.suppress(_Enough):
        attack.learn(adversary)
    wall, processor = np.median(ours, axis=0).tolist()
    rate = 1 / float(np.median(plain))
    return {
        "batch": batch,
        "milliseconds": 1e3 * batch * wall,
        "cpu_milliseconds": 1e3 * batch * processor,
        "images_per_second": 1 / wall,
        "plain_images_per_second": rate,
        "ratio": 1 / wall / rate,
    }


@torch.no_grad()
def _image_quality(machine: _Machine) -> dict[str, Any]:
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        raise _Skipped("scikit-image is not installed: pip install ppfr-bench[speed]") from error
    originals = to_float(machine.faces(_SIZE)[0].to(machine.device))
    recovered = (originals + 0.05 * torch.randn_like(originals)).clamp(0, 1)
    pairs = list(zip(recovered[:_PLAIN_BATCH].cpu().numpy(), originals[:_PLAIN_BATCH].cpu().numpy(), strict=True))
    settings = {"channel_axis": 0, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5}

    def theirs() -> None:
        for first, second in pairs:
            structural_similarity(first, second, use_sample_covariance=False, **settings)
            peak_signal_noise_ratio(second, first, data_range=1.0)

    return machine.compare(lambda: ssim_and_psnr(recovered, originals), len(originals), theirs, len(pairs))


@torch.no_grad()
def _linear(machine: _Machine) -> dict[str, Any]:
    images, labels = machine.faces(_SMALL)
    defense = make_defense("partialface", {"tables": "random", "n_permutations": 1}, "cpu", _SMALL).to(machine.device)
    attack = make_attack("linear", {"rank": 100, "state_faces": 32}, "cpu")
    assert isinstance(attack, RecoveryAttack)
    attack.learn(
        Adversary(
            faces=images.to(machine.device),
            identities=labels,
            knowledge=Knowledge.ORACLE,
            mechanism=lambda _: defense,
            generator=torch.Generator().manual_seed(0),
            fabric=machine.fabric,
        )
    )
    faces, states = to_float(images[:64].to(machine.device)), defense.states()
    assert states is not None
    drawn = states[torch.arange(len(faces)) % len(states)]
    sent = defense.protect(faces, torch.Generator().manual_seed(0), state=drawn)
    assert sent.state is not None
    observation = Observation(sent.representation[:, None], sent.state[:, None])
    return machine.compare(lambda: attack.recover(observation), len(faces))


def _decode(machine: _Machine) -> dict[str, Any]:
    whole = []
    for picture in machine.faces(_SIZE)[0]:
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        whole.append(buffer.getvalue())
    # A set is many times what a thread takes at once; of a batch, starting threads is a part.
    encoded = _DECODED // len(whole) * [in_array(data) for data in whole]
    parts = [encoded[start : start + AT_ONCE] for start in range(0, len(encoded), AT_ONCE)]
    return machine.compare(
        lambda: list(by_threads(lambda part: decode_batch(part, _SIZE), parts, workers())),
        len(encoded),
        # Joined by NumPy, as torch's threads would wait for each other beside busy neighbours.
        lambda: np.stack([decode_image(data, _SIZE).numpy() for data in whole]),
        len(whole),
    )


def _start(machine: _Machine) -> dict[str, Any]:
    taken = []
    for _ in range(2):  # the first one may read from disk
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "bench", "list", "defenses"], check=True, capture_output=True, timeout=120
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        taken.append((time.perf_counter() - started, processor))
    wall, processor = min(taken)
    return {"milliseconds": 1e3 * wall, "cpu_milliseconds": 1e3 * processor}


_TEXTBOOK, _LOOP = "up-sample, convert, cut and transform blocks", "loop in float32, NCHW, optimiser not fused"

#: Name -> what it is, what it is compared with, and how it is measured.
ROWS: dict[str, tuple[str, str | None, Callable[[_Machine], dict[str, Any]]]] = {
    "copy": ("copy memory of the device", None, _copy),
    "protect-192": (
        f"all 192 channels of faces of {_SIZE} px",
        _TEXTBOOK,
        functools.partial(_protect, way=_all_channels, maps=192),
    ),
    "protect-192-one": (
        f"all 192 channels of one face of {_SIZE} px",
        _TEXTBOOK,
        functools.partial(_protect, way=_all_channels, maps=192, count=1),
    ),
    "protect-27": (
        f"partialface, faces of {_SIZE} px",
        f"{_TEXTBOOK}, then choose",
        functools.partial(_protect, way=_partialface, maps=27),
    ),
    "protect-27-dct": (
        "the same transform, without draws and checks",
        f"{_TEXTBOOK}, then choose",
        functools.partial(_protect, way=_nine_channels, maps=27),
    ),
    "protect-27-one": (
        f"partialface, one face of {_SIZE} px",
        f"{_TEXTBOOK}, then choose",
        functools.partial(_protect, way=_partialface, maps=27, count=1),
    ),
    **{
        f"train-{backbone}-{channels}": (
            f"training step of {backbone}, {channels} maps of {size} px",
            _LOOP,
            functools.partial(_train_recogniser, backbone=backbone, size=size, channels=channels),
        )
        for backbone, size in (("ir-tiny", _SMALL), ("ir-18", _SIZE))
        for channels in (3, 27)
    },
    "train-unet": (f"training step of unet behind partialface, {_SMALL} px", _LOOP, _train_unet),
    "image-quality": (f"SSIM and PSNR of {_BATCH} pairs of {_SIZE} px", "loop over scikit-image", _image_quality),
    "linear": (f"linear, 64 faces behind partialface, {_SMALL} px", None, _linear),
    "decode": (f"decode {_DECODED} JPEG of {_SIZE} px", "one at a time", _decode),
    "start": ("bench list defenses", None, _start),
}


# -- the table -----------------------------------------------------------------------------------


def chosen(names: Sequence[str] | None) -> list[str]:
    """The rows of these names, or whose names begin with them (``train`` is every ``train-...``); all for None.

    Raises:
        UsageError: there is no such row.
    """
    if not names:
        return list(ROWS)
    found = {name: [row for row in ROWS if row == name or row.startswith(f"{name}-")] for name in names}
    for name, rows in found.items():
        if not rows:
            pick("row", name, ROWS)
    return [row for row in ROWS if any(row in rows for rows in found.values())]


def measure_rows(
    device: str = "auto", *, seconds: float = 2.0, names: Sequence[str] | None = None, report: Report = no_report
) -> SpeedTable:
    """Measure the table of ``bench speed``.

    A row that cannot be measured says why, and the others go on.

    Args:
        device: as for :func:`bench.run.machines.choose_machine`.
        seconds: about how long calls are timed for in each row, > 0; what has to be made first comes on top.
        names: rows, or beginnings of them (:func:`chosen`); None for all.
        report: called with (rows done, rows in all).

    Raises:
        UsageError: no such device, or no such row.
    """
    rows, machine = chosen(names), _Machine(choose_machine(device, "auto").fabric, seconds)
    table = []
    for number, name in enumerate(rows):
        report(number, len(rows))
        table.append(_row(name, machine))
    report(len(rows), len(rows))
    return SpeedTable(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        device=str(machine.device),
        device_name=torch.cuda.get_device_name(machine.device) if machine.cuda else _processor(),
        precision=str(machine.fabric._precision.precision),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        rows=tuple(table),
    )


def _row(name: str, machine: _Machine) -> SpeedRow:
    what, plain, measured = ROWS[name]
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    gc.collect()
    if machine.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    fresh = forget_peak()
    try:
        figures = measured(machine)
    except _Skipped as skipped:
        figures = {"status": "skipped", "reason": str(skipped)}
    except Exception as error:
        # Whatever breaks here, the other rows can be measured all the same.
        line = " ".join(str(error).split())[:300]
        figures = {"status": "failed", "reason": f"{type(error).__name__}: {line}"}
    if fresh:
        figures["process_bytes"] = peak_bytes()
    if machine.cuda:
        figures["device_bytes"] = torch.cuda.max_memory_allocated(machine.device)
    return SpeedRow(name=name, what=what, plain=plain, seconds=time.perf_counter() - started, **figures)


def _processor() -> str:
    """What the processor calls itself."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found is not None else platform.machine()
