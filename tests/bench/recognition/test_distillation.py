"""Recognisers that learn to agree with a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from training_at_work import OPTIONS

from bench.data.faces import FaceSet
from bench.errors import DataError, UsageError
from bench.images import to_float
from bench.nets.options import AugmentationOptions
from bench.nets.recogniser import build_recogniser
from bench.recognition.learner import Classifier
from bench.recognition.options import TrainingOptions
from bench.recognition.training import build_head, train
from defenses.none import Unprotected

SIZE = 8


def teach(images: Tensor) -> Tensor:
    """Another view of uint8 faces (N, 3, H, W): a fixed random map of their coarse colours, unit rows (N, SIZE)."""
    coarse = F.adaptive_avg_pool2d(to_float(images), 4).flatten(1) - 0.5
    weights = torch.randn(48, SIZE, generator=torch.Generator().manual_seed(5))
    return F.normalize(coarse @ weights)


@pytest.mark.parametrize(("classification", "distillation"), [(1.0, 1.0), (0.0, 1.0), (0.5, 3.0), (1.0, 0.0)])
def test_the_loss_is_the_weighted_sum_of_both(classification: float, distillation: float) -> None:
    generator = torch.Generator().manual_seed(0)
    faces, labels = torch.rand(10, 3, 16, 16, generator=generator), torch.arange(10) % 4
    targets = torch.randn(10, SIZE, generator=generator)
    options = TrainingOptions(
        classification=classification, distillation=distillation, embedding_size=SIZE, head="cosface", margin=0.2
    )
    recogniser = build_recogniser("ir-tiny", (3, 16, 16), SIZE, seed=1).eval()
    head = build_head(options, 4)
    loss, _ = Classifier(recogniser, head, options)(faces, labels, targets)

    embeddings, centres = recogniser(faces).detach().double().numpy(), head.weight.detach().double().numpy()
    unit, aims = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (embeddings, targets.double().numpy()))
    logits = unit @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T
    logits[np.arange(10), labels] -= 0.2
    logits *= options.scale
    entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), labels]
    expected = classification * entropy.mean() + distillation * (1 - (unit * aims).sum(1)).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def people(count: int, seed: int) -> FaceSet:
    """Six smooth, slightly varied pictures each of people who differ in coarse colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 3, 4, 4, generator=generator) + 0.3 * torch.randn(
        count, 6, 3, 4, 4, generator=generator
    )
    large = F.interpolate(coarse.flatten(0, 1), size=16, mode="bilinear")
    images = (255 * torch.sigmoid(large)).to(torch.uint8)
    return FaceSet(images, torch.arange(count).repeat_interleave(6), tuple(map(str, range(count))))


def test_a_taught_recogniser_sees_strangers_as_its_teacher_does(fabric: Fabric) -> None:
    faces, strangers = people(32, seed=1), people(12, seed=2)
    defense, target = Unprotected(image_size=16), teach(strangers.images)
    options = OPTIONS.model_copy(
        update={"epochs": 6, "batch_size": 16, "embedding_size": SIZE, "augmentation": AugmentationOptions(flip=0.0)}
    )

    def learnt(teacher: Tensor | None, **weights: float) -> tuple[float, float]:
        """Mean cosine to the teacher's embeddings of strangers; correlation of the cosines between strangers."""
        recogniser = build_recogniser("ir-tiny", (3, 16, 16), SIZE, seed=1)
        how = options.model_copy(update=weights)
        train(recogniser, faces, defense, how, fabric=fabric, seed=0, teacher=teacher)
        with torch.no_grad():
            found = recogniser.embed(defense.protect(to_float(strangers.images), torch.Generator()).representation)
        pairs = torch.triu_indices(len(found), len(found), 1)
        cosines = torch.stack([(rows @ rows.T)[pairs[0], pairs[1]] for rows in (found, target)])
        return float((found * target).sum(1).mean()), float(torch.corrcoef(cosines)[0, 1])

    labels, taught = learnt(None), learnt(teach(faces.images), classification=0.0)
    print(labels, taught)
    assert taught[0] > 0.45 > labels[0] + 0.3
    assert taught[1] > labels[1] + 0.1


def test_an_epochs_hits_are_faces_nearest_to_where_the_teacher_has_their_person(fabric: Fabric) -> None:
    faces = people(6, seed=1)
    options = OPTIONS.model_copy(update={"classification": 0.0, "embedding_size": SIZE, "epochs": 8})
    recogniser = build_recogniser("ir-tiny", (3, 16, 16), SIZE, seed=1)
    report = train(
        recogniser, faces, Unprotected(image_size=16), options, fabric=fabric, seed=0, teacher=teach(faces.images)
    )
    assert report.accuracy > 0.8  # the head has learnt nothing: its gradient is 0
    assert report.losses[-1] < report.losses[0]


def test_a_taught_training_goes_on_and_another_teachers_is_refused(
    faces: FaceSet, make_defense: Any, fabric: Fabric, tmp_path: Path
) -> None:
    options = OPTIONS.model_copy(update={"embedding_size": SIZE})
    teacher = teach(faces.images)

    def go(teacher: Tensor | None, **more: Any) -> Any:
        recogniser = build_recogniser("ir-tiny", (3, 16, 16), SIZE, seed=1)
        train(recogniser, faces, make_defense(), options, fabric=fabric, seed=0, teacher=teacher, **more)
        return recogniser.state_dict()

    def stop(done: int, total: int, **_: float) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    whole = go(teacher)
    with pytest.raises(KeyboardInterrupt):
        go(teacher, checkpoint=tmp_path, report=stop)
    for other in (None, -teacher):
        with pytest.raises(DataError, match="belongs to a training with other options"):
            go(other, checkpoint=tmp_path)
    resumed = go(teacher, checkpoint=tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_embeddings_of_other_faces_and_nothing_to_learn_are_refused(
    faces: FaceSet, make_defense: Any, fabric: Fabric
) -> None:
    recogniser = build_recogniser("ir-tiny", (3, 16, 16), SIZE, seed=1)
    with pytest.raises(ValueError, match=r"must be \(24, 8\), got \(23, 8\)"):
        train(recogniser, faces, make_defense(), OPTIONS, fabric=fabric, seed=0, teacher=torch.ones(23, SIZE))
    alone = OPTIONS.model_copy(update={"classification": 0.0})
    with pytest.raises(UsageError, match="nothing to learn from without a teacher"):
        train(recogniser, faces, make_defense(), alone, fabric=fabric, seed=0)
    with pytest.raises(ValueError, match="both 0: there is nothing to learn from"):
        TrainingOptions(classification=0.0, distillation=0.0)
