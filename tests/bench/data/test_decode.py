from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data import decode
from bench.data.decode import (
    AT_ONCE,
    ImageError,
    Limits,
    decode_all,
    decode_batch,
    decode_image,
    in_array,
    open_image,
    shown,
)
from bench.errors import DataError


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
    plain = [name for name, data in kinds.items() if decode.plain_header(data, 112)]
    assert plain == ["plain", "progressive", "444", "comment"]
    assert not decode.plain_header(kinds["plain"], 96)
    assert not any(decode.plain_header(kinds["plain"][:n], 112) for n in range(100))


def test_headers_are_told_apart_however_files_follow_each_other(kinds, make_image, make_encoded):
    """Of another size, turned, and cut off within the header: each after one that is plain, and before another."""
    others = [
        kinds["larger"],
        kinds["turned"],
        kinds["444"],
        kinds["plain"][:60],
        make_encoded(make_image(9, (96, 96))),
    ]
    files = [file for other in others for file in (kinds["plain"], other)]
    images, failed = decode_batch([in_array(data) for data in files], 112)
    assert set(failed) == {7}
    for place, data in enumerate(files):
        if place not in failed:
            assert (images[place].int() - decode_image(data, 112).int()).abs().max() <= 2, place


@pytest.mark.parametrize("native", [True, False])
def test_pixels_are_those_of_the_long_way(kinds, native, monkeypatch):
    if not native:
        monkeypatch.setattr(decode, "_native_decoder", lambda: None)
    images, failed = decode_batch([in_array(data) for data in kinds.values()], 112)
    assert failed == {}
    for image, (name, data) in zip(images, kinds.items(), strict=True):
        difference = (image.int() - decode_image(data, 112).int()).abs().max()
        assert difference <= 2, name  # two builds of libjpeg may round differently


def test_the_native_decoder_is_used(kinds, monkeypatch):
    if decode._native_decoder() is None:
        pytest.skip("torchvision here has no JPEG decoder")
    monkeypatch.setattr(decode, "_pixels", None)
    assert decode_batch([in_array(kinds["plain"])], 112)[1] == {}


def test_what_cannot_be_decoded_is_named_and_black(kinds):
    good = kinds["plain"]
    images, failed = decode_batch([in_array(d) for d in (good[:2000], good, b"", b"nonsense" * 9)], 112)
    assert set(failed) == {0, 2, 3}
    assert "truncated" in failed[0]
    assert failed[2] == "empty"
    assert not images[[0, 2, 3]].any()
    assert torch.equal(images[1], decode_batch([in_array(good)], 112)[0][0])


def test_limits_hold_for_plain_ones_too(kinds):
    _, failed = decode_batch([in_array(kinds["plain"])], 112, Limits(max_bytes=100))
    assert "limit is 100" in failed[0]


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_exactly_and_cropped_they_are_those_of_the_long_way_to_the_bit(kinds, crop):
    images, _ = decode_batch([in_array(data) for data in kinds.values()], 112, crop=crop, exact=crop == 1)
    expected = [decode_image(data, 112, crop=crop) for data in kinds.values()]
    assert torch.equal(images, torch.stack(expected))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_png_pixels_come_out_exactly_and_grey_is_repeated(make_image, make_encoded, mode):
    image = make_image(0, (20, 20), mode)
    pixels = decode_image(make_encoded(image, "PNG"))
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.numpy(), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_each_format_is_read_and_refused_where_it_was_cut_off(make_image, make_encoded, kind):
    image = make_image(1, 48)
    data = make_encoded(image, kind, quality=100)
    pixels = decode_image(data).numpy().transpose(1, 2, 0)
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < (12 if kind == "GIF" else 4)  # 256 colours
    for share in (0.3, 0.7, 0.95):
        with pytest.raises(ImageError):
            decode_image(data[: int(share * len(data))], 32)


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI"])
def test_other_formats_are_refused(make_image, make_encoded, kind):
    with pytest.raises(ImageError, match="not a JPEG, PNG, BMP, WebP, TIFF, GIF or PNM image"):
        decode_image(make_encoded(make_image(1, 48), kind))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC, AVIF or a film: convert it"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000: convert it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS: fetch the file itself"),
        (b"<!DOCTYPE html>", "text such as a web page"),
        (b"PK\x03\x04", "a ZIP archive"),
    ],
)
def test_what_stands_in_the_place_of_an_image_is_named(data, what):
    with pytest.raises(ImageError, match=what):
        decode_image(data + b"\1" * 64)


