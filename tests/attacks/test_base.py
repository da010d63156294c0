from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.base import (
    GRANTS,
    Adversary,
    AttackOptions,
    Capability,
    FitReport,
    Knowledge,
    LinkageAttack,
    Observation,
    RecoveryAttack,
)


class Returns(RecoveryAttack):
    """Recovers whatever tensor it was given."""

    name = "returns"
    summary = "for tests"

    def __init__(self, faces: Tensor) -> None:
        super().__init__()
        self.faces = faces

    def build(self, adversary: Adversary) -> None:
        self.weight = nn.Linear(2, 2).weight

    def fit(self, adversary: Adversary) -> FitReport:
        return FitReport()

    def run(self, observation: Observation) -> Tensor:
        return self.faces


class Links(LinkageAttack):
    """Embeds everything as it was told to."""

    name = "links"
    summary = "for tests"
    needs = frozenset({Capability.MECHANISM})

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings

    def build(self, adversary: Adversary) -> None:
        pass

    def fit(self, adversary: Adversary) -> FitReport:
        return FitReport()

    def encode_representations(self, representations: Tensor) -> Tensor:
        return self.embeddings

    def encode_faces(self, faces: Tensor) -> Tensor:
        return self.embeddings


@pytest.fixture
def ready(make_adversary, plain):
    """Prepares an attack for faces of 8 pixels a side."""

    def make(attack, seed=0):
        attack.prepare(make_adversary(plain(image_size=8), faces=torch.zeros(6, 3, 8, 8).byte(), seed=seed))
        return attack

    return make


def observe(n: int = 2, k: int = 1, **more) -> Observation:
    return Observation(torch.zeros(n, k, 3, 8, 8), **more)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(6, 3, 8, 8),
        torch.zeros(6, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(6, 3, 8, 4, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_unusable_public_faces_are_refused(make_adversary, plain, wrong):
    with pytest.raises(ValueError, match="returns expects"):
        Returns(torch.zeros(1)).learn(make_adversary(plain(image_size=8), faces=wrong))


def test_public_faces_without_identities_are_refused(make_adversary, plain):
    adversary = replace(make_adversary(plain(image_size=8)), identities=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one identity per public face"):
        Returns(torch.zeros(1)).prepare(adversary)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator(ready):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ready(Returns(torch.zeros(1))).weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(ready(Returns(torch.zeros(1))).weight, first)
    assert not torch.equal(ready(Returns(torch.zeros(1)), seed=1).weight, first)


def test_an_attack_that_was_not_prepared_is_not_used():
    with pytest.raises(ValueError, match="prepared or fitted"):
        Returns(torch.zeros(2, 3, 8, 8)).recover(observe())


def test_the_mechanism_is_no_part_of_the_weights(ready):
    attack = ready(Links(torch.zeros(1)))
    assert attack.mechanism.name == "plain"
    assert not list(attack.state_dict())


def test_recover_clips_to_the_unit_interval_and_keeps_what_lies_inside(ready):
    faces = torch.tensor([-0.5, 0.25, 1.5]).view(1, 3, 1, 1).expand(2, 3, 8, 8).double().requires_grad_()
    recovered = ready(Returns(faces)).recover(observe())
    assert recovered.dtype == torch.float32
    assert recovered[0, :, 0, 0].tolist() == [0.0, 0.25, 1.0]
    assert not recovered.requires_grad


def test_nothing_observed_is_nothing_recovered(ready):
    assert ready(Returns(torch.zeros(1))).recover(observe(n=0)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 1, 8, 8), (2, 3, 8), (0, 3, 8, 8), (2, 3, 4, 4)])
def test_recover_refuses_another_shape(ready, shape):
    with pytest.raises(ValueError, match="returned"):
        ready(Returns(torch.zeros(shape))).recover(observe())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_recover_refuses_values_that_are_not_finite(ready, value):
    faces = torch.zeros(2, 3, 8, 8)
    faces[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        ready(Returns(faces)).recover(observe())
    with pytest.raises(ValueError, match="not finite"):
        ready(Returns(torch.zeros(2, 3, 8, 8))).recover(Observation(faces[:, None]))
    with pytest.raises(ValueError, match="templates that are not finite"):
        ready(Returns(torch.zeros(2, 3, 8, 8))).recover(observe(templates=torch.full((2, 1, 4), value)))


def test_what_an_attack_needs_has_to_be_observed(ready):
    class Needs(Returns):
        needs = frozenset({Capability.TEMPLATES, Capability.SCORES})

    with pytest.raises(ValueError, match="stolen templates and score queries"):
        ready(Needs(torch.zeros(2, 3, 8, 8))).recover(observe())


def test_an_attack_on_a_mechanism_refuses_what_it_does_not_send(ready):
    class Undoes(Returns):
        needs = frozenset({Capability.MECHANISM})

    with pytest.raises(ValueError, match=r"fitted to representations \(3, 8, 8\), got \(5, 8, 8\)"):
        ready(Undoes(torch.zeros(2, 3, 8, 8))).recover(Observation(torch.zeros(2, 1, 5, 8, 8)))


def test_gradients_are_off_unless_the_attack_needs_them(ready):
    seen = []

    class Looks(Returns):
        def run(self, observation: Observation) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return self.faces

    class Optimises(Looks):
        needs_gradients = True

    for attack in (Looks, Optimises):
        ready(attack(torch.zeros(2, 3, 8, 8))).recover(observe())
    assert seen == [False, True]


def test_embeddings_have_unit_rows_and_no_gradient(ready):
    attack = ready(Links(torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.float64).requires_grad_()))
    for embedded in (attack.embed_faces(torch.rand(2, 3, 8, 8)), attack.embed_representations(torch.rand(2, 3, 8, 8))):
        assert embedded.dtype == torch.float32
        assert not embedded.requires_grad
        torch.testing.assert_close(embedded, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4), torch.zeros(2, 4, 1), torch.full((2, 4), torch.nan)])
