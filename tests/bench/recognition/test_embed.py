from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

from bench.data.faces import FaceSet
from bench.images import to_float
from bench.nets.recogniser import Recogniser, build_recogniser
from bench.recognition.embed import embed_faces


@pytest.fixture
def recogniser(make_defense: Any) -> Recogniser:
    recogniser = build_recogniser("ir-tiny", make_defense().representation_shape, 16)
    recogniser(700 * torch.rand(8, 3, 16, 16) - 350)  # statistics
    return recogniser.eval()


def generators(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(11 + number)


@pytest.mark.parametrize("flip", [True, False])
def test_the_embedding_is_image_plus_mirror_image_under_one_state(
    recogniser: Recogniser, faces: FaceSet, make_defense: Any, flip: bool
) -> None:
    defense = make_defense()
    embeddings = embed_faces(recogniser, defense, faces, generators=generators, flip=flip)
    images = to_float(faces.images)
    state = torch.cat([make_defense().draw(1, generators(number)) for number in range(len(faces))])
    views = [images, images.flip(-1)] if flip else [images]
    with torch.no_grad():
        protected = [defense.protect(view, generators(0), state=state).representation for view in views]
        expected = F.normalize(sum(recogniser(representation) for representation in protected))
    torch.testing.assert_close(embeddings, expected)
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad


def test_each_query_draws_one_state_of_its_own(recogniser: Recogniser, faces: FaceSet, make_defense: Any) -> None:
    defense = make_defense()
    embed_faces(recogniser, defense, faces, generators=generators, batch_size=10)
    assert set(defense.labels) == {None}  # no labels at a client
    states = torch.cat([state for _, state in defense.calls])
    assert len(states) == 2 * len(faces)  # the image and its mirror image
    assert len(states.unique()) == 3


def test_what_is_drawn_for_a_face_does_not_depend_on_the_others(
    recogniser: Recogniser, faces: FaceSet, make_defense: Any
) -> None:
    calls: list[tuple[int, int]] = []
    every = embed_faces(
        recogniser,
        make_defense(),
        faces,
        generators=generators,
        batch_size=10,
        report=lambda done, total, **_: calls.append((done, total)),
    )
    assert calls == [(10, 24), (20, 24), (24, 24)]
    last = faces.subset(torch.tensor([len(faces) - 1]))
    alone = embed_faces(recogniser, make_defense(), last, generators=lambda _: generators(len(faces) - 1))
    torch.testing.assert_close(alone, every[-1:])


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_statistics_are_left_as_they_were(
    recogniser: Recogniser, faces: FaceSet, make_defense: Any, training: bool
) -> None:
    recogniser.train(training)
    before = {name: value.clone() for name, value in recogniser.state_dict().items()}
    embed_faces(recogniser, make_defense(), faces, generators=generators)
    assert recogniser.training is training
    assert all(torch.equal(value, before[name]) for name, value in recogniser.state_dict().items())


def test_the_defence_keeps_float32_when_the_recogniser_does_not(
    recogniser: Recogniser, faces: FaceSet, make_defense: Any
) -> None:
    defense = make_defense()
    inside: list[bool] = []
    original = defense.transform

    def spy(*arguments: Any) -> torch.Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        result: torch.Tensor = original(*arguments)
        return result

    defense.transform = spy
    mixed = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    half = embed_faces(recogniser, defense, faces, generators=generators, fabric=mixed)
    full = embed_faces(recogniser, make_defense(), faces, generators=generators)
    assert inside
    assert not any(inside)
    assert not torch.equal(half, full)
    assert float((half * full).sum(1).min()) > 0.99


def test_no_faces_give_no_rows(recogniser: Recogniser, faces: FaceSet, make_defense: Any) -> None:
    none = faces.subset(torch.zeros(len(faces), dtype=torch.bool))
    assert embed_faces(recogniser, make_defense(), none, generators=generators).shape == (0, 16)
