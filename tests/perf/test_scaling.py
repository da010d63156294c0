"""How cost grows with work: processor time and memory over sizes, and the exponents of the power laws through them.

Run with ``pytest tests/perf/test_scaling.py --benchmark-enable -s``; skipped where benchmarks are disabled. Times are
processor times of one thread, the least of several calls: other load hardly changes them. Memory is what a call adds at
its peak to what is resident. An exponent of 1 is linear in the number of faces, pairs, identities, interceptions, or
pixels (the square of the side).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from big_records import small_jpeg, write_big_records
from cost import added_bytes
from open_source import load_set
from pictures import smooth

from bench.data.faces import FaceSet
from bench.data.pairs import draw_pairs
from bench.data.splits import drop_copies, drop_near_copies, drop_twins, whole_identities
from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.images import ssim, to_float
from bench.metrics.bootstrap import mean_estimate, verification_estimates
from bench.metrics.floors import nearest
from bench.metrics.identity import identity_leakage, select_probes
from bench.metrics.unlinkability import unlinkability_estimate
from bench.plugins import make_defense
from bench.recognition.partial_fc import PartialFC

ROUNDS = 3
#: Seconds after which a call is not repeated, and bytes below which the system's pages are what is measured.
LONG, LEAST = 3.0, 2**21
#: What noise of a fit may add to linear.
MOST = 1.15


pytestmark = pytest.mark.usefixtures("one_thread")


def protecting(side):
    defense, faces = make_defense("partialface", {}, "cpu", side), to_float(smooth(16, side))
    return side * side, lambda: defense.protect(faces, torch.Generator().manual_seed(0))


def similarity(side):
    first, second = to_float(smooth(16, side)), to_float(smooth(16, side, seed=1))
    return side * side, lambda: ssim(first, second)


def rendering(people):
    options = SyntheticOptions(identities=people, images_per_identity=8, image_size=32)
    return people, lambda: load_synthetic(options)


def interceptions(count):
    defense, faces = make_defense("partialface", {}, "cpu", 64), to_float(smooth(32, 64))
    generator = torch.Generator().manual_seed(0)

    def intercept():
        for _ in range(count):
            defense.protect(faces, generator)

    return count, intercept


def splitting(people):
    labels = torch.arange(people).repeat_interleave(4)
    # One pixel of one face, seen many times: what is split are the people.
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(labels), -1, -1, -1)
    faces = FaceSet(images, labels, tuple(f"person {i}" for i in range(people)))
    return people, lambda: whole_identities(faces, 2 * people, torch.Generator().manual_seed(0))


def centres(identities):
    head = PartialFC(64, identities, scale=32.0, margin=0.3, sample_rate=0.1)
    embeddings, labels = torch.randn(64, 64), torch.randint(identities, (64,))

    def step():
        loss, _ = head(embeddings.requires_grad_(), labels)
        loss.backward()
        head.update(learning_rate=0.1, momentum=0.9, weight_decay=5e-4)

    return identities, step


def people_of(faces):
    """Four images of each, uint8 noise of 8 pixels."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(faces // 4).repeat_interleave(4)
    images = torch.randint(256, (len(labels), 3, 8, 8), generator=draws, dtype=torch.uint8)
    return FaceSet(images, labels, tuple(f"person {i}" for i in range(faces // 4)))


def reading(count):
    folder = Path(f"{count} faces")  # in the test's own folder
    folder.mkdir()
    write_big_records(folder / "train.rec", count, 10, small_jpeg(16))
    return count, lambda: load_set("insightface", folder, 16)


def cleaning(count):
    faces = people_of(count)
    return count, lambda: drop_near_copies(drop_copies(drop_twins(faces)[0])[0])


def probes(count):
    faces = people_of(count)

    def choose():
        draws = torch.Generator().manual_seed(0)
        return select_probes(faces, 200, draws), draw_pairs(faces.labels, draws)

    return count, choose


def scored(count):
    """Scores of pairs, half of them genuine, in ten folds, with as many people."""
    draws = torch.Generator().manual_seed(0)
    same, first = torch.arange(count) % 2 == 0, torch.arange(count) // 2
    people = torch.stack((first, torch.where(same, first, first + 1)), dim=1)
    return torch.randn(count, generator=draws) + same.float(), same, torch.arange(count) * 10 // count, people


def verifying(count):
    scores, same, fold, people = scored(count)
    return count, lambda: verification_estimates(scores, same, fold, people, fars=(1e-1, 1e-2))


def linking(count):
    scores, same, _, people = scored(count)
    return count, lambda: unlinkability_estimate(scores, same, people)


def averaging(count):
    values, people = torch.rand(count), torch.arange(count) // 4
    return count, lambda: mean_estimate(values, people, torch.Generator().manual_seed(0))


def recognising(count):
    gallery = torch.randn(count, 128, generator=torch.Generator().manual_seed(0))
    people = torch.arange(count)
    found = gallery[:256] + 0.5
    return count, lambda: identity_leakage(found, gallery[:256], people[:256], gallery, people, 0.5)


def guessing(count):
    public = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    observed = to_float(public[:64])
    return count, lambda: nearest(observed, public, lambda faces: faces)


THOUSANDS = (1_000, 10_000, 100_000)

CURVES = {
    "protect, side 56 to 224": (protecting, (56, 112, 224)),
    "SSIM, side 56 to 224": (similarity, (56, 112, 224)),
    "rendering, people": (rendering, (16, 32, 64)),
    "interceptions of a face, k 1 to 8": (interceptions, (1, 2, 4, 8)),
    "reading JPEG of 16 px, faces": (reading, THOUSANDS),
    "leaving out twins, copies and near copies, faces": (cleaning, THOUSANDS),
    "choosing victims and their pairs, faces": (probes, THOUSANDS),
    "verification with intervals, pairs": (verifying, THOUSANDS),
    "unlinkability with its interval, pairs": (linking, THOUSANDS),
    "a mean with its interval, faces": (averaging, THOUSANDS),
    "ranks of 256 recoveries, people in the gallery": (recognising, THOUSANDS),
    "nearest of the public faces to 64 interceptions": (guessing, THOUSANDS),
    "choosing half of the identities": (splitting, (*THOUSANDS, 1_000_000)),
    "a step of Partial FC, identities": (centres, (*THOUSANDS, 1_000_000)),
}


def exponent_of(work, cost):
    return float(np.polyfit(np.log(work), np.log(cost), 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_nothing_grows_faster_than_its_work(benchmark, tmp_path, monkeypatch, name):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    monkeypatch.chdir(tmp_path)
    make, sizes = CURVES[name]
    work, taken, added = [], [], []
    for size in sizes:
        amount, operation = make(size)
        operation()
        times = []
        while len(times) < ROUNDS and sum(times) < LONG:
            started = time.process_time()
            operation()
            times.append(time.process_time() - started)
        work.append(amount)
        taken.append(min(times))
        added.append(added_bytes(operation))
    exponent = exponent_of(work, taken)
    text = f"\n{name}: {', '.join(f'{1e3 * t:.3g}' for t in taken)} ms, exponent {exponent:.2f}"
    measured = [(amount, size) for amount, size in zip(work, added, strict=True) if size is not None and size > LEAST]
    growth = exponent_of(*zip(*measured, strict=True)) if len(measured) > 1 else None
    if None not in added:
        told = "" if growth is None else f", exponent {growth:.2f}"
        text += f"; {', '.join(f'{size / 2**20:.3g}' for size in added)} MiB{told}"
    print(text)
    benchmark.pedantic(operation, rounds=1)
    benchmark.extra_info.update(work=work, processor_seconds=taken, exponent=exponent, added_bytes=added, growth=growth)
    assert exponent <= MOST
    assert growth is None or growth <= MOST