def test_embeddings_of_another_shape_or_not_finite_are_refused(ready, wrong):
    with pytest.raises(ValueError, match="links returned"):
        ready(Links(wrong)).embed_faces(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8).byte(), torch.full((2, 3, 8, 8), torch.inf)]
)
def test_what_cannot_be_embedded_is_refused(ready, wrong):
    attack = ready(Links(torch.ones(2, 4)))
    with pytest.raises(ValueError, match="links"):
        attack.embed_faces(wrong)
    if wrong.is_floating_point():
        with pytest.raises(ValueError, match="links was"):
            attack.embed_representations(wrong)


def test_options_of_another_attack_are_refused():
    class Other(AttackOptions):
        pass

    class Strict(Returns):
        Options = Other

        def __init__(self, options: AttackOptions | None) -> None:
            RecoveryAttack.__init__(self, options)

    assert isinstance(Strict(None).options, Other)
    with pytest.raises(TypeError, match="Other"):
        Strict(AttackOptions())


@pytest.mark.parametrize(
    ("representations", "more"),
    [
        *[(shape, {}) for shape in ((2, 3, 4, 4), (2, 1, 1, 3, 4, 4))],
        *[((2, 1, 3, 8, 8), {"states": shape}) for shape in ((2, 2, 1), (3, 1, 1), (2,))],
        *[((2, 1, 3, 8, 8), {"enrolled": shape}) for shape in ((3, 4), (2, 1, 4))],
    ],
)
def test_an_observation_refuses_parts_that_do_not_fit(representations, more):
    with pytest.raises(ValueError, match=r"must be \(N"):
        Observation(torch.zeros(representations), **{name: torch.zeros(shape) for name, shape in more.items()})


def test_observation_counts_faces_not_interceptions():
    assert len(observe(n=2, k=5)) == 2
    assert len(Observation(torch.zeros(2, 5, 3, 4, 4), torch.zeros(2, 5, 1, dtype=torch.int64))) == 2


def test_each_rung_grants_more_than_the_one_below():
    rungs = [GRANTS[rung] for rung in (Knowledge.BLACKBOX, Knowledge.WHITEBOX, Knowledge.ORACLE)]
    assert rungs[0] < rungs[1] < rungs[2]
    assert set(GRANTS) == set(Knowledge)
    assert rungs[2] == set(Capability)
    assert Capability.STATE not in rungs[1]
    assert Capability.SECRET not in rungs[0]
    assert all(Capability.PROTECTION in grants for grants in rungs)
