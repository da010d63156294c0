"""One step of a head over very many identities, timed in a process of its own."""

from __future__ import annotations

import resource
import sys
import time

import torch

from bench.nets.heads import ArcFace
from bench.recognition.partial_fc import PartialFC

DIMENSIONS, SCALE, MARGIN = 512, 64.0, 0.5
SGD = {"momentum": 0.9, "weight_decay": 5e-4}


def time_head(identities: int, sample_rate: float | None, batch: int, rounds: int) -> dict[str, float]:
    """Seconds of a step (forward, backward, update) and the bytes that head and steps add to the process.

    Args:
        identities: C.
        sample_rate: of Partial FC; None for the full ArcFace head under ``torch.optim.SGD``.
        batch: embeddings.
        rounds: timed steps, after one that is not.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    torch.randn(8, 8).requires_grad_().square().sum().backward()  # brings autograd's own memory into the baseline
    before = peak_bytes()
    step = _full(identities) if sample_rate is None else _partial(identities, sample_rate)
    seconds = []
    for _ in range(rounds + 1):
        embeddings = torch.randn(batch, DIMENSIONS, generator=generator).requires_grad_()
        labels = torch.randint(0, identities, (batch,), generator=generator)
        began = time.perf_counter()
        step(embeddings, labels)
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds[1:]), "bytes": peak_bytes() - before}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _full(identities):
    head = ArcFace(DIMENSIONS, identities, scale=SCALE, margin=MARGIN)
    sgd = torch.optim.SGD([head.weight], lr=0.1, **SGD)

    def step(embeddings, labels):
        sgd.zero_grad()
        loss, _ = head(embeddings, labels)
        loss.backward()
        sgd.step()

    return step


def _partial(identities, sample_rate):
    head = PartialFC(DIMENSIONS, identities, scale=SCALE, margin=MARGIN, sample_rate=sample_rate)
    head.momentum.fill_(0.0)  # late in a training every centre has momentum: pages of zeros would not count as memory

    def step(embeddings, labels):
        loss, _ = head(embeddings, labels)
        loss.backward()
        head.update(learning_rate=0.1, **SGD)

    return step
