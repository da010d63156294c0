"""What the contract of a defence keeps whatever a defence does: its callers' tensors, and what may be sent."""

import pytest
import torch

from bench.errors import DefenseError
from defenses.base import Defense, pure
from defenses.fixed_subset import FixedSubset

SIZE = 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def faces(count=4):
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(9))


class Vandal(Defense):
    """Works in place on all that it is given, and sends and returns views of what it keeps."""

    name = "vandal"
    summary = "for tests"

    def __init__(self, options=None, *, image_size=SIZE):
        super().__init__(options, image_size=image_size)
        self.kept = torch.zeros(64, 3, image_size, image_size)
        self.drawn = torch.arange(64)[:, None]

    def draw(self, count, generator, labels=None):
        if labels is not None:
            labels.zero_()
        self.drawn += 1
        return self.drawn[:count]

    def draw_keys(self, count, generator):
        return self.drawn[:count]

    def transform(self, faces, state, generator):
        raise NotImplementedError

    def keyed_transform(self, faces, state, keys, generator):
        faces += torch.rand(faces.shape, generator=generator)
        state.zero_()
        keys.zero_()
        self.kept[: len(faces)] = faces.clamp_(0, 1)
        return self.kept[: len(faces)]

    def canonical(self, representation, state):
        state.zero_()
        return representation.zero_()


def test_nothing_of_the_caller_is_changed():
    given, labels, state, keys = faces(), torch.arange(4), torch.full((4, 1), 7), torch.full((4, 1), 5)
    before = [value.clone() for value in (given, labels, state, keys)]
    defense = Vandal()
    defense.protect(given, generator(), labels=labels)
    protected = defense.protect(given, generator(), labels=labels, state=state, keys=keys)
    defense.canonical(protected.representation, protected.state)
    assert all(torch.equal(was, now) for was, now in zip(before, (given, labels, state, keys), strict=True))
    assert torch.equal(protected.state, before[2])
    assert torch.equal(protected.keys, before[3])
    assert protected.representation.any()


def test_nothing_that_was_sent_changes_afterwards():
    defense, given = Vandal(), faces()
    first = defense.protect(given, generator(1))
    sent, state, keys = first.representation.clone(), first.state.clone(), first.keys.clone()
    second = defense.protect(given, generator(2))
    assert not torch.equal(second.representation, sent)
    assert torch.equal(first.representation, sent)
    assert torch.equal(first.state, state)
    assert torch.equal(first.keys, keys)
    # Both interceptions of a face are what was sent then.
    alone = [Vandal().protect_each(given, [generator(turn)] * 4).representation for turn in (3, 4)]
    shared = Vandal()
    both = [shared.protect_each(given, [generator(turn)] * 4).representation for turn in (3, 4)]
    torch.testing.assert_close(both, alone)


def test_gradients_reach_the_faces_through_a_defence_that_works_in_place():
    given = faces().requires_grad_()
    Vandal().protect(given, generator()).representation.sum().backward()
    assert given.grad.abs().sum() > 0


def test_who_is_not_of_the_package_cannot_lift_the_shield():
    class Careless(Defense):
        name = "careless"
        summary = "for tests"

        @pure
        def transform(self, faces, state, generator):
            return faces.mul_(0.5)

    class Overriding(FixedSubset):
        def transform(self, faces, state, generator):
            return super().transform(faces.mul_(0.5), state, generator) / faces.amin()

    given = faces()
    given[0] = 0
    before = given.clone()
    Careless(image_size=SIZE).protect(given, generator())
    with pytest.raises(DefenseError, match="not finite"):
        Overriding(image_size=SIZE).protect(given, generator())
    assert torch.equal(given, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_the_fault_of_the_defence(value):
    class Leaky(Defense):
        name = "leaky"
        summary = "for tests"

        def transform(self, faces, state, generator):
            faces[1, 0, 2, 3] = value
            return faces

    with pytest.raises(DefenseError, match=r"defence leaky made .* not finite, of 1 of 4 faces"):
        Leaky(image_size=SIZE).protect(faces(), generator())


@pytest.mark.parametrize(
    ("sent", "why"),
    [(torch.zeros(4, 3, SIZE, 4), "declares"), (torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), "uint8")],
)
def test_what_was_not_declared_is_refused(sent, why):
    class Other(Defense):
        name = "other"
        summary = "for tests"

        def transform(self, faces, state, generator):
            return sent

    with pytest.raises(DefenseError, match=f"defence other .*{why}"):
        Other(image_size=SIZE).protect(faces(), generator())
