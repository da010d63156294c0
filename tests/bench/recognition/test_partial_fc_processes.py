"""Partial FC in 1, 2 and 3 processes against the full head and a masked softmax in float64; and when one is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import partial_fc_at_work as work
import pytest
import torch
import torch.nn.functional as F
from in_processes import in_processes
from partial_fc_at_work import CLASSES, DIMENSIONS, SGD, batches, make, start
from torch import Tensor

from bench.errors import UsageError
from bench.nets.heads import ArcFace, CosFace, MarginHead
from bench.recognition.processes import Processes

WHOLE = [
    {"sample_rate": 1.0},
    {"sample_rate": 1.0, "margin": 0.0, "cosine_margin": 0.35},
    {"sample_rate": 1.0, "angle_factor": 1.2, "margin": 0.2, "cosine_margin": 0.1},
]
SAMPLED = [
    {"sample_rate": 0.5},
    {"sample_rate": 0.7, "interclass_filter": 0.2},
    {"sample_rate": 0.1},  # fewer than the positives
]
CASES = WHOLE + SAMPLED


@pytest.fixture(scope="module", params=[1, 2, 3])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """By process, case and step."""
    if request.param == 1:
        return [work.train(Processes(), CASES)]
    return in_processes(request.param, tmp_path_factory.mktemp("processes"), work.train, CASES)


def full_head(options: dict[str, float]) -> MarginHead:
    if "angle_factor" in options:
        margins = {name: options[name] for name in ("angle_factor", "margin", "cosine_margin")}
        return ArcFace(DIMENSIONS, CLASSES, scale=16.0, **margins).double()
    if "cosine_margin" in options:
        return CosFace(DIMENSIONS, CLASSES, scale=16.0, margin=options["cosine_margin"]).double()
    return ArcFace(DIMENSIONS, CLASSES, scale=16.0, margin=0.3).double()


@pytest.mark.parametrize("case", range(len(WHOLE)))
def test_with_all_centres_it_is_the_full_head_under_sgd(trained: list[Any], case: int) -> None:
    head = full_head(CASES[case])
    with torch.no_grad():
        head.weight.copy_(start())
    sgd = torch.optim.SGD([head.weight], SGD["learning_rate"], SGD["momentum"], weight_decay=SGD["weight_decay"])
    for step, (embeddings, labels) in enumerate(batches()):
        embeddings.requires_grad_()
        loss, hits = head(embeddings, labels)
        sgd.zero_grad()
        loss.backward()
        gradient = head.weight.grad.clone()
        sgd.step()
        parts = [process[case][step] for process in trained]
        for part in parts:
            close(part["loss"], loss.detach())
            assert torch.equal(part["hits"], hits[part["rows"]])
            close(part["to_embeddings"], embeddings.grad[part["rows"]])
        close(joined(parts, "gradient"), gradient)
        close(joined(parts, "weight"), head.weight.detach())
        close(joined(parts, "momentum"), sgd.state[head.weight]["momentum_buffer"])


@pytest.mark.parametrize("case", range(len(WHOLE), len(CASES)))
def test_with_sampled_centres_it_is_the_full_head_masked_to_them(trained: list[Any], case: int) -> None:
    weight, velocity = start(), torch.zeros(CLASSES, DIMENSIONS, dtype=torch.float64)
    for step, (embeddings, labels) in enumerate(batches()):
        parts = [process[case][step] for process in trained]
        sampled = joined(parts, "sampled")
        assert torch.isin(labels, sampled).all()
        assert sampled.unique().numel() == len(sampled)
        expected = masked_softmax(embeddings, labels, weight, sampled, CASES[case].get("interclass_filter"))
        for part in parts:
            close(part["loss"], expected["loss"])
            assert torch.equal(part["hits"], expected["hits"][part["rows"]])
            close(part["to_embeddings"], expected["to_embeddings"][part["rows"]])
        close(joined(parts, "gradient"), expected["gradient"][sampled])
        # Written out, for the sampled rows only: the others keep weight and momentum, decay included.
        step_of = expected["gradient"][sampled] + SGD["weight_decay"] * weight[sampled]
        velocity[sampled] = SGD["momentum"] * velocity[sampled] + step_of
        weight[sampled] -= SGD["learning_rate"] * velocity[sampled]
        close(joined(parts, "weight"), weight)
        close(joined(parts, "momentum"), velocity)
        for part, process in zip(parts, range(len(parts)), strict=True):
            check_quota(part, Processes(process, len(parts)), labels, CASES[case]["sample_rate"], step)


def check_quota(part: dict[str, Any], processes: Processes, labels: Tensor, rate: float, step: int) -> None:
    owned = processes.share(CLASSES)
    positives = labels[(labels >= owned.start) & (labels < owned.stop)].unique()
    quota = max(1, round(rate * len(owned)))
    assert len(part["sampled"]) == max(quota, len(positives))
    if rate == 0.1:
        assert torch.equal(part["sampled"], positives)  # no negative
        assert part["overfull"] == step + 1


def masked_softmax(
    embeddings: Tensor, labels: Tensor, weight: Tensor, sampled: Tensor, limit: float | None
) -> dict[str, Tensor]:
    """ArcFace's formula in float64 over the sampled classes."""
    embeddings = embeddings.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    cosine = F.normalize(embeddings) @ F.normalize(weight).T
    true = F.one_hot(labels, CLASSES).bool()
    absent = torch.ones(CLASSES, dtype=torch.bool)
    absent[sampled] = False
    logits = 16.0 * torch.where(true, torch.cos(torch.arccos(cosine) + 0.3), cosine)
    dropped = absent.unsqueeze(0).expand_as(true) if limit is None else absent | (cosine > limit)
    loss = F.cross_entropy(logits.masked_fill(dropped & ~true, -torch.inf), labels)
    loss.backward()
    assert limit is None or ((cosine > limit) & ~true & ~absent).any()  # the filter has something to do
    nearest = cosine.masked_fill(absent, -torch.inf).argmax(1)
    gradients = {"to_embeddings": embeddings.grad, "gradient": weight.grad}
    return {"loss": loss.detach(), "hits": nearest == labels, **gradients}


