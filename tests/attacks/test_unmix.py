"""Maps that are shuffled and added up are found, by a toy whose maps are known exactly."""

from __future__ import annotations

import pytest
import torch
from interception import observe as intercept
from linear_world import adversary_of, error
from pictures import smooth

from attacks.linear import Linear, LinearOptions
from attacks.unmix import Unmix, UnmixOptions, _likelihoods
from bench.plugins import make_defense
from defenses.base import Defense
from defenses.frequency import block_dct, inverse_block_dct, inverse_block_dct_adjoint

SIZE = 24
SMALL = {"placed": 8, "components": 16, "band": 8, "map_faces": 160}


def faces_of(count, seed):
    """Pictures that, like aligned faces, have a common mean and vary in few directions only."""
    patterns = smooth(7, SIZE, 5).float() / 255 - 0.5
    weights = 0.5 * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return (255 * (0.5 + patterns[6] + torch.tensordot(weights, patterns[:6], dims=1)).clamp(0, 1)).to(torch.uint8)


class Shuffled(Defense):
    """Some frequencies of a face, squashed, in places of their own for every face, decoded: no linear map."""

    name = "shuffled"
    shuffles = True

    def draw(self, count, generator, labels=None):
        return torch.rand(count, 192, generator=generator).argsort(dim=1) if self.shuffles else None

    def canonical_maps(self, faces):
        maps = torch.zeros(len(faces), 192, SIZE, SIZE)
        maps[:, 0:192:16] = 60 * torch.tanh(block_dct(faces, torch.arange(0, 64, 16)) / 480)
        return maps

    def transform(self, faces, state, generator):
        maps = self.canonical_maps(faces)
        if state is not None:
            maps = maps.gather(1, state[:, :, None, None].expand_as(maps))
        return inverse_block_dct(maps)

    def canonical(self, representation, state):
        back = inverse_block_dct_adjoint(representation - 128 / 255)
        return back.gather(1, state.argsort(dim=1)[:, :, None, None].expand_as(back))


class Plain(Shuffled):
    shuffles = False


class Unequal(Shuffled):
    """Places that lie in two colours of three."""

    def canonical(self, representation, state):
        back = inverse_block_dct_adjoint(representation - 128 / 255)
        return torch.cat((back[:, :64], back[:, :128]), dim=1)


def adversary(make_adversary, defense, knowledge="whitebox"):
    return make_adversary(defense, knowledge, faces=faces_of(240, seed=1))


@pytest.fixture(scope="module")
def fits():
    return {}


@pytest.fixture
def fitted(make_adversary, fits):
    def fit(kind, knowledge="whitebox"):
        if (kind, knowledge) not in fits:
            attack = Unmix(UnmixOptions(**SMALL))
            report = attack.learn(adversary(make_adversary, kind(image_size=SIZE), knowledge))
            fits[kind, knowledge] = attack, report
        return fits[kind, knowledge]

    return fit


def _observed(k=1, kind=Shuffled, count=12):
    faces = faces_of(count, seed=50)
    return faces.float() / 255, intercept(kind(image_size=SIZE), faces, k, states=True)


