"""FracFace: the released code's arrays, its square, and what the square loses."""

from __future__ import annotations

import pytest
import torch
from golden import COEFFICIENTS, golden, on_grid, pictures
from pictures import generator, noise

from bench.run.textbook import textbook_spectrum
from defenses.fracface import FracFace, FracFaceOptions
from defenses.frequency import SpectrumOperator, zigzag
from defenses.layout import probe

SIZE = 16


def _build(square=None, size=SIZE, **options):
    defense = FracFace(FracFaceOptions(**options), image_size=size)
    if square is not None:
        defense.square = torch.as_tensor(square).view(3, 3)
    return defense


def test_the_arrays_of_the_released_code():
    arrays = golden("fracface")
    defense = _build(arrays["A1"], 112, permutation="official", input="official")
    assert torch.equal(defense.sent.view(9, 9), arrays["E2_9x9"])
    sent = defense.protect(pictures(), generator()).representation
    assert float((on_grid(sent) - arrays["protected_grid"]).abs().max()) < COEFFICIENTS
    part = SpectrumOperator(112, defense.channels_in, 0.5)(pictures())
    assert float((on_grid(part) - arrays["part1_grid"]).abs().max()) < COEFFICIENTS


def test_part_one_is_a_snake_over_all_of_luma_and_half_of_blue():
    kept = [channel for channel in range(64) if channel not in zigzag(10)]
    rows = torch.tensor(kept + [64 + channel for channel in kept[:27]]).view(9, 9).tolist()
    expected = [channel for number, row in enumerate(rows) for channel in (row[::-1] if number % 2 else row)]
    assert _build().channels_in.tolist() == expected


@pytest.mark.parametrize("key_seed", range(5))
def test_the_papers_square_permutes_and_follows_its_seed(key_seed):
    defense = _build(key_seed=key_seed)
    assert sorted(defense.square.flatten().tolist()) == list(range(1, 10))
    assert sorted(defense.sent.tolist()) == list(range(81))
    assert torch.equal(defense.square, _build(key_seed=key_seed).square)
    assert not torch.equal(defense.square, _build(key_seed=key_seed + 1).square)


def test_each_place_follows_the_square_written_out():
    defense = _build([2, 3, 1, 4, 6, 5, 8, 9, 7])
    square = [[2, 3, 1], [4, 6, 5], [8, 9, 7]]
    expected = [
        9 * (square[row // 3][column // 3] - 1) + square[row % 3][column % 3] - 1
        for row in range(9)
        for column in range(9)
    ]
    assert defense.sent.tolist() == expected
    faces = noise(2, SIZE)
    spectrum = textbook_spectrum(faces).flatten(1, 2)[:, defense.channels_in[torch.tensor(expected)]]
    torch.testing.assert_close(defense.protect(faces, generator()).representation, spectrum, rtol=0, atol=1e-9)


def test_squares_of_the_released_code_lose_more_than_half_of_the_channels():
    survive = torch.tensor(
        [len(_build(permutation="official", key_seed=seed).sent.unique()) for seed in range(2000)]
    ).double()
    # Nine draws of nine values show m of them; place (i, j) sends channel (A[i], A[j]), so that m squared survive.
    values = torch.tensor([[1 - (8 / 9) ** 9, (8 / 9) ** 9 - (7 / 9) ** 9]]).double()
    mean = 9 * values[0, 0]
    variance = mean * (1 - mean) + 72 * (1 - 2 * (8 / 9) ** 9 + (7 / 9) ** 9)
    expected = float(mean**2 + variance)
    assert float(survive.mean()) == pytest.approx(expected, abs=4 * float(survive.std()) / 2000**0.5)
    assert 35 < expected < 36
    assert survive.quantile(0.05) == 16
    assert survive.quantile(0.95) == 49


def test_a_face_fed_in_the_wrong_range_is_halved():
    faces = noise(2, SIZE)
    right, wrong = (_build(input=name).protect(faces, generator()).representation for name in ("paper", "official"))
    torch.testing.assert_close(wrong, right / 2)
    torch.testing.assert_close(wrong, _build().protect(faces / 2 + 0.5, generator()).representation, rtol=0, atol=1e-9)


@pytest.mark.parametrize("permutation", ["paper", "official"])
def test_canonical_undoes_the_square(permutation):
    faces = noise(2, SIZE)
    defense = _build(permutation=permutation, key_seed=3)
    canonical = defense.canonical(defense.protect(faces, generator()).representation, None)
    whole = SpectrumOperator(SIZE, defense.channels_in)(faces)
    shown = torch.isin(torch.arange(81), defense.sent)
    torch.testing.assert_close(canonical, whole * shown[:, None, None])
    layout = probe(defense, None)
    assert layout is not None
    assert layout.canonical.tolist() == [defense.sent.tolist()]


@pytest.mark.parametrize("permutation", ["paper", "official"])
def test_a_square_is_found_from_a_layout_of_which_a_third_is_misread(permutation):
    defense, drawn = _build(permutation=permutation, key_seed=7), generator(1)
    read = defense.sent.clone()
    wrong = torch.randperm(81, generator=drawn)[:27]
    read[wrong] = torch.randint(81, (27,), generator=drawn)
    assert torch.equal(_build(permutation=permutation).with_layouts(read[None]).square, defense.square)
    for layouts in (read[None, :80], read[None].float(), read[None] + 81):
        with pytest.raises(ValueError, match="layouts must"):
            defense.with_layouts(layouts)


@pytest.mark.parametrize("permutation", ["paper", "official"])
def test_its_operator_has_an_adjoint_although_channels_repeat(permutation):
    operator = _build(permutation=permutation, input="official").linear_operator(None)
    faces, maps = noise(2, SIZE), torch.randn(2, 81, SIZE, SIZE, generator=generator(), dtype=torch.float64)
    assert float((operator(faces) * maps).sum()) == pytest.approx(float((faces * operator.adjoint(maps)).sum()))
    for channels in (torch.tensor([0, 5]), torch.tensor([192]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="channels must"):
            SpectrumOperator(SIZE, channels)