def joined(parts: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([part[name] for part in parts])


def close(value: Tensor, expected: Tensor) -> None:
    """Float64, so that only a mistake could tell them apart, on whatever processor."""
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_a_wrong_label_in_one_process_is_refused_by_all(tmp_path: Path) -> None:
    for answer in in_processes(2, tmp_path, work.refuse_labels):
        assert answer == f"labels must lie in [0, {CLASSES}), got 0 to {CLASSES}"


@pytest.mark.parametrize("silently", [False, True])
def test_a_lost_process_is_one_clear_error(tmp_path: Path, silently: bool) -> None:
    ((message, seconds),) = in_processes(2, tmp_path, work.lose_one, silently, patience=1, lost=(1,))
    assert "process 0 of 2 lost another one" in message
    assert "\n" not in message
    assert seconds < 5


@pytest.mark.parametrize(("writers", "readers"), [(3, 2), (2, 3), (1, 2), (2, 1)])
def test_centres_load_on_another_number_of_processes(tmp_path: Path, writers: int, readers: int) -> None:
    folder = tmp_path / "centres-1"
    if writers == 1:
        work.store(Processes(), folder)
    else:
        in_processes(writers, tmp_path / "w", work.store, folder)
    # Reading talks to nobody.
    assert [work.read(Processes(rank, readers), folder) for rank in range(readers)] == [True] * readers


def test_missing_and_truncated_centres_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.recognition.partial_fc.BLOCK_ROWS", 10)
    work.store(Processes(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"rows-{first:010d}-{stop:010d}.safetensors" for first, stop in ((0, 10), (10, 20), (20, 23))
    ]
    assert work.read(Processes(), tmp_path) is True
    file = tmp_path / "rows-0000000010-0000000020.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert f"cannot read centres {file}" in str(work.read(Processes(), tmp_path))
    file.unlink()
    assert "holds 13 of the 23 centres 0 to 22" in str(work.read(Processes(), tmp_path))


def test_more_processes_than_identities_are_refused() -> None:
    with pytest.raises(UsageError, match=f"{CLASSES} identities cannot be shared out among 24 processes"):
        make(Processes(0, 24), {})
