"""Trivial recoveries."""

from __future__ import annotations

import pytest
import torch

from bench.errors import DataError
from bench.metrics import floors
from bench.metrics.floors import grey, mean_face, nearest, noise


def pictures(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_mean_face_is_the_mean_of_the_public_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_CHUNK", 4)  # more than one chunk, the last one smaller
    public = pictures(10)
    result = mean_face(public, 3)
    assert result.shape == (3, 3, 8, 8)
    torch.testing.assert_close(result[2], public.double().mean(0).div(255).float())
    torch.testing.assert_close(mean_face(public.float() / 255, 1)[0], result[0])


def test_grey_and_noise() -> None:
    assert grey(2, 5).shape == (2, 3, 5, 5)
    assert (grey(2, 5) == 0.5).all()
    drawn = noise(50, 16, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 3, 16, 16)
    assert 0 <= float(drawn.min()) < 0.001
    assert 0.999 < float(drawn.max()) < 1
    assert float(drawn.var()) == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(drawn, noise(50, 16, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_nearest_is_the_nearest_representation(batch_size: int) -> None:
    public, victims = pictures(30), pictures(11, seed=1)
    matrix = torch.randn(192, 20, generator=torch.Generator().manual_seed(2))

    def protect(faces: torch.Tensor) -> torch.Tensor:
        assert faces.dtype == torch.float32
        assert len(faces) <= batch_size
        return (faces.flatten(1) @ matrix).view(-1, 5, 2, 2)

    observed = ((victims.float() / 255).flatten(1) @ matrix).view(-1, 5, 2, 2)
    keys = (public.float() / 255).flatten(1) @ matrix
    expected = torch.cdist(observed.flatten(1).double(), keys.double()).argmin(1)
    assert len(torch.unique(expected)) > 3
    faces = nearest(observed, public, protect, batch_size=batch_size)
    torch.testing.assert_close(faces, public[expected].float() / 255)


def test_wrong_input_is_refused() -> None:
    public = pictures(4)
    with pytest.raises(DataError, match=r"\(M, 3, H, W\), M > 0"):
        mean_face(public[:0], 2)
    with pytest.raises(DataError, match="uint8 or float"):
        mean_face(public.long(), 2)
    with pytest.raises(DataError, match="public representations are"):
        nearest(torch.rand(2, 3, 4, 4), public, lambda faces: faces)
