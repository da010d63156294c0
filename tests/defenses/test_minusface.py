"""MinusFace: the released code's arrays, its permutations, and what its training does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import COEFFICIENTS, PIXELS, golden, on_grid, pictures
from pictures import generator, smooth
from pydantic import ValidationError
from torch import nn

from defenses.frequency import block_dct, inverse_block_dct
from defenses.minusface import MinusFace, MinusFaceOptions

SIZE = 24
SMALL = {"widths": (4, 8), "epochs": 1, "batch_size": 8, "optimiser": "adam", "learning_rate": 4e-3}


def _build(size=SIZE, **options):
    return MinusFace(MinusFaceOptions(**{**SMALL, **options}), image_size=size).requires_grad_(False)


class BoxMean(nn.Module):
    """What stands for the trained network in the stored arrays: zero-padded 3x3 means."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, spectrum):
        return F.avg_pool2d(spectrum, 3, stride=1, padding=1)


def test_the_arrays_of_the_released_code():
    arrays, defense = golden("minusface"), _build(112)
    defense.generator = BoxMean()
    assert float((on_grid(defense.residue(pictures())) - arrays["residue_grid"]).abs().max()) < COEFFICIENTS
    permutations = arrays["permutations"].long()
    sent = defense.protect(pictures(), generator(), state=permutations).representation
    assert float((sent[:1] - arrays["protected"]).abs().max()) < PIXELS


@pytest.mark.parametrize("widths", [(4,), (4, 8), (4, 6, 8, 10, 12)])
@pytest.mark.parametrize("size", [24, 21])
def test_the_network_takes_maps_of_any_size_and_has_the_published_layers(widths, size):
    network = _build(widths=widths).generator
    assert network(torch.zeros(1, 192, size, size)).shape == (1, 192, size, size)
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(layers) == 2 * len(widths) + 3 * (len(widths) - 1) + 1
    assert all(layer.bias is not None for layer in layers)


def test_permutations_are_uniform():
    drawn = _build().draw(4000, generator())
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(192).expand(4000, -1))
    for place in (0, 77, 191):
        counts = torch.bincount(drawn[:, place], minlength=192)
        expected = 4000 / 192
        assert float(((counts - expected) ** 2 / expected).sum()) < 275  # chi-square, 191 degrees of freedom, p 1e-4
    assert _build().entropy_bits == pytest.approx(math.log2(math.factorial(192)))


def test_what_is_sent_is_the_mixture_that_its_state_says():
    defense, faces = _build(clamp=False), smooth(2, SIZE).float() / 255
    state = defense.draw(2, generator(4))
    expected = torch.stack([residue[order] for residue, order in zip(defense.residue(faces), state, strict=True)])
    sent = defense.protect(faces, generator(), state=state).representation
    torch.testing.assert_close(sent, inverse_block_dct(expected))
    clamped = _build()
    clamped.load_state_dict(defense.state_dict())
    torch.testing.assert_close(clamped.protect(faces, generator(), state=state).representation, sent.clamp(0, 1))
    plain = _build(permute=False, clamp=False)
    plain.load_state_dict(defense.state_dict())
    assert (plain.draw(2, generator()), plain.views, plain.entropy_bits) == (None, 1, 0.0)
    residue = defense.residue(faces)
    torch.testing.assert_close(plain.protect(faces, generator()).representation, inverse_block_dct(residue))


def test_one_that_has_learnt_nothing_and_shuffles_nothing_sends_the_face():
    faces = smooth(2, SIZE).float() / 255
    sent = _build(permute=False).protect(faces, generator()).representation
    assert float((sent - faces).abs().max()) < 0.05  # as far as the decoder goes