def test_an_odd_header_of_an_image_that_is_read_says_nothing(make_image, make_encoded):
    exif = Image.Exif()
    exif[0x0112] = 1
    data = make_encoded(make_image(0), exif=exif).replace(
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"
    )
    with pytest.warns(UserWarning, match="EXIF"):
        decode_image(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, failed = decode_all(np.arange(1), lambda rows: [in_array(data)], 32)
    assert (len(images), failed) == (1, {})


def test_netpbm_and_tiff_of_sixteen_bits(make_encoded):
    values = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
    expected = np.round(values / 257).astype(np.uint8)
    plain = b"P5 64 64 65535\n" + values.astype(">u2").tobytes()
    for data in (plain, make_encoded(Image.fromarray(values), "TIFF")):
        np.testing.assert_array_equal(decode_image(data).numpy()[0], expected)
    text = b"P2 8 8 255\n" + b" ".join(b"%d" % value for value in range(64))
    np.testing.assert_array_equal(decode_image(text).numpy()[2].ravel(), np.arange(64))


@pytest.mark.parametrize(("dtype", "what"), [(np.float32, "floating-point pixels"), (np.int32, "grey of 32 bits")])
def test_pixels_without_a_range_are_refused(make_encoded, dtype, what):
    with pytest.raises(ImageError, match=what):
        decode_image(make_encoded(Image.fromarray(np.full((16, 16), 70000, dtype=dtype)), "TIFF"))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "GIF"])
def test_a_bomb_is_refused_by_its_header(make_encoded, kind):
    data = make_encoded(Image.new("L", (3000, 2000)), kind)
    with pytest.raises(ImageError, match="3000x2000 pixels, the limit is 5000000"):
        decode_image(data, limits=Limits(max_pixels=5_000_000))


def test_sixteen_bit_grey_is_scaled_not_clipped(make_encoded):
    values = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
    pixels = decode_image(make_encoded(Image.fromarray(values), "PNG")).numpy()
    np.testing.assert_array_equal(pixels[1], np.round(values / 257).astype(np.uint8))
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_transparent_parts_become_black(make_image, make_encoded):
    image = make_image(3, 16, "RGBA")
    alpha = np.zeros((16, 16), dtype=np.uint8)
    alpha[:, 8:] = 255
    image.putalpha(Image.fromarray(alpha))
    pixels = decode_image(make_encoded(image, "PNG")).numpy()
    assert pixels[:, :, :8].max() == 0
    np.testing.assert_array_equal(pixels[:, :, 8:], np.asarray(image)[:, 8:, :3].transpose(2, 0, 1))


def test_palette_with_and_without_transparency(make_encoded):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 16, 8))
    plain = decode_image(make_encoded(image, "PNG"))
    assert plain[:, 0, 0].tolist() == [10, 20, 30]
    assert plain[:, 15, 0].tolist() == [200, 100, 50]
    holed = decode_image(make_encoded(image, "PNG", transparency=0))
    assert holed[:, 0, 0].tolist() == [0, 0, 0]
    assert holed[:, 15, 0].tolist() == [200, 100, 50]


def test_cmyk_jpeg(make_encoded):
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # red
    pixel = decode_image(make_encoded(image, "JPEG", quality=100))[:, 16, 16]
    assert (pixel.int() - torch.tensor([255, 0, 0])).abs().max() < 10


def test_exif_orientation_is_applied(make_image, make_encoded):
    image = make_image(4, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # has to be turned clockwise by a quarter
    pixels = decode_image(make_encoded(image, "PNG", exif=exif)).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(image), k=-1))


