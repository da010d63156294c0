"""Checks the suite on a GPU, measures it, and runs it: ``python tests/perf/gpu.py OUT [--seconds S] [--run ...]``.

Writes ``checks.json`` (what was compared with the CPU, or eager with graphed, and by how much it differs),
``speed.json`` (the table of ``bench speed``) and, with ``--run``, a run folder of ``bench run``. Ends with 1 where a
check fails. From the repository or from anywhere, with the suite installed or not (``pip install .`` gets its needs).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from attacks.base import Adversary, Knowledge  # noqa: E402
from bench.commands.console import out  # noqa: E402
from bench.commands.speed import render  # noqa: E402
from bench.data.synthetic import SyntheticOptions, load_synthetic  # noqa: E402
from bench.graphs import CudaCapture, Replayed  # noqa: E402
from bench.images import ssim  # noqa: E402
from bench.metrics.image_quality import psnr  # noqa: E402
from bench.nets.recogniser import InputNormalisation, build_recogniser  # noqa: E402
from bench.plugins import make_attack, make_defense  # noqa: E402
from bench.recognition.learner import make_learner  # noqa: E402
from bench.recognition.options import TrainingOptions  # noqa: E402
from bench.recognition.training import build_head  # noqa: E402
from bench.run.benchmarks import measure_rows  # noqa: E402
from bench.run.machines import choose_machine  # noqa: E402
from defenses import frequency  # noqa: E402
from defenses.frequency import CHANNELS, block_dct  # noqa: E402

STEPS, BATCH, IDENTITIES = 20, 64, 100


def protecting(device):
    """Largest difference from the CPU's values, which reach 1024."""
    drawn = torch.Generator().manual_seed(0)
    each = torch.rand(16, CHANNELS, generator=drawn).argsort(1)[:, :9]  # a list of its own for every face
    whole, worst = torch.arange(CHANNELS), []
    for size in (112, 57, 13, 2):
        faces = torch.rand(16, 3, size, size, generator=drawn)
        for channels in (whole, each):
            worst.append((block_dct(faces.to(device), channels).cpu() - block_dct(faces, channels)).abs().max())
    faces = torch.rand(16, 3, 112, 112, generator=drawn)
    if device.type == "cuda":
        assert device.type in frequency._fused_on, "there is no kernel"
        many = 2**31 // (3 * CHANNELS * 112 * 112) + 2  # the last one lies beyond what 32 bits count
        last = block_dct(faces[:1].to(device).expand(many, -1, -1, -1), whole)[-1].cpu()
        worst.append((last - block_dct(faces[:1], whole)[0]).abs().max())
    defense = make_defense("partialface", {}, "cpu", 112)
    here = defense.protect(faces, torch.Generator().manual_seed(1))
    there = defense.to(device).protect(faces.to(device), torch.Generator().manual_seed(1))
    assert torch.equal(here.state, there.state.cpu())
    worst.append((there.representation.cpu() - here.representation).abs().max())
    return float(max(worst)), 0.01


def image_quality(device):
    """Largest difference of SSIM, and of PSNR in dB."""
    first, second = torch.rand(2, 16, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    second = first.lerp(second, 0.2)
    there = [measure(first.to(device), second.to(device)).cpu() for measure in (ssim, psnr)]
    here = [measure(first, second) for measure in (ssim, psnr)]
    return max(float((a - b).abs().max()) for a, b in zip(there, here, strict=True)), 1e-3


def losses(device, precision, *, graphs, dropout=0.0, compiled=False):
    """Of STEPS training steps behind settled normalisation, whose batches have two sizes: the loss of each."""
    options = TrainingOptions(precision=precision, dropout=dropout)
    fabric = choose_machine(str(device), precision).fabric
    shape = (27, 32, 32)
    recogniser = build_recogniser("ir-tiny", shape, options.embedding_size, dropout=dropout).to(device).train()
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(STEPS * BATCH, *shape, generator=generator).to(device)
    labels = torch.randint(IDENTITIES, (len(data),), generator=generator).to(device)
    for _ in range(InputNormalisation.measured):
        recogniser.normalisation(data[:BATCH])
    learner = make_learner(recogniser, build_head(options, IDENTITIES), options, fabric)
    learner.replayed = Replayed(
        learner.passes,
        learner.module.parameters(),
        device if graphs else torch.device("cpu"),
        compiled=recogniser if compiled else None,
        before=1,
    )
    torch.manual_seed(0)
    found = []
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH - step % 2)
        loss, _ = learner.step(data[rows], labels[rows], rate=0.01, total=BATCH - step % 2)
        found.append(loss)
    captured = len(learner.replayed.captured)
    assert captured == (2 if graphs else 0), f"{captured} batch sizes were captured"
    return torch.stack(found).cpu()


