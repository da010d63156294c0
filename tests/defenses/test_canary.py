"""Canaries lose nothing: each kind is undone here with what its definition says, and with nothing else."""

import pytest
import torch
from pictures import generator

from defenses.canary import Canary, CanaryOptions

SIZE = 12


def canary(kind, **options):
    return Canary(CanaryOptions(kind=kind, **options), image_size=SIZE)


def sent(defense, faces, seed=0):
    return defense.protect(faces, generator(seed)).representation


@pytest.fixture
def faces():
    return torch.rand(5, 3, SIZE, SIZE, generator=generator(9), dtype=torch.float64)


def test_a_mixture_is_undone_by_the_inverses_of_its_matrices(faces):
    rows = torch.eye(SIZE).double() + 0.25 * (torch.ones(SIZE - 1).diag(1) + torch.ones(SIZE - 1).diag(-1)).double()
    colours = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]], dtype=torch.float64)
    whole = torch.kron(colours, torch.kron(rows, rows))
    assert torch.linalg.cond(whole) < 30
    undone = torch.linalg.solve(whole, sent(canary("mixture"), faces).flatten(1).T).T
    torch.testing.assert_close(undone.view_as(faces), faces)


def test_a_permutation_moves_pixels_with_their_colours_and_is_the_same_for_all(faces):
    places = torch.arange(SIZE**2).view(1, 1, SIZE, SIZE).expand(1, 3, -1, -1) / SIZE**2
    order = (sent(canary("permutation"), places.double())[0, 0] * SIZE**2).round().long().flatten()
    assert sorted(order.tolist()) == list(range(SIZE**2))
    assert (order != torch.arange(SIZE**2)).float().mean() > 0.9
    assert torch.equal(sent(canary("permutation"), faces, 4).flatten(2), faces.flatten(2)[..., order])


def test_an_affine_change_is_anew_for_each_face_and_leaves_all_but_gain_and_shift(faces):
    defense = canary("affine", shift=7.0)
    made = sent(defense, faces)

    def standard(pictures):
        return (pictures - pictures.mean(dim=(2, 3), keepdim=True)) / pictures.std(dim=(1, 2, 3), keepdim=True)

    gain = made.std(dim=(2, 3)) / faces.std(dim=(2, 3))
    torch.testing.assert_close(gain, gain[:, :1].expand(-1, 3))  # one for the face
    assert ((gain >= 0.5) & (gain <= 1.5)).all()
    assert gain[:, 0].unique().numel() == 5
    shift = made.mean(dim=(2, 3)) - gain * faces.mean(dim=(2, 3))
    assert shift.abs().max() <= 7
    assert shift.flatten().unique().numel() == 15
    assert not torch.equal(sent(defense, faces, seed=1), made)
    assert defense.linear_operator(None) is None


@pytest.mark.parametrize("kind", ["mixture", "permutation"])
def test_a_linear_kind_tells_its_map_unless_it_is_not_to(faces, kind):
    operator = canary(kind).linear_operator(None)
    torch.testing.assert_close(operator(faces), sent(canary(kind), faces))
    sides = torch.rand(5, 3, SIZE, SIZE, generator=generator(3), dtype=torch.float64)
    torch.testing.assert_close((operator(faces) * sides).sum(), (faces * operator.adjoint(sides)).sum())
    silent = canary(kind, declared=False)
    assert silent.linear_operator(None) is None
    assert torch.equal(sent(silent, faces), sent(canary(kind), faces))


@pytest.mark.parametrize("kind", ["mixture", "affine", "permutation"])
def test_it_says_which_canary_it_is(kind):
    assert canary(kind).canary == kind
