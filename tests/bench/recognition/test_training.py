from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from bench.data.faces import FaceSet
from bench.errors import BenchError, DataError, UsageError
from bench.images import to_float
from bench.nets.checkpoints import load_tensors
from bench.nets.heads import ArcFace
from bench.nets.options import AugmentationOptions
from bench.nets.recogniser import Recogniser, build_recogniser
from bench.recognition.options import TrainingOptions
from bench.recognition.training import (
    TrainingReport,
    build_head,
    epoch_order,
    flip_labels,
    learning_rate,
    margins,
    train,
)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_exactly_the_share_of_labels_is_flipped_to_any_other_alike(share: float) -> None:
    labels = torch.arange(7).repeat(6000)
    flipped = flip_labels(labels, 7, share, torch.Generator().manual_seed(0))
    wrong = flipped != labels
    assert int(wrong.sum()) == round(share * len(labels))
    assert torch.equal(labels, torch.arange(7).repeat(6000))
    if share:
        shift = (flipped[wrong] - labels[wrong]) % 7
        assert (shift.bincount(minlength=7)[1:] / wrong.sum() - 1 / 6).abs().max() < 0.015
        assert (labels[wrong].bincount() / wrong.sum() - 1 / 7).abs().max() < 0.015


OPTIONS = TrainingOptions(
    epochs=3,
    batch_size=12,
    learning_rate=0.05,
    warmup_epochs=0.5,
    embedding_size=16,
    scale=16.0,
    margin=0.1,
    dropout=0.2,
    augmentation=AugmentationOptions(shift=0.05, brightness=0.1),
)


def build(defense: Any, dropout: float = 0.2) -> Recogniser:
    return build_recogniser("ir-tiny", defense.representation_shape, 16, dropout=dropout, seed=1)


def weights(recogniser: Recogniser) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in recogniser.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run(
    faces: FaceSet, defense: Any, fabric: Fabric, options: TrainingOptions = OPTIONS, seed: int = 0, **more: Any
) -> tuple[dict[str, torch.Tensor], TrainingReport]:
    recogniser = build(defense, options.dropout)
    report = train(recogniser, faces, defense, options, fabric=fabric, seed=seed, **more)
    return weights(recogniser), report


@pytest.mark.parametrize(("optimiser", "epochs"), [("sgd", 12), ("muon", 8)])
def test_it_overfits_a_tiny_set_behind_a_random_defence(
    faces: FaceSet, make_defense: Any, fabric: Fabric, optimiser: str, epochs: int
) -> None:
    # Pixel noise has no shape for a network to hold on to under shifts and flips: the set is learnt by heart.
    plain = AugmentationOptions(flip=0.0)
    changes = {"optimiser": optimiser, "epochs": epochs, "dropout": 0.0, "augmentation": plain}
    options = OPTIONS.model_copy(update=changes)
    defense = make_defense(views=3)
    recogniser = build(defense, 0.0)
    report = train(recogniser, faces, defense, options, fabric=fabric, seed=0)
    assert report.accuracy > 0.95
    assert report.losses[-1] < 0.3 * report.losses[0]
    assert len(report.losses) == len(report.accuracies) == epochs
    assert report.views == 3
    assert report.identities == 4
    assert report.parameters == recogniser.parameter_count
    assert report.seconds > 0
    assert report.images_per_second == pytest.approx(epochs * 3 * len(faces) / report.seconds)
    assert not recogniser.training

    # It learnt the faces, not its training's noise: fresh states, no augmentation.
    protected = defense.protect(to_float(faces.images), torch.Generator().manual_seed(99)).representation
    with torch.no_grad():
        embeddings = recogniser.embed(protected)
    cosine = embeddings @ embeddings.T
    together = faces.labels.unsqueeze(0) == faces.labels.unsqueeze(1)
    assert float(cosine[together].mean()) > float(cosine[~together].mean()) + 0.5