def test_canonical_is_the_adjoint_of_what_was_decoded():
    """<d(r[pi]) - grey, x> = <r, canonical(x + grey)>, for each face by itself."""
    defense, drawn = _build(), generator(2)
    state = defense.draw(3, drawn)
    residue = torch.randn(3, 192, SIZE, SIZE, generator=drawn, dtype=torch.float64)
    mixed = torch.stack([one[order] for one, order in zip(residue, state, strict=True)])
    grey, other = 128 / 255, torch.randn(3, 3, SIZE, SIZE, generator=drawn, dtype=torch.float64)
    decoded = ((inverse_block_dct(mixed) - grey) * other).sum(dim=(1, 2, 3))
    torch.testing.assert_close((residue * defense.canonical(other + grey, state)).sum(dim=(1, 2, 3)), decoded)
    assert torch.equal(defense.canonical(other, None), other)


@pytest.mark.parametrize(
    "state",
    [None, torch.zeros(2, 192, dtype=torch.int64), torch.arange(192)[None], torch.arange(192.0).expand(2, -1)],
)
def test_what_is_no_permutation_is_refused(state):
    defense = _build()
    with pytest.raises(ValueError, match="minusface"):
        defense.transform(torch.rand(2, 3, SIZE, SIZE), state, generator())


def _fitted(make_training, folder=None, **options):
    torch.manual_seed(0)
    defense = MinusFace(MinusFaceOptions(**{**SMALL, **options}), image_size=SIZE)
    defense.fit(make_training(size=SIZE, folder=folder))
    return defense.requires_grad_(False)


def _distance(defense, faces):
    spectrum = block_dct(faces, torch.arange(64))
    with torch.no_grad():
        return float((inverse_block_dct(spectrum - defense.residue(faces)) - faces).abs().mean())


def test_training_makes_the_generated_picture_look_like_the_face(make_training):
    training, faces = make_training(size=16), smooth(32, 16).float() / 255
    training = replace(
        training,
        batches=lambda count, drawn: (
            (faces[index], index % 4) for index in torch.randperm(32, generator=drawn).split(count)
        ),
    )
    torch.manual_seed(0)
    options = {"widths": (8, 16), "epochs": 20, "scale": 128, "learning_rate": 8e-3, "reconstruction": 100}
    defense = MinusFace(MinusFaceOptions(**{**SMALL, **options}), image_size=16)
    before = _distance(defense, faces)
    assert before == pytest.approx(float((faces - 128 / 255).abs().mean()))  # of nothing generated
    defense.fit(training)
    assert _distance(defense.requires_grad_(False), faces) < 0.9 * before


def test_the_recogniser_of_the_residue_has_a_say(make_training):
    """Without the L1 distance the U-Net learns all the same: to leave over what tells people apart."""
    alone = _fitted(make_training, reconstruction=0.0)
    assert float(alone.generator.head.weight.abs().max()) > 0


@pytest.mark.parametrize(("rates", "share"), [("paper", 0.5), ("official", 1.0)])
def test_the_released_code_trains_the_network_at_the_recognisers_rate(make_training, rates, share):
    """After one step of gradient descent the weights have moved by their rate."""
    moved = {}
    for name in (rates, "official"):
        options = {"optimiser": "sgd", "learning_rates": name, "learning_rate": 0.1, "steps": 1}
        moved[name] = _fitted(make_training, **options).generator.head.weight  # it starts at zero
    assert float(moved[rates].norm() / moved["official"].norm()) == pytest.approx(share, rel=1e-3)


def test_a_fit_that_was_killed_goes_on_where_it_was(make_training, tmp_path):
    whole = _fitted(make_training, epochs=2)

    class Killed(Exception):
        pass

    def stop(done, total, **fields):
        if done > total / 2:
            raise Killed

    torch.manual_seed(0)
    halted = MinusFace(MinusFaceOptions(**{**SMALL, "epochs": 2}), image_size=SIZE)
    with pytest.raises(Killed):
        halted.fit(replace(make_training(size=SIZE, folder=tmp_path), report=stop))
    resumed = _fitted(make_training, tmp_path, epochs=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(
    "options",
    [{"widths": ()}, {"widths": (0,)}, {"learning_rate": 0}, {"batch_size": 1}, {"views": 2, "permute": False}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        MinusFaceOptions(**options)


def test_widths_are_typed_as_a_list():
    assert MinusFaceOptions(widths="8, 16").widths == (8, 16)
    assert MinusFaceOptions().widths == (64, 128, 256, 512, 1024)
