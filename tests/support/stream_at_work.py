"""Training on a streamed folder in one process or several, ended in the middle where that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from open_source import open_source
from training_at_work import OPTIONS, fabric_for, in_float64

from bench.errors import BenchError
from bench.nets.recogniser import build_recogniser
from bench.recognition import state as training_state
from bench.recognition import training
from bench.recognition.options import TrainingOptions
from bench.recognition.processes import Processes
from bench.recognition.training import build_head
from defenses.none import Unprotected

SIZE = 16


def learn(
    processes: Processes, folder: Path, change: dict[str, Any], checkpoint: Path, ends_at: int | None = None
) -> tuple[float, ...]:
    """Losses, in float64; or none, where the training ends at the step ``ends_at``. Every second step is saved."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOOK_EVERY", 2)
        patch.setattr(training_state, "SAVE_SECONDS", 0.0)
        patch.setattr(training_state, "SAVE_SHARE", 1e9)
        with in_float64():
            return _learn(processes, folder, change, checkpoint, ends_at)


def _learn(
    processes: Processes, folder: Path, change: dict[str, Any], checkpoint: Path, ends_at: int | None
) -> tuple[float, ...]:
    options = TrainingOptions.model_validate(OPTIONS.model_dump() | change)
    defense = Unprotected(image_size=SIZE)
    recogniser = build_recogniser("ir-tiny", defense.representation_shape, 16, seed=1)
    calls = 0

    def end(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == ends_at:
            raise BenchError("the end")

    recogniser.backbone.register_forward_pre_hook(end)
    faces = open_source("folder", folder, image_size=SIZE)
    head = build_head(options, faces.identities, processes=processes)
    try:
        return training.train(
            recogniser, faces, defense, options, fabric=fabric_for(processes), seed=0, head=head, checkpoint=checkpoint
        ).losses
    except BenchError:
        if ends_at is None:
            raise
        return ()