def test_the_seed_decides_everything(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, report = run(faces, make_defense(), fabric)
    assert torch.equal(torch.rand(1), expected)  # torch's generator is left alone
    again, same_report = run(faces, make_defense(), fabric)
    assert same(first, again)
    assert report.losses == same_report.losses
    other, _ = run(faces, make_defense(), fabric, seed=5)
    assert not same(first, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("killed_at", "optimiser"), [(1, "sgd"), (2, "sgd"), (2, "muon")])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    faces: FaceSet, make_defense: Any, tmp_path: Path, killed_at: int, optimiser: str, precision: Any
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    options = OPTIONS.model_copy(update={"optimiser": optimiser})
    whole, expected = run(faces, make_defense(views=2), fabric, options)

    def kill(done: int, total: int, *, epoch: int, **_: float) -> None:
        if epoch == killed_at + 1:
            raise Killed

    with pytest.raises(Killed):
        run(faces, make_defense(views=2), fabric, options, checkpoint=tmp_path, report=kill)
    assert len(load_tensors(tmp_path / "training.safetensors")[1]["losses"]) == killed_at

    epochs: list[float] = []
    resumed, report = run(
        faces,
        make_defense(views=2),
        fabric,
        options,
        checkpoint=tmp_path,
        report=lambda done, total, *, epoch, **_: epochs.append(epoch),
    )
    assert same(whole, resumed)
    assert report.losses == expected.losses
    assert report.accuracies == expected.accuracies
    assert min(epochs) == killed_at + 1


def test_a_finished_training_is_only_loaded(faces: FaceSet, make_defense: Any, fabric: Fabric, tmp_path: Path) -> None:
    first, report = run(faces, make_defense(), fabric, checkpoint=tmp_path)
    defense = make_defense()
    again, loaded = run(faces, defense, fabric, checkpoint=tmp_path)
    assert same(first, again)
    assert loaded == report
    assert not defense.calls


@pytest.mark.parametrize("change", ["seed", "options", "images", "labels", "views", "defense"])
def test_a_checkpoint_of_another_training_is_refused(
    faces: FaceSet, make_defense: Any, fabric: Fabric, tmp_path: Path, change: str
) -> None:
    options = OPTIONS.model_copy(update={"epochs": 1})
    run(faces, make_defense(), fabric, options, checkpoint=tmp_path)
    seed, defense = 0, make_defense()
    match change:
        case "seed":
            seed = 1
        case "options":
            options = options.model_copy(update={"weight_decay": 0.0})
        case "images":
            faces = FaceSet(255 - faces.images, faces.labels, faces.names)
        case "labels":
            faces = FaceSet(faces.images, faces.labels.flip(0), faces.names)
        case "views":
            defense = make_defense(views=2)
        case "defense":
            defense.register_buffer("key", torch.arange(3))
    with pytest.raises(DataError, match=r"training\.safetensors belongs to a training with other"):
        run(faces, defense, fabric, options, seed, checkpoint=tmp_path)


def test_a_damaged_checkpoint_is_named(faces: FaceSet, make_defense: Any, fabric: Fabric, tmp_path: Path) -> None:
    (tmp_path / "training.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(DataError, match=r"training\.safetensors.*delete it"):
        run(faces, make_defense(), fabric, checkpoint=tmp_path)


@pytest.mark.parametrize(("asked", "offered", "expected"), [(None, 1, 1), (None, 3, 3), (2, 3, 2), (4, 1, 4)])
def test_each_image_appears_once_per_view_with_states_of_its_own(
    faces: FaceSet, make_defense: Any, fabric: Fabric, asked: int | None, offered: int, expected: int
) -> None:
    options = OPTIONS.model_copy(update={"epochs": 2, "views": asked, "augmentation": AugmentationOptions(flip=0.0)})
    defense = make_defense(views=offered)
    _, report = run(faces, defense, fabric, options)
    assert report.views == expected
    shown = torch.cat([images for images, _ in defense.calls])
    states = torch.cat([state for _, state in defense.calls]).flatten()
    assert len(shown) == 2 * expected * len(faces)
    originals = to_float(faces.images)
    index = (shown.unsqueeze(1) == originals.unsqueeze(0)).flatten(2).all(2).int().argmax(1)
    first, second = index.chunk(2)
    for epoch in (first, second):
        assert torch.equal(epoch.bincount(minlength=len(faces)), torch.full((len(faces),), expected))
    assert not torch.equal(first, second)  # shuffled anew
    assert states.unique().tolist() == [0, 1, 2]
    labels = torch.cat([labels for labels in defense.labels if labels is not None])
    assert torch.equal(labels, faces.labels[index])  # the defence is told whose face it protects


def test_faces_are_augmented_before_protection(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    defense = make_defense()
    options = OPTIONS.model_copy(update={"epochs": 1, "augmentation": AugmentationOptions(flip=1.0)})
    run(faces, defense, fabric, options)
    mirrored = to_float(faces.images).flip(-1)
    for images, _ in defense.calls:
        assert (images.unsqueeze(1) == mirrored.unsqueeze(0)).flatten(2).all(2).any(1).all()


def test_a_loss_that_is_not_finite_ends_the_training(
    faces: FaceSet, make_defense: Any, fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.recognition.training.learning_rate", lambda _, done: 0.05 if done <= 1 else 1e30)
    with pytest.raises(BenchError, match=r"not finite at epoch 2, step 2 of 2 \(learning rate 1e\+30\); try a lower"):
        run(faces, make_defense(), fabric, checkpoint=tmp_path)
    tensors, details = load_tensors(tmp_path / "training.safetensors")  # that of the last good epoch
    assert len(details["losses"]) == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_progress_is_reported_in_images(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    calls: list[tuple[int, int, dict[str, float]]] = []
    _, report = run(
        faces,
        make_defense(views=2),
        fabric,
        report=lambda done, total, **fields: calls.append((done, total, fields)),
    )
    assert calls[-1][0] == calls[-1][1] == 3 * 2 * len(faces)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    names = {"epoch", "loss", "accuracy", "learning_rate", "images_per_second"}
    assert all(set(fields) == names for _, _, fields in calls)
    assert calls[-1][2]["loss"] == report.losses[-1]
    assert calls[-1][2]["learning_rate"] == pytest.approx(0, abs=1e-12)
    assert {fields["epoch"] for _, _, fields in calls} == {1, 2, 3}


def test_gradients_can_be_clipped(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    options = OPTIONS.model_copy(update={"epochs": 1, "weight_decay": 0.0, "momentum": 0.0})
    before = {
        name: value for name, value in weights(build(make_defense())).items() if name.startswith("backbone.stem.0")
    }

    def moved(options: TrainingOptions) -> float:
        after, _ = run(faces, make_defense(), fabric, options)
        return max(float((after[name] - value).norm()) for name, value in before.items())

    bound = sum(learning_rate(options, (step + 1) / 2) for step in range(2)) * 1e-3
    assert moved(options) > 10 * bound
    assert moved(options.model_copy(update={"clip_gradient_norm": 1e-3})) <= bound * 1.001


def test_a_given_head_is_trained(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    head = ArcFace(16, 4, scale=8.0, margin=0.0)
    before = head.weight.detach().clone()
    run(faces, make_defense(), fabric, head=head)
    assert not torch.equal(head.weight, before)
    with pytest.raises(ValueError, match="tells 5 identities apart, the faces have 4"):
        run(faces, make_defense(), fabric, head=ArcFace(16, 5, scale=8.0, margin=0.0))


def test_one_identity_is_refused(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    with pytest.raises(DataError, match="at least 2 identities, got 6 faces of 1"):
        run(faces.subset(faces.labels == 0), make_defense(), fabric)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'arcface'"):
        build_head(OPTIONS.model_copy(update={"head": "arcfase"}), 4)


def test_the_head_follows_its_options_and_seed() -> None:
    options = OPTIONS.model_copy(update={"head": "cosface", "label_smoothing": 0.1})
    head = build_head(options, 9, seed=4)
    assert (type(head).__name__, head.scale, head.margin, head.label_smoothing) == ("CosFace", 16.0, 0.1, 0.1)
    assert head.weight.shape == (9, 16)
    assert torch.equal(head.weight, build_head(options, 9, seed=4).weight)
    assert not torch.equal(head.weight, build_head(options, 9, seed=5).weight)


def test_step_schedule_is_the_published_one() -> None:
    options = TrainingOptions(epochs=24, learning_rate=0.1, schedule="step", milestones=(10, 18, 22), warmup_epochs=0)
    rates = [learning_rate(options, epoch) for epoch in (0, 9.99, 10, 17.99, 18, 22, 23.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.0001, 0.0001])


def test_rates_warm_up_then_fall_to_zero_along_a_cosine_or_a_line() -> None:
    options = TrainingOptions(epochs=12, learning_rate=0.2, warmup_epochs=2)
    assert [learning_rate(options, epoch) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([0, 0.1, 0.2, 0.1, 0])
    assert learning_rate(options, 4.5) > 0.15
    line = options.model_copy(update={"schedule": "linear"})
    assert [learning_rate(line, epoch) for epoch in (1, 2, 4.5, 12)] == pytest.approx([0.1, 0.2, 0.15, 0])
    only = TrainingOptions(epochs=2, learning_rate=0.2, warmup_epochs=2)
    assert learning_rate(only, 1.5) == pytest.approx(0.15)
    assert learning_rate(only, 2) == pytest.approx(0)


def test_the_margin_grows_then_stays(faces: FaceSet, make_defense: Any, fabric: Fabric) -> None:
    options = OPTIONS.model_copy(update={"margin": 0.4, "margin_warmup_epochs": 2.0})
    assert [margins(options, epoch)["margin"] for epoch in (0, 0.5, 1, 2, 3)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert margins(OPTIONS, 0) == {"margin": OPTIONS.margin}
    head = build_head(options, 4)
    seen: list[float] = []
    head.register_forward_pre_hook(lambda module, _: seen.append(module.margin))  # type: ignore[arg-type]
    run(faces, make_defense(), fabric, options, head=head)
    assert seen == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_an_epoch_is_split_evenly_and_completely() -> None:
    order = epoch_order(10, 3, 4, torch.Generator().manual_seed(0))
    assert sorted(len(batch) for batch in order) == [7, 7, 8, 8]
    assert torch.equal(torch.cat(order).bincount(), torch.full((10,), 3))
    assert not torch.equal(torch.cat(order), torch.arange(30) % 10)
