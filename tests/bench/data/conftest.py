"""Small data made on the spot: noise in the shape of images, and the files that the loaders read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sets import PAIRS, PEOPLE


def noise_image(seed: int, size: int | tuple[int, int] = 112, mode: str = "RGB") -> Image.Image:
    """Smooth noise, (width, height) or square; different for every seed."""
    width, height = (size, size) if isinstance(size, int) else size
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, size: int | tuple[int, int] = 112) -> bytes:
    return encode(noise_image(seed, size), quality=90)


@pytest.fixture
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def make_image() -> Callable[..., Image.Image]:
    return noise_image


@pytest.fixture
def make_encoded() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """``make_tree({"Ann": 3, "Bob": 2})``: a folder with LFW-style names, seeds counting from 0."""

    def make(people: dict[str, int], name: str = "faces", size: int = 112) -> Path:
        root = tmp_path / name
        seed = 0
        for person, count in people.items():
            (root / person).mkdir(parents=True)
            for number in range(1, count + 1):
                (root / person / f"{person}_{number:04d}.jpg").write_bytes(jpeg(seed, size))
                seed += 1
        return root

    return make


@pytest.fixture
def paired(make_tree: Callable[..., Path]) -> Path:
    """A folder of five people, three of them named in its ``pairs.txt``."""
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    return root
