from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from score_service import SIZE, SMALL, VICTIMS, OnLatents, Service, observation, recovered
from torch.nn import functional

from attacks.hill_climb import HillClimb, HillClimbOptions


@pytest.fixture
def hidden(make_faces):
    return make_faces(VICTIMS, seed=7) / 255


@pytest.fixture
def climb(make_adversary, plain, hidden):
    """Fits, attacks the hidden faces, and returns the recovered ones and the service."""

    def run(*, noise=0.0, seed=0, **options):
        adversary = make_adversary(plain(image_size=SIZE), "blackbox", seed=seed)
        return recovered(HillClimb(HillClimbOptions(**SMALL | options)), adversary, hidden, noise)

    return run


# -- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["quick", "cpu", "gpu", "paper"])
def test_presets_are_valid(preset):
    assert HillClimbOptions.model_validate(HillClimb.presets[preset]).queries >= 128


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 7},
        {"batch": 0},
        {"queries": 0},
        {"components": 0},
        {"starts": 0},
        {"pilot": 1.0},
        {"step_size": 0},
        {"step_size": 2},
        {"penalty": -1},
        {"penalty": float("inf")},
        {"chunk": 0},
        {"iterations": 5},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        HillClimbOptions.model_validate(wrong)


# -- climbing -----------------------------------------------------------------------------------------


def test_it_reaches_the_template_where_scores_are_exact(climb):
    faces, service = climb()
    floor = service.truth(torch.full((VICTIMS, 3, SIZE, SIZE), 0.45))
    assert floor.mean() < 0.4
    assert service.truth(faces).min() > 0.98


def test_it_finds_the_face_itself_and_not_only_its_score(climb, hidden, make_faces):
    """The embedding sees 12 dimensions of about 75: in those the recovered face is nearer to the hidden one."""
    faces, _ = climb()
    mean = make_faces(60).float().mean(dim=0) / 255

    def alignment(recovered):
        return functional.cosine_similarity((recovered - mean).flatten(1), (hidden - mean).flatten(1))

    own = alignment(faces).mean()
    others = alignment(faces.roll(1, dims=0)).mean()
    assert own > others + 0.15


@pytest.mark.parametrize(("noise", "least"), [(0.1, 0.93), (0.3, 0.8)])
def test_it_climbs_through_noise(climb, noise, least):
    faces, service = climb(noise=noise, queries=1000)
    assert service.truth(faces).mean() > least


def test_a_score_that_says_nothing_leads_nowhere(climb):
    faces, service = climb(noise=1e4)
    grey = service.truth(torch.full((VICTIMS, 3, SIZE, SIZE), 0.45)).mean()
    assert abs(service.truth(faces).mean() - grey) < 0.25


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_more_queries_recover_more(climb, noise):
    scores = []
    for queries in (30, 100, 400, 1600):
        faces, service = climb(noise=noise, queries=queries)
        scores.append(float(service.truth(faces).mean()))
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.2


@pytest.mark.parametrize("starts", [1, 4])
@pytest.mark.parametrize("queries", [1, 2, 3, 15, 16, 17, 100, 333])
def test_the_budget_holds_for_every_victim_and_is_used(climb, queries, starts):
    _, service = climb(queries=queries, starts=starts)
    assert service.asked.max() <= queries
    assert service.asked.min() >= queries - 1  # candidates come in pairs


def test_one_query_gives_the_mean_face(climb, make_faces):
    faces, _ = climb(queries=1)
    mean = make_faces(60).float().mean(dim=0) / 255
    torch.testing.assert_close(faces, ((mean + mean.flip(-1)) / 2).expand_as(faces), rtol=0, atol=1e-5)


def test_the_penalty_keeps_the_latents_short(make_adversary, plain, hidden):
    lengths = []
    for penalty in (0.0, 0.01):
        attack = HillClimb(HillClimbOptions(**SMALL | {"penalty": penalty}))
        attack.learn(make_adversary(plain(image_size=SIZE)))
        faces = attack.recover(observation(Service(hidden).score))
        lengths.append(float(attack.prior.project(faces).norm(dim=1).mean()))
    assert lengths[1] < 0.7 * lengths[0]