def test_the_mixture_is_read_off_the_adjoint(fitted):
    attack, _ = fitted(Shuffled)
    maps = 50 * torch.randn(2, 192, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    sent = inverse_block_dct(maps)
    fields = attack._fields.flatten(0, 1)[attack._row]
    planes = torch.stack([(fields * maps.flatten(2))[:, some].sum(dim=1) for some in attack._places], dim=1)
    torch.testing.assert_close(attack._planes(sent), planes @ attack._sketch.T, rtol=1e-3, atol=1e-2)


def test_most_of_the_energy_is_placed_right_and_the_face_comes_back(fitted):
    attack, report = fitted(Shuffled)
    faces, observation = _observed()
    floor = error(attack.face.expand_as(faces), faces)
    assert report.details["energy_placed"] > 0.3 > 20 * report.details["by_chance"]
    found = attack._search(attack._planes(observation.representations[:, 0]))
    right = found == attack._known(observation.states[:, 0], len(found))
    assert float(right[:, 0].float().mean()) > 0.4
    assert all(len(torch.unique(places)) == len(places) for places in found)
    assert error(attack.recover(observation), faces) < 0.75 * floor


def test_states_that_are_known_give_more_and_several_interceptions_too(fitted):
    faces, once = _observed()
    inferred = error(fitted(Shuffled)[0].recover(once), faces)
    attack, _ = fitted(Shuffled, "oracle")
    known = error(attack.recover(once), faces)
    assert known < inferred
    assert error(attack.recover(_observed(k=4)[1]), faces) < known
    with pytest.raises(ValueError, match="states"):
        attack.recover(intercept(Shuffled(image_size=SIZE), faces_of(2, seed=50)))


def test_what_is_not_shuffled_needs_no_search(fitted):
    attack, _ = fitted(Plain)
    faces, observation = _observed(kind=Plain)
    assert error(attack.recover(observation), faces) < 0.6 * error(attack.face.expand_as(faces), faces)


def test_the_likelihood_is_that_of_a_gaussian():
    generator = torch.Generator().manual_seed(3)
    left, maps, more = (torch.randn(*shape, generator=generator) for shape in ((2, 5), (2, 5, 3), (2, 4, 5, 4)))
    expected = torch.empty(2, 4)
    for plane in range(2):
        for place in range(4):
            mean, along = left.clone(), maps.clone()
            mean[plane] -= more[plane, place, :, 0]
            along[plane] += more[plane, place, :, 1:]
            along = along.flatten(0, 1).double()
            gaussian = torch.distributions.MultivariateNormal(
                torch.zeros(10, dtype=torch.float64), along @ along.T + torch.eye(10, dtype=torch.float64)
            )
            expected[plane, place] = gaussian.log_prob(mean.flatten().double())
    found = _likelihoods(left, maps, more, more.mT @ more)
    torch.testing.assert_close(found - found[0, 0], expected - expected[0, 0], rtol=1e-3, atol=1e-3)


def test_a_mixture_of_another_kind_is_refused(make_adversary):
    with pytest.raises(ValueError, match="within 3 planes"):
        Unmix().prepare(adversary(make_adversary, Unequal(image_size=SIZE)))


def test_a_fit_can_be_stored(make_adversary, fitted):
    attack, _ = fitted(Shuffled)
    again = Unmix(UnmixOptions(**SMALL))
    again.prepare(adversary(make_adversary, Shuffled(image_size=SIZE)))
    again.load_state_dict(attack.state_dict())
    _, observation = _observed(count=2)
    assert torch.equal(again.recover(observation), attack.recover(observation))


def test_where_nothing_is_mixed_it_is_the_linear_attack(make_adversary):
    defense = make_defense("blur", {}, "cpu", SIZE)
    options = {"rank": 12, "state_faces": 60, "traffic": 60}
    mine, linear = Unmix(UnmixOptions(**options)), Linear(LinearOptions(**options))
    mine.learn(adversary_of(make_adversary, defense, "whitebox"))
    linear.learn(adversary_of(make_adversary, defense, "whitebox"))
    observation = intercept(defense, faces_of(3, seed=50))
    torch.testing.assert_close(mine.recover(observation), linear.recover(observation))


def test_minusface_is_a_mixture_that_it_takes(make_adversary):
    options = {"widths": "4,8"}
    defense = make_defense("minusface", options, "cpu", SIZE)
    assert Unmix().inapplicable(defense) is None
    attack = Unmix(UnmixOptions(placed=4, components=8, band=8, map_faces=60))
    attack.learn(adversary(make_adversary, defense))
    faces = faces_of(4, seed=50)
    maps, permutation = defense.canonical_maps(faces.float() / 255), torch.randperm(192)
    sent = attack._planes(inverse_block_dct(maps[:, permutation]))
    fields = attack._fields.flatten(0, 1)[attack._row] * maps[:, permutation].flatten(2)
    planes = torch.stack([fields[:, some].sum(dim=1) for some in attack._places], dim=1) @ attack._sketch.T
    torch.testing.assert_close(sent, planes, rtol=1e-3, atol=0.05)
