"""Training on faces that stay on disk: images are there for a moment, a killed training goes on within an epoch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import stream_at_work as work
import torch
from alive import Alive
from in_processes import in_processes
from lightning_fabric import Fabric
from open_source import open_source
from small_sets import people, write_folder

from bench.data.decode import AHEAD
from bench.data.encoded import EncodedSource
from bench.data.stream.sampler import EpochOrder
from bench.errors import DataError
from bench.nets.checkpoints import load_tensors
from bench.nets.recogniser import Recogniser, build_recogniser
from bench.randomness import Streams
from bench.recognition import state as training_state
from bench.recognition import training
from bench.recognition.options import TrainingOptions
from bench.recognition.processes import Processes
from bench.recognition.training import StreamBatches

SIZE = 16
OPTIONS = TrainingOptions(
    epochs=2,
    batch_size=6,
    learning_rate=0.05,
    warmup_epochs=0.5,
    embedding_size=16,
    scale=16.0,
    margin=0.1,
    dropout=0.2,
)
HEADS = [{"head": "cosface"}, {"head": "partial-fc", "sample_rate": 0.5}]
STEPS = 10


class Killed(Exception):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "faces", people(6, 10, SIZE))


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is saved at every second step."""
    monkeypatch.setattr(training, "LOOK_EVERY", 2)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_state, "SAVE_SHARE", 1e9)


def run(
    folder: Path, defense: Any, options: TrainingOptions, killed_at: int | None = None, **more: Any
) -> tuple[Recogniser, Any, int]:
    """The recogniser, its training's report and the steps it took; Killed in the forward pass of a step."""
    recogniser = build_recogniser("ir-tiny", defense.representation_shape, 16, dropout=options.dropout, seed=1)
    calls = 0

    def kill(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise Killed

    recogniser.backbone.register_forward_pre_hook(kill)
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    faces = open_source("folder", folder, image_size=SIZE)
    report = training.train(recogniser, faces, defense, options, fabric=fabric, seed=0, **more)
    return recogniser, report, calls


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head["head"])
@pytest.mark.parametrize("killed_at", [2, 6, 13])
def test_a_killed_training_goes_on_within_its_epoch(
    folder: Path, make_defense: Any, tmp_path: Path, saving: None, head: dict[str, Any], killed_at: int
) -> None:
    options = OPTIONS.model_copy(update=head)
    whole, expected, _ = run(folder, make_defense(), options)
    resume = tmp_path / "resume"
    with pytest.raises(Killed):
        run(folder, make_defense(), options, killed_at, checkpoint=resume)
    again, report, steps = run(folder, make_defense(), options, checkpoint=resume)
    lost = killed_at - 1 - (killed_at - 1) % 2  # done before the last save
    assert steps == 2 * STEPS - lost
    assert report.losses == expected.losses
    assert report.accuracies == expected.accuracies
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.state_dict().items())
    assert len(list(resume.iterdir())) == (2 if head["head"] == "partial-fc" else 1)


def test_another_order_is_not_gone_on_with(
    folder: Path, make_defense: Any, tmp_path: Path, saving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run(folder, make_defense(), OPTIONS, 6, checkpoint=tmp_path / "resume")
    _, details = load_tensors(tmp_path / "resume" / "training.safetensors")
    assert (details["reached"]["epoch"], details["reached"]["position"]) == (0, 4)
    monkeypatch.setattr(training, "EpochOrder", functools.partial(EpochOrder, block=32))
    with pytest.raises(DataError, match="reading to resume is of"):
        run(folder, make_defense(), OPTIONS, checkpoint=tmp_path / "resume")


def test_nothing_is_saved_within_an_epoch_before_its_time(folder: Path, make_defense: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(folder, make_defense(), OPTIONS, STEPS, checkpoint=tmp_path / "resume")
    assert not (tmp_path / "resume").exists()


def test_images_are_in_memory_for_a_moment_only(
    tmp_path: Path, make_defense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, defense = write_folder(tmp_path / "many", people(20, 60, SIZE)), make_defense()
    read, alive = EncodedSource.read, Alive()
    monkeypatch.setattr("bench.recognition.training.workers", lambda: 2)
    monkeypatch.setattr(EncodedSource, "read", lambda self, rows: alive.watch(read(self, rows)))
    run(folder, defense, OPTIONS.model_copy(update={"epochs": 1}))
    states = [tuple(state.flatten().tolist()) for _, state in defense.calls]
    assert len(set(states)) > len(states) / 2  # each step draws its own
    assert alive.seen == 1200
    assert alive.most <= (2 * AHEAD + 3) * OPTIONS.batch_size


def test_several_processes_do_not_skip_images(folder: Path) -> None:
    (folder / "p002" / "p002_0003.jpg").write_bytes(b"no image")
    faces = open_source("folder", folder, image_size=SIZE, on_error="skip")

    def totals(rank: int, size: int) -> list[int]:
        of_batches = StreamBatches(faces, 1, 6, Streams(0), Processes(rank, size), torch.device("cpu"))
        return [total for _, _, _, total in of_batches.epoch(0)]

    with pytest.warns(UserWarning, match="1 images were skipped"):
        assert sum(totals(0, 1)) == 59
    with pytest.raises(DataError, match=r"p002_0003\.jpg.*several processes cannot skip"):
        [*totals(0, 2), *totals(1, 2)]


def test_two_processes_leave_off_and_one_goes_on(folder: Path, tmp_path: Path) -> None:
    change = {"head": "partial-fc", "sample_rate": 1.0, "epochs": 2, "batch_size": 6}
    expected = work.learn(Processes(), folder, change, tmp_path / "alone")
    assert in_processes(2, tmp_path / "processes", work.learn, folder, change, tmp_path / "resume", 16) == [(), ()]
    _, details = load_tensors(tmp_path / "resume" / "training.safetensors")
    assert (details["reached"]["epoch"], details["reached"]["position"]) == (1, 4)
    losses = work.learn(Processes(), folder, change, tmp_path / "resume")
    assert losses == pytest.approx(expected, rel=0, abs=1e-9 * expected[0])
