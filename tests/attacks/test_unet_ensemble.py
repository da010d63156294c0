from dataclasses import replace

import pytest
import torch
from interception import observe

from attacks.base import Observation
from attacks.unet_ensemble import UNetEnsemble, UNetEnsembleOptions

TINY = {"widths": (4, 8), "stem_stride": 2, "batch_size": 16, "images": 1500, "learning_rate": 4e-3}


@pytest.fixture(scope="module")
def fitted(pick, make_adversary, make_faces):
    defense = pick()
    attack = UNetEnsemble(UNetEnsembleOptions(**TINY))
    report = attack.learn(make_adversary(defense, "whitebox", faces=make_faces(90)))
    return defense, attack, report


def test_there_is_a_network_per_state_and_each_is_trained(fitted):
    defense, attack, report = fitted
    assert len(attack.network.members) == len(defense.states())
    assert {tuple(s) for s in report.states_seen.tolist()} == {tuple(s) for s in defense.states().tolist()}
    for member in attack.network.members:
        assert float(member.head.weight.detach().abs().max()) > 0  # an untrained head is zero


def test_the_kept_answer_is_mostly_that_of_the_true_state(fitted, make_faces):
    defense, attack, _ = fitted
    observation = observe(defense, make_faces(40, seed=8), states=True)
    recovered = attack.run(replace(observation, states=None))
    pairs = zip(observation.states[:, 0], observation.representations[:, 0], strict=True)
    told = torch.stack([attack.network.members[int(state)](z[None])[0] for state, z in pairs])
    same = (recovered - told).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert float(same.float().mean()) > 0.9


def test_it_recovers_more_than_the_mean_face(fitted, make_faces):
    defense, attack, _ = fitted
    faces = make_faces(40, seed=8).float() / 255
    mean = faces.mean(0)
    recovered = attack.recover(observe(defense, make_faces(40, seed=8)))
    assert float((recovered - faces).abs().mean()) < 0.8 * float((mean - faces).abs().mean())


def test_rows_of_a_mixed_batch_come_back_in_order(fitted):
    _, attack, _ = fitted
    z = torch.randn(5, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 0, 1, 0, 2])
    mixed = attack.network(z, rows)
    single = torch.cat([attack.network(z[i : i + 1], rows[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(mixed, single, rtol=0, atol=1e-5)


def test_a_defence_without_states_has_one_network(plain, make_adversary, make_faces):
    attack = UNetEnsemble(UNetEnsembleOptions(**TINY | {"images": 600}))
    attack.learn(make_adversary(plain(image_size=16), faces=make_faces(90)))
    faces = make_faces(10, seed=8).float() / 255
    assert float((attack.recover(Observation(faces[:, None])) - faces).abs().mean()) < 0.05


def test_more_states_than_allowed_are_refused(pick, make_adversary):
    with pytest.raises(ValueError, match="3 states, more than most=2"):
        UNetEnsemble(UNetEnsembleOptions(most=2)).prepare(make_adversary(pick()))
