from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.recognition.options import PUBLISHED, TrainingOptions
from bench.run.machines import native_bfloat16, resolve_precision


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "step"}, "needs milestones"),
        ({"milestones": (3,)}, "belong to schedule 'step'"),
        ({"schedule": "step", "milestones": (5, 3)}, "ascending"),
        ({"schedule": "step", "milestones": (0, 3)}, "positive"),
        ({"epochs": 2, "warmup_epochs": 3}, "cannot exceed"),
        ({"batch_size": 1}, "batch_size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"views": 0}, "views"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"head": "partial-fc", "sample_rate": 0}, "sample_rate"),
        ({"head": "partial-fc", "sample_rate": 1.1}, "sample_rate"),
        ({"head": "partial-fc", "interclass_filter": 1.1}, "interclass_filter"),
        ({"head": "partial-fc", "label_smoothing": 0.1}, "head partial-fc takes no label_smoothing"),
        ({"head": "partial-fc", "precision": "16-mixed"}, "32-true or bf16-mixed"),
        ({"sample_rate": 0.5}, "head arcface takes no sample_rate; it belongs to head partial-fc"),
        ({"head": "cosface", "cosine_margin": 0.5}, "takes no cosine_margin; it belongs to head combined, partial-fc"),
        ({"head": "combined", "interclass_filter": 0.5}, "head combined takes no interclass_filter"),
        ({"label_noise": 1.0}, "label_noise"),
        ({"augmentation": {"flip": 2}}, "flip"),
    ],
)
def test_impossible_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**values)


def test_a_head_is_given_what_it_takes() -> None:
    assert TrainingOptions(head="cosface").head_options == {"scale": 32.0, "margin": 0.3, "label_smoothing": 0.0}
    assert TrainingOptions(head="partial-fc", interclass_filter=0.4).head_options == {
        "scale": 32.0,
        "margin": 0.3,
        "angle_factor": 1.0,
        "cosine_margin": 0.0,
        "sample_rate": 0.1,
        "interclass_filter": 0.4,
    }


def test_options_survive_json_and_cannot_change() -> None:
    assert TrainingOptions.model_validate_json(PUBLISHED.model_dump_json()) == PUBLISHED
    with pytest.raises(ValueError, match="frozen"):
        PUBLISHED.epochs = 3  # type: ignore[misc]


def test_the_published_options_are_those_of_the_paper() -> None:
    values = PUBLISHED.model_dump()
    expected = {
        "epochs": 24,
        "batch_size": 64,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (10, 18, 22),
        "head": "arcface",
        "scale": 64.0,
        "margin": 0.5,
    }
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_bfloat16_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr("bench.run.machines.native_bfloat16", lambda _: native)
    assert resolve_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_named_precision_is_kept(precision: str) -> None:
    assert resolve_precision(precision, torch.device("cpu")) == precision


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
