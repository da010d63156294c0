from __future__ import annotations

import pytest
import torch

from attacks.parts.exposure import Exposure, split_identities

SIZE = 16
FACES = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def tables(adversary, defense):
    """The secrets of the mechanisms handed out, in order."""
    handed = []

    def mechanism(generator):
        made = defense.guess(generator)
        handed.append(tuple(made.table.flatten().tolist()))
        return made

    object.__setattr__(adversary, "mechanism", mechanism)
    return handed


@pytest.mark.parametrize("knowledge", ["blackbox", "whitebox", "oracle"])
def test_the_same_name_draws_the_same_and_another_name_does_not(make_adversary, pick, knowledge):
    exposure = Exposure(make_adversary(pick(), knowledge), seed=1)
    first, again, other = (exposure.protect(FACES, "step", number) for number in (0, 0, 1))
    assert torch.equal(first.representation, again.representation)
    assert torch.equal(first.state, again.state)
    assert not torch.equal(first.state, other.state)


def test_fresh_guesses_differ_within_a_batch_and_between_steps(make_adversary, pick):
    adversary = make_adversary(pick(), "blackbox")
    handed = tables(adversary, pick())
    exposure = Exposure(adversary, seed=1, guesses=0)
    exposure.protect(FACES, "step", 0)
    exposure.protect(FACES, "step", 1)
    assert len(handed) == 16
    assert len(set(handed)) > 8


@pytest.mark.parametrize("guesses", [1, 3])
def test_a_pool_of_guesses_is_made_once(make_adversary, pick, guesses):
    adversary = make_adversary(pick(), "blackbox")
    handed = tables(adversary, pick())
    exposure = Exposure(adversary, seed=1, guesses=guesses)
    for step in range(4):
        exposure.protect(FACES, "step", step)
    assert len(handed) == guesses


def test_the_client_stands_in_for_guesses_of_a_secret_alone(make_adversary, pick):
    def exposed(knowledge, **options):
        adversary = make_adversary(pick(), knowledge, client=lambda faces: faces[:, :2] + 1)
        exposure = Exposure(adversary, seed=1, **options)
        protected = exposure.protect(FACES, "step", 0)
        return torch.equal(protected.representation, FACES[:, :2] + 1), protected.state is None, exposure.countable

    assert exposed("blackbox", client=True) == (True, True, False)
    assert exposed("blackbox") == (False, False, True)
    assert exposed("blackbox", client=True, mechanism=pick()) == (False, False, True)
    assert exposed("whitebox", client=True) == (False, False, True)


def test_a_known_mechanism_ignores_guesses(make_adversary, plain):
    exposure = Exposure(make_adversary(plain(image_size=SIZE), "whitebox"), seed=1, guesses=5)
    protected = exposure.protect(FACES, "step", 0)
    assert torch.equal(protected.representation, FACES)
    assert protected.state is None


@pytest.mark.parametrize(("identities", "share", "expected"), [(10, 0.1, 1), (20, 0.3, 6), (2, 0.99, 1), (9, 0.001, 1)])
def test_held_out_faces_share_no_identity_with_training(identities, share, expected):
    labels = torch.arange(identities).repeat(4)
    training, held_out = split_identities(labels, share, torch.Generator().manual_seed(0))
    assert sorted(torch.cat((training, held_out)).tolist()) == list(range(len(labels)))
    assert not set(labels[training].tolist()) & set(labels[held_out].tolist())
    assert len(set(labels[held_out].tolist())) == expected


def test_one_identity_cannot_be_split():
    with pytest.raises(ValueError, match="1 identities"):
        split_identities(torch.zeros(5, dtype=torch.int64), 0.1, torch.Generator())
