"""The separable block DCT against the textbook pipeline, and its algebra."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden import COEFFICIENTS, PIXELS, golden, on_grid
from golden import pictures as golden_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import generator, noise
from scipy.fft import dctn

from bench.run.textbook import textbook, textbook_spectrum
from defenses import frequency
from defenses.frequency import (
    CHANNELS,
    FrequencyOperator,
    axis_factors,
    block_dct,
    block_dct_adjoint,
    dc_offset,
    dct_matrix,
    inverse_block_dct,
    inverse_block_dct_adjoint,
    map_size,
    phase_factors,
    upsampling_matrix,
    zigzag,
)
from defenses.partialface import PartialFace

EVERY = torch.arange(CHANNELS)
FACTORS = (8, 4, 3, 2, 1)


def _channels_of_each(count, length, seed=0):
    drawn = generator(seed)
    return torch.stack([torch.randperm(CHANNELS, generator=drawn)[:length] for _ in range(count)])


@pytest.mark.parametrize(("size", "dtype"), [(n, torch.float64) for n in (112, 64, 40, 13, 8)] + [(64, torch.float32)])
def test_all_channels_equal_the_textbook(size, dtype):
    faces = noise(2, size)
    actual = block_dct(faces.to(dtype), EVERY)
    expected = textbook_spectrum(faces).flatten(1, 2)
    assert (actual.shape, actual.dtype) == ((2, 192, size, size), dtype)
    # Per channel: the weak high frequencies must not hide behind the DC.
    error = (actual - expected).abs().amax((0, 2, 3)) / expected.abs().amax((0, 2, 3))
    assert float(error.max()) < (1e-10 if dtype == torch.float64 else 1e-4)


# 57 and 13 leave part of a block at every factor below 8, 3 and 2 are less than one block at factor 1.
@pytest.mark.parametrize("size", [64, 57, 13, 3, 2])
@pytest.mark.parametrize("factor", FACTORS)
def test_any_factor_equals_the_textbook(factor, size):
    faces = noise(2, size)
    actual = block_dct(faces, EVERY, upsampling=factor)
    expected = textbook_spectrum(faces, factor).flatten(1, 2)
    assert actual.shape[2:] == (map_size(size, factor),) * 2 == expected.shape[2:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    single = block_dct(faces.float(), EVERY, upsampling=factor)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-3)


def test_without_upsampling_it_is_the_block_dct_of_jpeg():
    """SciPy's DCT of the face's own blocks, and an orthonormal map: nothing is lost in all channels."""
    faces = noise(2, 24)
    grey = faces[:, :1].expand(-1, 3, -1, -1)
    actual = block_dct(grey, EVERY, upsampling=1).view(2, 3, 64, 3, 3)
    blocks = (255 * grey[:, 0] - 128).view(2, 3, 8, 3, 8).permute(0, 2, 4, 1, 3)
    expected = dctn(blocks.numpy(), axes=(1, 2), norm="ortho").reshape(2, 64, 3, 3)
    torch.testing.assert_close(actual[:, 0], torch.from_numpy(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(actual[:, 1:], torch.zeros_like(actual[:, 1:]), rtol=0, atol=1e-9)
    factors = axis_factors(24, 1).transpose(0, 1).reshape(24, 24)
    torch.testing.assert_close(factors @ factors.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [40, 16])
def test_own_channels_of_each_face_equal_the_textbook(size):
    faces, channels = noise(5, size), _channels_of_each(5, 9)
    channels[2, 4] = 0  # the level shift has to land in the right column
    torch.testing.assert_close(block_dct(faces, channels), textbook(faces, channels), rtol=0, atol=1e-7)


@pytest.mark.parametrize("factor", FACTORS)
def test_chunking_changes_nothing(factor, monkeypatch):
    faces, channels = noise(7, 16), _channels_of_each(7, 5)
    whole = block_dct(faces, channels, upsampling=factor)
    back = block_dct_adjoint(whole, channels, upsampling=factor)
    monkeypatch.setattr(frequency, "_CPU_CHUNK_ELEMENTS", 2 * 15 * 16 * 16)  # chunks of two, the last of one
    assert torch.equal(block_dct(faces, channels, upsampling=factor), whole)
    assert torch.equal(block_dct_adjoint(whole, channels, upsampling=factor), back)


def test_repeated_and_unsorted_channels():
    faces = noise(2, 16)
    spectrum = block_dct(faces, EVERY).view(2, 3, 64, 16, 16)
    channels = torch.tensor([63, 0, 9, 9, 1, 8, 63])
    torch.testing.assert_close(block_dct(faces, channels), spectrum[:, :, channels].flatten(1, 2), rtol=0, atol=1e-10)


def test_memory_format_half_types_and_autocast():
    faces = noise(2, 16, dtype=torch.float32)
    expected = block_dct(faces, EVERY)
    assert torch.equal(block_dct(faces.to(memory_format=torch.channels_last), EVERY), expected)
    half = faces.to(torch.bfloat16)
    assert torch.equal(block_dct(half, EVERY), block_dct(half.float(), EVERY))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_dct(faces, EVERY), expected)


def test_works_after_a_first_call_in_inference_mode():
    faces = noise(1, 17)  # a size that no other test uses, so that the taps are cached here
    with torch.inference_mode():
        block_dct(faces, EVERY)
    faces.requires_grad_()
    block_dct(faces, EVERY).square().sum().backward()
    assert faces.grad is not None
    assert float(faces.grad.abs().max()) > 0


def test_level_shift_reaches_luma_dc_only():
    grey = block_dct(torch.full((1, 3, 16, 16), 128 / 255, dtype=torch.float64), EVERY)
    torch.testing.assert_close(grey, torch.zeros_like(grey), atol=1e-4, rtol=0)
    black = block_dct(torch.zeros(1, 3, 16, 16), EVERY)
    expected = torch.zeros(192)
    expected[0] = -1024
    torch.testing.assert_close(black[0, :, 3, 5], expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(dc_offset(EVERY).float(), expected)


@pytest.mark.parametrize(
    ("factor", "channel", "bound"), [(8, 1, 576), (8, 9, 326), (8, 18, 78), (8, 32, 63), (1, 4, 1020)]
)
def test_documented_value_range_is_tight(factor, channel, bound):
    """The face that a block responds to most, in black and white, attains the range given in the docstrings."""
    factors = axis_factors(112, factor)
    row, column = channel // 8, channel % 8
    i, j = (int(factors[k].abs().sum(-1).argmax()) for k in (row, column))
    face = (torch.outer(factors[row, i], factors[column, j]) > 0).double().expand(1, 3, -1, -1)
    sent = block_dct(face, torch.tensor([channel]), upsampling=factor)
    assert float(sent[0, 0, i, j]) == pytest.approx(bound, abs=0.6)


def test_no_channel_exceeds_the_range_without_upsampling():
    reach = axis_factors(112, 1).abs().sum(-1).amax(-1)
    assert float((127.5 * reach[EVERY[1:] // 8] * reach[EVERY[1:] % 8]).max()) < 1020.1


def test_value_range_of_the_kept_channels():
    kept = torch.tensor(sorted(set(range(64)) - set(zigzag(10))))
    reach = axis_factors(112).abs().sum(-1).amax(-1)
    assert float((127.5 * reach[kept // 8] * reach[kept % 8]).max()) < 78.5


def test_any_factorare_tridiagonal_and_the_dct_orthonormal():
    factors = axis_factors(40)
    i = torch.arange(40)
    outside = (i[:, None] - i).abs() > 1
    assert float(factors[:, outside].abs().max()) == 0
    torch.testing.assert_close(dct_matrix() @ dct_matrix().T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    # A constant has energy in A_0 only.
    sums = factors.sum(-1)
    assert float(sums[1:].abs().max()) < 1e-12
    torch.testing.assert_close(sums[0], torch.full((40,), math.sqrt(8), dtype=torch.float64))


@pytest.mark.parametrize("factor", FACTORS)
def test_any_factorare_banded(factor):
    """Block i looks at no pixel more than its own 8 / factor, one before it and one behind."""
    factors = axis_factors(40, factor)
    first = 8 * torch.arange(map_size(40, factor)) // factor
    pixel = torch.arange(40)
    outside = (pixel < first[:, None] - 1) | (pixel > first[:, None] + -(-8 // factor))
    assert float(factors[:, outside].abs().max()) == 0
    sums = factors.sum(-1)
    assert float(sums[1:].abs().max()) < 1e-12


@pytest.mark.parametrize("factor", FACTORS)
def test_upsampling_is_torch_interpolation(factor):
    row = torch.rand(1, 1, 23, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(row, scale_factor=factor, mode="linear", align_corners=True)
    torch.testing.assert_close(upsampling_matrix(23, factor) @ row[0, 0], expected[0, 0])


def test_zigzag_is_the_jpeg_scan():
    assert zigzag()[:20] == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33]
    assert sorted(zigzag()) == list(range(64))
    assert zigzag()[-1] == 63
    assert sorted(zigzag(10)) == [0, 1, 2, 3, 8, 9, 10, 16, 17, 24]


def test_the_pruned_triangle_holds_the_energy_of_natural_images():
    """1/f images, as natural ones are: at least 95 % of mean |x| lies in u + v <= 3."""
    frequencies = torch.fft.fftfreq(112)
    radius = (frequencies[:, None] ** 2 + frequencies**2).sqrt().clamp(min=1 / 112)
    spectrum = torch.fft.fft2(torch.randn(4, 3, 112, 112, generator=generator(1))) / radius**1.5
    images = torch.fft.ifft2(spectrum).real
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    energy = block_dct((images - low) / (high - low), EVERY).view(4, 3, 64, -1).abs().mean((0, 1, 3))
    triangle = torch.tensor(zigzag(10))
    assert float(energy[triangle].sum() / energy.sum()) >= 0.95
    assert int(energy.argmax()) == 0


# -- algebra -------------------------------------------------------------------------------------

problems = st.tuples(st.integers(1, 4), st.integers(2, 20), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
any_factor = st.sampled_from(FACTORS)


def _problem(problem):
    count, size, length, seed, own = problem
    channels = _channels_of_each(count, length, seed)
    return noise(count, size, seed), channels if own else channels[0], generator(seed)


@settings(max_examples=40)
@given(problems, st.floats(-3, 3), st.floats(-3, 3))
def test_linearity(problem, a, b):
    x, channels, drawn = _problem(problem)
    y = torch.rand(x.shape, generator=drawn, dtype=x.dtype)
    together = block_dct(a * x + b * y, channels, with_offset=False)
    apart = a * block_dct(x, channels, with_offset=False) + b * block_dct(y, channels, with_offset=False)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-8)


@settings(max_examples=40)
@given(problems, any_factor)
def test_adjoint_identity(problem, factor):
    x, channels, drawn = _problem(problem)
    ax = block_dct(x, channels, with_offset=False, upsampling=factor)
    z = torch.randn(ax.shape, generator=drawn, dtype=x.dtype)
    back = block_dct_adjoint(z, channels, upsampling=factor, size=x.shape[-1])
    left, right = float((ax * z).sum()), float((x * back).sum())
    assert left == pytest.approx(right, rel=1e-10, abs=1e-7)


def test_nothing_of_a_face_is_lost_in_all_channels():
    """The map has full rank: a face comes back by least squares, with the matrix that maps unit pictures."""
    size = 6
    pixels = torch.eye(3 * size * size, dtype=torch.float64).view(-1, 3, size, size)
    matrix = block_dct(pixels, EVERY, with_offset=False).flatten(1).T
    faces = noise(2, size)
    sent = block_dct(faces, EVERY, with_offset=False).flatten(1).T
    torch.testing.assert_close(torch.linalg.lstsq(matrix, sent).solution.T.view_as(faces), faces, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("own", "factor"), [(True, 8), (False, 8), (True, 3)])
def test_gradients(own, factor):
    faces = noise(2, 4).requires_grad_()
    channels = _channels_of_each(2, 3) if own else _channels_of_each(1, 3)[0]
    assert torch.autograd.gradcheck(lambda x: block_dct(x, channels, upsampling=factor), faces)
    assert torch.autograd.gradgradcheck(lambda x: block_dct(x, channels, upsampling=factor).sin(), faces)
    side = map_size(4, factor)
    z = torch.randn(2, 9, side, side, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: block_dct_adjoint(z, channels, upsampling=factor, size=4), z)


# -- the operator --------------------------------------------------------------------------------


@pytest.mark.slow
def test_null_space_of_an_official_subset():
    """Singular values below 1e-3 of the nine channels of one plane at 56x56, as published with the suite."""
    operator = PartialFace(image_size=56).linear_operator(torch.tensor([1, 0]))
    rows = operator.row_factors.mT @ operator.row_factors
    columns = operator.column_factors.mT @ operator.column_factors
    normal = torch.zeros(56, 56, 56, 56, dtype=torch.float64)
    for row, column in zip(rows, columns, strict=True):
        normal += row[:, None, :, None] * column[None, :, None, :]
    eigenvalues = torch.linalg.eigvalsh(normal.view(3136, 3136))
    assert int((eigenvalues < 1e-6).sum()) == 120


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faces", "channels", "message"),
    [
        (torch.zeros(2, 1, 16, 16), EVERY, "expected faces"),
        (torch.zeros(2, 3, 16, 8), EVERY, "expected faces"),
        (torch.zeros(3, 16, 16), EVERY, "expected faces"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), EVERY, "float"),
        (torch.zeros(2, 3, 16, 16), torch.tensor([64]), "0..63"),
        (torch.zeros(2, 3, 16, 16), torch.tensor([-1]), "0..63"),
        (torch.zeros(2, 3, 16, 16), torch.tensor([], dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 16, 16), torch.tensor([1.0]), "int64"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(3, 9, dtype=torch.int64), "3 faces"),
    ],
)
def test_bad_input_is_refused(faces, channels, message):
    with pytest.raises(ValueError, match=message):
        block_dct(faces, channels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_dct_adjoint(torch.zeros(1, 26, 16, 16), torch.arange(9)), "27"),
        (lambda: FrequencyOperator(16, torch.zeros(2, 9, dtype=torch.int64)), "one channel list"),
        (lambda: FrequencyOperator(16, torch.arange(9))(torch.zeros(1, 3, 8, 8)), "16 pixels"),
        (lambda: axis_factors(1), "at least 2"),
        (lambda: axis_factors(16, 9), "1..8"),
        (lambda: block_dct(torch.zeros(1, 3, 16, 16), EVERY, upsampling=0), "1..8"),
        (lambda: block_dct_adjoint(torch.zeros(1, 27, 8, 8), torch.arange(9), upsampling=0), "no maps"),
        (lambda: block_dct_adjoint(torch.zeros(1, 27, 8, 8), torch.arange(9), upsampling=4, size=18), "18 pixels"),
    ],
)
def test_bad_representations_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the decoder ---------------------------------------------------------------------------------


def _long_way_back(spectrum):
    """Inverse DCT of every block, the picture of 8H pixels, JPEG's colours, and bilinear down-sampling."""
    count, _, size, _ = spectrum.shape
    blocks = spectrum.view(count, 3, 8, 8, size, size)
    basis = dct_matrix()
    pixels = torch.einsum("up,nkuvij,vq->nkipjq", basis, blocks, basis).reshape(count, 3, 8 * size, 8 * size) + 128
    luma, cb, cr = pixels[:, 0], pixels[:, 1] - 128, pixels[:, 2] - 128
    rgb = torch.stack((luma + 1.402 * cr, luma - 0.344136286 * cb - 0.714136286 * cr, luma + 1.772 * cb), dim=1)
    return F.interpolate(rgb / 255, (size, size), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size", [24, 13, 2])
def test_decoding_is_the_long_way_back(size):
    spectrum = 50 * torch.randn(2, 192, size, size, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(inverse_block_dct(spectrum), _long_way_back(spectrum), rtol=0, atol=1e-10)


def test_the_decoded_arrays_of_the_released_code():
    """Of MinusFace with a 3x3 mean for its generator; pictures are stored in [-1, 1]."""
    arrays, faces = golden("minusface"), golden_pictures()
    spectrum = block_dct(faces, EVERY)
    assert float((on_grid(spectrum) - arrays["encode_grid"]).abs().max()) < COEFFICIENTS
    generated = F.avg_pool2d(spectrum[:1], 3, stride=1, padding=1)
    for name, part in (("decoded_generated", generated), ("decoded_residue", spectrum[:1] - generated)):
        assert float((2 * inverse_block_dct(part) - 1 - arrays[name]).abs().max()) < 2 * PIXELS
    error = (inverse_block_dct(spectrum) - faces).abs().amax(dim=(1, 2, 3))  # it is no exact inverse
    assert 0.006 < float(error.min()) <= float(error.max()) < 0.0135


def test_a_decoded_pixel_reads_its_own_block_at_its_own_phase():
    one = torch.zeros(1, 192, 9, 9, dtype=torch.float64)
    one[0, 8 * 3 + 5, 5, 7] = 10
    changed = inverse_block_dct(one) - 128 / 255
    assert changed[0, 0].nonzero().tolist() == [[5, 7]]
    vertical, horizontal = phase_factors(9)[3, 5], phase_factors(9)[5, 7]  # phases 4.375 and 6.125
    basis = dct_matrix()
    assert float(vertical) == pytest.approx(float(0.625 * basis[3, 4] + 0.375 * basis[3, 5]))
    assert float(horizontal) == pytest.approx(float(0.875 * basis[5, 6] + 0.125 * basis[5, 7]))
    assert float(changed[0, 0, 5, 7]) == pytest.approx(float(10 * vertical * horizontal / 255))


def test_the_decoder_has_gradient_and_adjoint():
    spectrum = torch.randn(2, 192, 6, 6, generator=generator(1), dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 3, 6, 6, generator=generator(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((inverse_block_dct(spectrum) * weights).sum(), spectrum)
    torch.testing.assert_close(inverse_block_dct_adjoint(weights), gradient)
    assert inverse_block_dct(spectrum.detach().float()).dtype == torch.float32
    for function, channels in ((inverse_block_dct, 191), (inverse_block_dct_adjoint, 4)):
        with pytest.raises(ValueError, match="expected"):
            function(torch.zeros(1, channels, 6, 6))
    with pytest.raises(ValueError, match="at least 2"):
        phase_factors(1)


@pytest.mark.parametrize("channels", [[9, 10, 11, 12, 33, 34, 35, 36], [7, 6, 5, 63, 62], [0, 8, 16], [5]])
def test_channels_that_share_a_pass_are_what_they_are_alone(channels):
    faces = noise(3, 13)
    together = block_dct(faces, torch.tensor(channels)).view(3, 3, len(channels), 13, 13)
    alone = torch.stack([block_dct(faces, torch.tensor([c])) for c in channels], dim=2)
    assert torch.equal(together, alone)