def test_non_square_images_are_cropped_centrally(make_encoded):
    values = np.zeros((16, 48, 3), dtype=np.uint8)
    values[:, 16:32] = 200
    pixels = decode_image(make_encoded(Image.fromarray(values), "PNG"), 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.eq(200).all()


def test_crop_keeps_the_centre(make_encoded):
    values = np.zeros((64, 64, 3), dtype=np.uint8)
    values[16:48, 16:48] = 255
    assert decode_image(make_encoded(Image.fromarray(values), "PNG"), 32, crop=0.5).eq(255).all()
    assert decode_image(make_encoded(Image.fromarray(values), "PNG"), 64, crop=1.0)[0, 0, 0] == 0


def test_shrinking_is_antialiased(make_encoded):
    # A fine checkerboard must turn grey; picking pixels would leave it black and white.
    board = np.indices((96, 96)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    pixels = decode_image(make_encoded(image, "PNG"), 24).to(torch.float32)
    assert (pixels - 127.5).abs().max() < 6


def test_resize_agrees_with_torch(make_image, make_encoded):
    image = make_image(5, 112)
    pixels = decode_image(make_encoded(image, "PNG"), 64).to(torch.float32)
    whole = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None].to(torch.float32)
    reference = torch.nn.functional.interpolate(whole, 64, mode="bilinear", antialias=True)[0]
    assert (pixels - reference).abs().max() <= 1.01  # Pillow rounds after each direction


def _huge_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize("side", [7100, 10_000, 60_000])
def test_decompression_bombs_are_refused_on_the_header(side, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("a bomb was decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    bomb = _huge_png(side)
    with decode.own_limits(), pytest.raises(ImageError, match="limit"):
        open_image(bomb)
    images, failed = decode_all(np.arange(1), lambda _: [in_array(bomb)], 16)
    assert len(images) == 0
    assert "limit" in failed[0]


def test_limits_are_exact(make_image, make_encoded):
    data = make_encoded(make_image(0, 20), "PNG")
    assert decode_image(data, limits=Limits(max_bytes=len(data), max_pixels=400)).shape == (3, 20, 20)
    with pytest.raises(ImageError, match=f"{len(data)} bytes, the limit"):
        decode_image(data, limits=Limits(max_bytes=len(data) - 1))
    with pytest.raises(ImageError, match="20x20 pixels, the limit is 399"):
        decode_image(data, limits=Limits(max_pixels=399))


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_rubbish_is_refused(data):
    with pytest.raises(ImageError):
        decode_image(data)


def test_tiny_images_are_refused(make_image, make_encoded):
    with pytest.raises(ImageError, match="too small"):
        decode_image(make_encoded(make_image(0, (7, 100)), "PNG"), 16)


def test_decode_all_keeps_order_counts_and_reports(make_jpeg):
    count = 3 * AT_ONCE + 5
    blobs = [make_jpeg(i, 24) for i in range(count + 1)]
    broken = {0, AT_ONCE, count - 1}
    reports: list[tuple[int, int]] = []
    rows = np.arange(1, count + 1)

    def read(some):
        return [in_array(blobs[row][: 50 if row - 1 in broken else None]) for row in some.tolist()]

    images, failed = decode_all(rows, read, 24, report=lambda *args: reports.append(args))
    assert set(failed) == broken
    good = [blobs[i + 1] for i in range(count) if i not in broken]
    assert torch.equal(images, torch.stack([decode_image(blob, 24) for blob in good]))
    assert reports[-1] == (count, count)
    assert [n for n, _ in reports] == sorted({n for n, _ in reports})


def test_decode_all_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(DataError, match=r"need 0\.\d GiB of memory.*smaller image size"):
        decode_all(np.arange(10_000), lambda _: [], 64)


def test_a_bug_in_the_reader_is_not_swallowed():
    def read(_):
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        decode_all(np.arange(3), read, 16)


def test_files_that_cannot_be_read(tmp_path: Path, make_jpeg):
    (tmp_path / "good.jpg").write_bytes(make_jpeg(0))
    (tmp_path / "folder.jpg").mkdir()
    limits = Limits(max_bytes=(tmp_path / "good.jpg").stat().st_size)
    assert decode.read_image_file(tmp_path / "good.jpg", limits) == make_jpeg(0)
    (tmp_path / "big.jpg").write_bytes(make_jpeg(0) + b"x")
    for name, message in {"folder": "regular file", "gone": "regular file", "big": f"is {limits.max_bytes}"}.items():
        with pytest.raises(ImageError, match=message):
            decode.read_image_file(tmp_path / f"{name}.jpg", limits)


def test_shown_stays_on_one_line():
    assert shown("a\nb\x1b[31m\udc80é") == "a\\nb\\x1b[31m\\udc80é"


def test_animations_show_their_first_frame(make_image):
    frames = [make_image(seed, 16) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(buffer.getvalue()).numpy(), np.asarray(frames[0]).transpose(2, 0, 1))