def test_noisy_scores_are_asked_for_from_further_away():
    """At the end of a climb, how far candidates lie from each other."""
    draws, spreads = torch.Generator().manual_seed(0), []
    for noise in (0.0, 1.0):

        def formula(latents, noise=noise):
            spreads.append(float(latents.std(dim=1).mean()))
            return latents[..., 0] + noise * torch.randn(latents.shape[:2], generator=draws)

        attack = HillClimb(HillClimbOptions(queries=1000))
        attack.search(OnLatents(formula, 1000, 4), torch.zeros(4, 20))
    exact, noisy = spreads[len(spreads) // 2 - 1], spreads[-1]
    assert noisy > 2 * exact
    assert noisy < 1.5


# -- several starts -----------------------------------------------------------------------------------


def two_hills(latents):
    """A hill of height -0.05 at -2, on whose slope the start lies, and one of height 0 at 3."""
    first = latents[..., 0]
    return -0.1 * torch.minimum((first + 2).square() + 0.5, (first - 3).square())


@pytest.mark.parametrize(("starts", "top"), [(1, -2.0), (12, 3.0)])
def test_several_starts_find_the_higher_hill(starts, top):
    attack = HillClimb(HillClimbOptions(queries=4000, starts=starts, batch=8, penalty=0))
    found = attack.search(OnLatents(two_hills, 4000, 3), torch.zeros(3, 2))
    torch.testing.assert_close(found[:, 0], torch.full((3,), top), rtol=0, atol=0.2)


# -- reproducibility ----------------------------------------------------------------------------------


def test_same_seed_same_faces_and_another_seed_others(climb):
    torch.manual_seed(0)
    first, _ = climb(queries=100)
    torch.manual_seed(1)
    again, _ = climb(queries=100)
    other, _ = climb(queries=100, seed=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.01)


def test_running_twice_gives_the_same(make_adversary, plain, hidden):
    attack = HillClimb(HillClimbOptions(**SMALL | {"queries": 100}))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    before = {name: value.clone() for name, value in attack.state_dict().items()}
    first = attack.recover(observation(Service(hidden, 0.1).score))
    assert torch.equal(attack.recover(observation(Service(hidden, 0.1).score)), first)
    assert all(torch.equal(value, before[name]) for name, value in attack.state_dict().items())


@pytest.mark.parametrize("chunk", [5, 1024])
def test_a_victim_is_recovered_alike_alone_and_among_others(make_adversary, plain, hidden, chunk):
    attack = HillClimb(HillClimbOptions(**SMALL | {"queries": 150, "chunk": chunk, "starts": 2}))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    together = attack.recover(observation(Service(hidden).score))
    few = attack.recover(observation(Service(hidden).score).first(3))
    torch.testing.assert_close(few, together[:3], rtol=0, atol=1e-3)


def test_a_stored_fit_loads_into_a_prepared_attack(make_adversary, plain, hidden):
    adversary = make_adversary(plain(image_size=SIZE))
    options = HillClimbOptions(**SMALL | {"queries": 60})
    attack = HillClimb(options)
    report = attack.learn(adversary)
    assert report.saturated is None
    assert report.details["components"] == 40
    assert 0.5 < report.details["explained_variance"] <= 1
    fresh = HillClimb(options)
    fresh.prepare(adversary)
    fresh.load_state_dict(attack.state_dict())
    expected = attack.recover(observation(Service(hidden).score))
    assert torch.equal(fresh.recover(observation(Service(hidden).score)), expected)


# -- bad input ----------------------------------------------------------------------------------------


def test_it_says_what_it_needs(make_adversary, plain):
    attack = HillClimb()
    with pytest.raises(ValueError, match="prepared or fitted"):
        attack.recover(observation(None))
    attack.prepare(make_adversary(plain(image_size=SIZE)))
    with pytest.raises(ValueError, match="score queries"):
        attack.recover(observation(None))


def test_nobody_to_attack_gives_no_faces(make_adversary, plain):
    attack = HillClimb(HillClimbOptions(**SMALL))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    assert attack.recover(observation(lambda faces, persons: faces, 0)).shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(6, 3, 16, 16), torch.zeros(6, 1, 16, 16).byte(), torch.zeros(6, 3).byte()]
)
def test_unusable_public_faces_are_refused(make_adversary, plain, wrong):
    with pytest.raises(ValueError, match="uint8"):
        HillClimb().learn(make_adversary(plain(image_size=SIZE), faces=wrong))
