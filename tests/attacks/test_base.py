from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from attacks.base import GRANTS, Adversary, AttackOptions, Capability, FitReport, Knowledge, Observation, RecoveryAttack


class Returns(RecoveryAttack):
    """Recovers whatever tensor it was given."""

    name = "returns"
    summary = "for tests"

    def __init__(self, faces: Tensor) -> None:
        super().__init__()
        self.faces = faces

    def fit(self, adversary: Adversary) -> FitReport:
        return FitReport()

    def prepare(self, adversary: Adversary) -> None:
        pass

    def run(self, observation: Observation) -> Tensor:
        return self.faces


def observe(n: int = 2, k: int = 1) -> Observation:
    return Observation(torch.zeros(n, k, 3, 4, 4))


def test_recover_clips_to_the_unit_interval_and_keeps_what_lies_inside():
    faces = torch.tensor([-0.5, 0.25, 1.5]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    recovered = Returns(faces).recover(observe())
    assert recovered.dtype == torch.float32
    assert recovered[0, :, 0, 0].tolist() == [0.0, 0.25, 1.0]


def test_recover_detaches():
    faces = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert not Returns(faces * 1.0).recover(observe()).requires_grad


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (2, 1, 4, 4), (2, 3, 4), (0, 3, 4, 4)])
def test_recover_refuses_another_shape(shape):
    with pytest.raises(ValueError, match="returned"):
        Returns(torch.zeros(shape)).recover(observe())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_recover_refuses_values_that_are_not_finite(value):
    faces = torch.zeros(2, 3, 4, 4)
    faces[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        Returns(faces).recover(observe())


def test_gradients_are_off_unless_the_attack_needs_them():
    seen = []

    class Looks(Returns):
        def run(self, observation: Observation) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return self.faces

    class Optimises(Looks):
        needs_gradients = True

    for attack in (Looks, Optimises):
        attack(torch.zeros(2, 3, 4, 4)).recover(observe())
    assert seen == [False, True]


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


def test_options_are_frozen_and_refuse_unknown_names():
    with pytest.raises(ValidationError):
        AttackOptions(unknown=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 1, 3, 4, 4)])
def test_observation_refuses_representations_without_interceptions(shape):
    with pytest.raises(ValueError, match=r"N, k, C, h, w"):
        Observation(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 2, 1), (3, 1, 1), (2,)])
def test_observation_refuses_states_of_other_interceptions(shape):
    with pytest.raises(ValueError, match="states"):
        Observation(torch.zeros(2, 1, 3, 4, 4), torch.zeros(shape, dtype=torch.int64))


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
