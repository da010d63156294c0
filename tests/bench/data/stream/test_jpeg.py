from __future__ import annotations

import pytest
import torch
from PIL import Image

from bench.data.decode import Limits, decode_image
from bench.data.stream import jpeg
from bench.data.stream.jpeg import decode_batch, is_plain_jpeg


def tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@pytest.fixture
def kinds(make_image, make_encoded):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return {
        "plain": make_encoded(make_image(0), quality=90),
        "progressive": make_encoded(make_image(1), progressive=True),
        "444": make_encoded(make_image(2), subsampling=0),
        "comment": make_encoded(make_image(3), comment=b"x" * 300),
        "grey": make_encoded(make_image(4, mode="L")),
        "cmyk": make_encoded(make_image(5, mode="CMYK")),
        "turned": make_encoded(make_image(6), exif=exif),
        "larger": make_encoded(make_image(7, (200, 150))),
        "png": make_encoded(make_image(8), "PNG"),
    }


def test_which_are_plain(kinds):
    assert [name for name, data in kinds.items() if is_plain_jpeg(data, 112)] == [
        "plain",
        "progressive",
        "444",
        "comment",
    ]
    assert not is_plain_jpeg(kinds["plain"], 96)
    assert not any(is_plain_jpeg(kinds["plain"][:n], 112) for n in range(100))


@pytest.mark.parametrize("native", [True, False])
def test_pixels_are_those_of_the_long_way(kinds, native, monkeypatch):
    if not native:
        monkeypatch.setattr(jpeg, "_decode_native", None)
    images, failed = decode_batch([tensor(data) for data in kinds.values()], 112)
    assert failed == {}
    for image, (name, data) in zip(images, kinds.items(), strict=True):
        difference = (image.int() - decode_image(data, 112).int()).abs().max()
        assert difference <= 2, name  # two builds of libjpeg may round differently


def test_the_native_decoder_is_used(kinds, monkeypatch):
    if jpeg._decode_native is None:
        pytest.skip("torchvision here has no JPEG decoder")
    monkeypatch.setattr(jpeg, "decode_image", None)
    assert decode_batch([tensor(kinds["plain"])], 112)[1] == {}


def test_what_cannot_be_decoded_is_named_and_black(kinds):
    good = kinds["plain"]
    images, failed = decode_batch([tensor(d) for d in (good[:2000], good, b"", b"nonsense" * 9)], 112)
    assert set(failed) == {0, 2, 3}
    assert "truncated" in failed[0]
    assert failed[2] == "empty"
    assert not images[[0, 2, 3]].any()
    assert torch.equal(images[1], decode_batch([tensor(good)], 112)[0][0])


def test_limits_hold_for_plain_ones_too(kinds):
    _, failed = decode_batch([tensor(kinds["plain"])], 112, Limits(max_bytes=100))
    assert "limit is 100" in failed[0]


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_exactly_and_cropped_they_are_those_of_the_long_way_to_the_bit(kinds, crop):
    images, _ = decode_batch([tensor(data) for data in kinds.values()], 112, crop=crop, exact=crop == 1)
    expected = [decode_image(data, 112, crop=crop) for data in kinds.values()]
    assert torch.equal(images, torch.stack(expected))
