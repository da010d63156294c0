import pytest
import torch
from undeclared import (
    Affine,
    AffineColours,
    Biased,
    Colours,
    Detached,
    Hidden,
    Lifted,
    Noisy,
    OneByOne,
    Projected,
    Silent,
    Swapped,
)

from attacks.parts.operators import DECLARED, UNDECLARED, linear_maps, why_not_linear
from bench.plugins import make_defense
from defenses.base import Defense
from defenses.partialface import PartialFace

SIZE = 16


@pytest.fixture(scope="module")
def faces():
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_what_is_declared_is_taken(faces):
    maps = linear_maps(Colours(image_size=SIZE))
    assert (maps.source, len(maps.operators), maps.nuisance, maps.gains) == (DECLARED, 8, None, None)
    sent, rows = maps.send(faces.float(), torch.Generator().manual_seed(0))
    for face, representation, row in zip(faces, sent, rows, strict=True):
        torch.testing.assert_close(maps.operators[row](face[None])[0].float(), representation)


@pytest.mark.parametrize("kind", [Silent, Hidden])
def test_the_states_of_a_silent_defence_are_found_and_their_maps_derived(kind, faces):
    maps = linear_maps(kind(image_size=SIZE))
    assert (maps.source, maps.details["states_found"], maps.details["states_unseen"]) == (UNDECLARED, 18, 0)
    declared = PartialFace(image_size=SIZE)
    known = [declared.linear_operator(state) for state in declared.states()]
    images = torch.stack([operator(faces) for operator in known])
    matched = []
    for found in maps.operators:
        errors = (images - found(faces)).abs().amax(dim=(1, 2, 3, 4))
        assert float(errors.min()) < 1e-6
        right = known[int(errors.argmin())]
        z = torch.randn(images[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(found.adjoint(z), right.adjoint(z))
        torch.testing.assert_close(found.offset, right.offset.expand_as(found.offset), atol=1e-9, rtol=0)
        matched.append(int(errors.argmin()))
    assert sorted(matched) == list(range(18))


def test_ninety_six_states_of_colour_and_side_are_found(faces):
    maps = linear_maps(Swapped(image_size=SIZE))
    assert maps.details["states_found"] == len(maps.operators) == 96
    sent, rows = maps.send(faces.float(), torch.Generator().manual_seed(2))
    for face, representation, row in zip(faces, sent, rows, strict=True):
        operator = maps.operators[row]
        torch.testing.assert_close((operator(face[None])[0] + operator.offset).float(), representation)


def test_states_on_a_high_level_are_told_apart():
    assert linear_maps(Lifted(image_size=SIZE)).details["states_found"] == 6


def test_a_size_that_is_that_of_the_batch_is_not_taken_for_it():
    maps = linear_maps(Projected(image_size=SIZE))
    assert len(maps.operators) == 8
    batch = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one_by_one = torch.cat([maps.operators[0](face) for face in batch.split(1)])
    torch.testing.assert_close(maps.operators[0](batch), one_by_one)


@pytest.mark.parametrize(("kind", "states"), [(OneByOne, 4), (Detached, 1)])
def test_what_is_drawn_in_a_loop_and_what_has_no_derivative(kind, states, faces):
    defense = kind(image_size=SIZE)
    maps = linear_maps(defense)
    assert len(maps.operators) == states
    sent, rows = maps.send(faces.float(), torch.Generator().manual_seed(2))
    for face, representation, row in zip(faces, sent, rows, strict=True):
        operator = maps.operators[row]
        torch.testing.assert_close(operator(face[None])[0].float(), representation)
        z = torch.randn(1, *representation.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        assert float((operator(face[None]) * z).sum()) == pytest.approx(float((face * operator.adjoint(z)).sum()))


def test_a_random_offset_is_taken_out(faces):
    maps = linear_maps(Biased(image_size=SIZE))
    assert maps.nuisance.shape == (3, 3, SIZE, SIZE)
    # Any constant of a colour is gone, and nothing else.
    constants = torch.eye(3, dtype=torch.float64)[:, :, None, None].expand(3, 3, SIZE, SIZE)
    assert float(maps.clean(constants).abs().max()) < 1e-9
    torch.testing.assert_close(maps.clean(faces), faces - faces.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(maps.operators[0](faces), maps.clean(faces))


@pytest.mark.parametrize("kind", ["mixture", "permutation"])
def test_a_canary_that_says_nothing_is_the_one_that_does(kind, faces):
    declared, silent = (make_defense("canary", {"kind": kind, "declared": said}, "cpu", SIZE) for said in (True, False))
    (found,), (known,) = (linear_maps(defense).operators for defense in (silent, declared))
    torch.testing.assert_close(found(faces), known(faces))
    torch.testing.assert_close(found.adjoint(faces), known.adjoint(faces))


def test_noise_is_no_offset_to_be_taken_out(faces):
    maps = linear_maps(Noisy(image_size=SIZE))
    assert maps.nuisance is None
    assert float(maps.operators[0].offset.std()) < 0.02  # of 0.05, averaged over draws


@pytest.mark.parametrize(("kind", "groups"), [(Affine, 1), (AffineColours, 3)])
def test_a_random_gain_is_recognised_by_its_range(kind, groups):
    gains = linear_maps(kind(image_size=SIZE)).gains
    assert gains.groups.tolist() == ([0, 0, 0] if groups == 1 else [0, 1, 2])
    # Uniform in .5 to 2.
    ratio = gains.highest / gains.lowest
    assert bool((ratio > 3).all() & (ratio < 4.0001).all())


class Coarse(Defense):
    """A mixture of rows and columns, rounded to steps of 1 / 128: it has a derivative nowhere."""

    name = "coarse"

    def transform(self, faces, state, generator):
        return ((0.75 * faces + 0.25 * faces.mT) * 128).round() / 128


def test_rounding_is_noise(faces):
    maps = linear_maps(Coarse(image_size=SIZE))
    expected = 0.75 * faces + 0.25 * faces.mT
    assert float((maps.operators[0](faces) - expected).square().mean().sqrt()) < 0.01 * float(expected.std())


class Squared(Defense):
    name = "squared"

    def transform(self, faces, state, generator):
        return faces.square()


class Clipped(Defense):
    """Linear for all but the brightest and darkest pixels."""

    name = "clipped"

    def transform(self, faces, state, generator):
        return faces.clamp(0.1, 0.9)


class Unpinned(Defense):
    name = "unpinned"

    def transform(self, faces, state, generator):
        return faces + torch.rand(())


class Turned(Defense):
    """A colour matrix drawn anew for every face."""

    name = "turned"

    def transform(self, faces, state, generator):
        matrices = torch.randn(len(faces), 3, 3, generator=generator).to(faces)
        return torch.einsum("nij,njhw->nihw", matrices, faces)


@pytest.mark.parametrize(
    ("defense", "reason"),
    [
        (Squared(image_size=SIZE), "squared is not a linear defence"),
        (Clipped(image_size=SIZE), "clipped is not a linear defence"),
        (Unpinned(image_size=SIZE), "draws more than its generator"),
        (Turned(image_size=SIZE), "drawn anew for every face"),
        (make_defense("biohash", {}, "quick", SIZE), "template"),
    ],
    ids=lambda value: value.name if isinstance(value, Defense) else "",
)
def test_what_is_not_linear_is_told_why(defense, reason):
    assert reason in why_not_linear(defense)
    with pytest.raises(ValueError, match=reason):
        linear_maps(defense)


def test_what_cannot_send_a_face_before_its_fit_is_taken_for_no_linear_map():
    assert "fit it to some faces" in why_not_linear(make_defense("instahide", {}, "quick", SIZE))