def graphs(device, precision, *, compiled=False):
    """Largest relative difference of a loss over the steps, eager and replayed; what eager differs from itself by."""
    eager, again = (losses(device, precision, graphs=False) for _ in range(2))
    graphed = losses(device, precision, graphs=True, compiled=compiled)
    noise = float(((again - eager).abs() / eager).max())
    return float(((graphed - eager).abs() / eager).max()), max(0.02, 3 * noise)


def dropped(device):
    """Relative difference of the mean loss under dropout, whose masks a graph draws from another part of the stream."""
    means = [losses(device, "32-true", graphs=graphs, dropout=0.3).mean() for graphs in (False, True)]
    return float((means[1] - means[0]).abs() / means[0]), 0.05


def attacking(device, name, *, allowed=0.05, **options):
    """Relative difference of the validation loss of an attack's training, eager and replayed; eager and eager."""
    faces = load_synthetic(SyntheticOptions(identities=24, images_per_identity=8, image_size=32)).faces
    defense = make_defense("partialface", {}, "gpu", 32).to(device)
    found, captured = [], []

    class Counted(CudaCapture):
        def __call__(self, passes, inputs):
            replay = super().__call__(passes, inputs)
            captured.append(len(inputs))
            return replay

    for before in (10**9, 10**9, 4):

        def noted(passes, parameters, device, *, before=before, **more):
            parameters = list(parameters)
            return Replayed(passes, parameters, device, capture=Counted(parameters), before=before, **more)

        with mock.patch("attacks.parts.training.Replayed", noted):
            attack = make_attack(name, options, "gpu")
            report = attack.learn(
                Adversary(
                    faces=faces.images.to(device),
                    identities=faces.labels,
                    knowledge=Knowledge.WHITEBOX,
                    mechanism=lambda _: defense,
                    generator=torch.Generator().manual_seed(0),
                    fabric=choose_machine(str(device), "auto").fabric,
                )
            )
        found.append(report.details["validation_loss"])
    assert captured, "nothing was captured"
    eager, again, graphed = found
    return abs(graphed - eager) / eager, max(allowed, 3 * abs(again - eager) / eager)


CHECKS = {
    "protect": protecting,
    "image-quality": image_quality,
    "graphs-32": lambda device: graphs(device, "32-true"),
    "graphs-bf16": lambda device: graphs(device, "bf16-mixed"),
    "graphs-dropout": dropped,
    "graphs-compiled": lambda device: graphs(device, "32-true", compiled=True),
    "graphs-unet": lambda device: attacking(device, "unet", steps=200, widths=(16, 32, 64), batch_size=32),
    "graphs-unet-mixture": lambda device: attacking(
        device, "unet", steps=200, widths=(16, 32, 64), batch_size=32, infer_state=False, input="raw"
    ),
    "graphs-unet-compiled": lambda device: attacking(
        # A compiled network rounds otherwise, which training amplifies: .055 was seen.
        device,
        "unet",
        allowed=0.15,
        steps=200,
        widths=(16, 32, 64),
        batch_size=32,
        compile=True,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row of the table")
    parser.add_argument("--only", help="rows of the table, as of bench speed")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="then: bench run with these flags")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = choose_machine(given.device, "auto").device

    checks = {}
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            difference, allowed = check(device)
            checks[name] = {"ok": difference <= allowed, "difference": difference, "allowed": allowed}
        except Exception as error:
            checks[name] = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        checks[name]["seconds"] = round(time.perf_counter() - started, 2)
        print(name, checks[name], flush=True)
        (given.out / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")

    names = given.only.split(",") if given.only else None
    table = measure_rows(given.device, seconds=given.seconds, names=names)
    (given.out / "speed.json").write_text(table.model_dump_json(indent=2) + "\n")
    out.print(render(table))

    code = 0
    if given.run is not None:
        command = [sys.executable, "-m", "bench", "run", "--device", given.device, "--out", str(given.out / "runs")]
        started = time.perf_counter()
        code = subprocess.run([*command, *given.run], cwd=ROOT).returncode
        print(f"bench run {' '.join(given.run)}: exit code {code}, {time.perf_counter() - started:.0f} s")
    return int(code != 0 or not all(check["ok"] for check in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
