from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from score_service import SIZE, SMALL, VICTIMS, OnLatents, Service, observation, recovered
from torch.nn import functional

import attacks.zeroth_order
from attacks.zeroth_order import ZerothOrder, ZerothOrderOptions, _Belief


@pytest.fixture
def hidden(make_faces):
    return make_faces(VICTIMS, seed=7) / 255


@pytest.fixture
def ascend(make_adversary, plain, hidden):
    """Fits, attacks the hidden faces, and returns the recovered ones and the service."""

    def run(*, noise=0.0, seed=0, **options):
        adversary = make_adversary(plain(image_size=SIZE), "blackbox", seed=seed)
        return recovered(ZerothOrder(ZerothOrderOptions(**SMALL | options)), adversary, hidden, noise)

    return run


# -- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["quick", "cpu", "gpu", "paper"])
def test_presets_are_valid(preset):
    assert ZerothOrderOptions.model_validate(ZerothOrder.presets[preset]).queries >= 128


@pytest.mark.parametrize(
    "wrong",
    [
        {"directions": 0},
        {"prior": "generator"},
        {"estimator": "exact"},
        {"queries": 0},
        {"components": 0},
        {"step": 0},
        {"radius": 0},
        {"radius": 2},
        {"penalty": -1},
        {"penalty": float("inf")},
        {"chunk": 0},
        {"iterations": 5},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        ZerothOrderOptions.model_validate(wrong)


# -- climbing -----------------------------------------------------------------------------------------


def test_it_reaches_the_template_where_scores_are_exact(ascend):
    faces, service = ascend()
    floor = service.truth(torch.full((VICTIMS, 3, SIZE, SIZE), 0.45))
    assert floor.mean() < 0.4
    assert service.truth(faces).min() > 0.98


def test_it_finds_the_face_itself_and_not_only_its_score(ascend, hidden, make_faces):
    """The embedding sees 12 dimensions of about 75: in those the recovered face is nearer to the hidden one."""
    faces, _ = ascend()
    mean = make_faces(60).float().mean(dim=0) / 255

    def alignment(recovered):
        return functional.cosine_similarity((recovered - mean).flatten(1), (hidden - mean).flatten(1))

    own = alignment(faces).mean()
    others = alignment(faces.roll(1, dims=0)).mean()
    assert own > others + 0.15


@pytest.mark.parametrize(("noise", "least"), [(0.1, 0.93), (0.3, 0.8)])
def test_it_climbs_through_noise(ascend, noise, least):
    faces, service = ascend(noise=noise, queries=1000)
    assert service.truth(faces).mean() > least


def test_a_score_that_says_nothing_leads_nowhere(ascend):
    faces, service = ascend(noise=1e4)
    grey = service.truth(torch.full((VICTIMS, 3, SIZE, SIZE), 0.45)).mean()
    assert abs(service.truth(faces).mean() - grey) < 0.25


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_more_queries_recover_more(ascend, noise):
    scores = []
    for queries in (20, 50, 120, 400):
        faces, service = ascend(noise=noise, queries=queries)
        scores.append(float(service.truth(faces).mean()))
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.2


@pytest.mark.parametrize("queries", [1, 2, 3, 15, 16, 17, 100, 333])
def test_the_budget_holds_for_every_victim_and_is_used(ascend, queries):
    _, service = ascend(queries=queries)
    assert service.asked.tolist() == [queries] * VICTIMS


@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("queries", [1, 2, 3, 16, 17, 100])
def test_the_budget_holds_for_plain_differences(ascend, queries, estimator):
    _, service = ascend(queries=queries, estimator=estimator)
    assert service.asked.max() <= queries


def test_one_query_gives_the_mean_face(ascend, make_faces):
    faces, _ = ascend(queries=1)
    mean = make_faces(60).float().mean(dim=0) / 255
    torch.testing.assert_close(faces, ((mean + mean.flip(-1)) / 2).expand_as(faces), rtol=0, atol=1e-5)


def test_the_penalty_keeps_the_latents_short(make_adversary, plain, hidden):
    lengths = []
    for penalty in (0.0, 0.01):
        attack = ZerothOrder(ZerothOrderOptions(**SMALL | {"penalty": penalty}))
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

        attack = ZerothOrder(ZerothOrderOptions(queries=1000))
        attack.search(OnLatents(formula, 1000, 4), torch.zeros(4, 20))
    exact, noisy = spreads[len(spreads) // 2 - 1], spreads[-1]
    assert noisy > 2 * exact
    assert noisy < 1.5


# -- estimators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_plain_differences_climb_too(ascend, estimator):
    faces, service = ascend(estimator=estimator, queries=1500, radius=0.1)
    assert service.truth(faces).mean() > 0.93


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_remembering_answers_beats_forgetting_them(ascend, noise):
    scores = []
    for estimator in ("filter", "central", "forward"):
        faces, service = ascend(estimator=estimator, queries=200, noise=noise)
        scores.append(float(service.truth(faces).mean()))
    assert scores[0] > max(scores[1:]) + 0.02


def test_the_published_setting_asks_17_times_in_each_of_400_steps(make_adversary, plain):
    calls = []

    def score(faces, persons):
        calls.append(len(faces))
        return faces.mean(dim=(1, 2, 3))

    attack = ZerothOrder(ZerothOrderOptions(**ZerothOrder.presets["paper"] | {"components": 8}))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    attack.recover(observation(score, 1))
    assert calls == [17] * 400


# -- the belief ---------------------------------------------------------------------------------------


def beliefs(size=5, victims=3):
    level = torch.linspace(-0.2, 0.4, victims)[:, None]
    return _Belief(level, torch.linspace(0, 0.02, victims)[:, None], torch.full((victims, 1), 0.5), size)


def test_the_belief_is_bayesian_linear_regression_on_all_answers():
    belief, size = beliefs(), 5
    draws = torch.Generator().manual_seed(0)
    moves = torch.randn(3, 14, size, generator=draws)
    answers = 0.3 * torch.randn(3, 14, generator=draws)
    prior_mean, prior_covariance = belief._mean.double(), belief._covariance.double()
    variance = belief._variance.double()
    for few in (slice(0, 5), slice(5, 6), slice(6, 14)):
        belief.update(moves[:, few], answers[:, few])
    for victim in range(3):
        design = torch.cat((torch.ones(14, 1), moves[victim]), dim=1).double()
        precision = torch.linalg.inv(prior_covariance[victim])
        covariance = torch.linalg.inv(precision + design.T @ design / variance[victim])
        mean = covariance @ (precision @ prior_mean[victim] + design.T @ answers[victim].double() / variance[victim])
        torch.testing.assert_close(belief._mean[victim].double(), mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(belief._covariance[victim].double(), covariance, rtol=1e-3, atol=1e-5)


def test_moving_changes_where_the_belief_stands_and_not_what_it_says(monkeypatch):
    for gain in ("_DRIFT", "_BEND"):
        monkeypatch.setattr(attacks.zeroth_order, gain, 0.0)
    belief, draws = beliefs(), torch.Generator().manual_seed(1)
    belief.update(torch.randn(3, 4, 5, generator=draws), torch.randn(3, 4, generator=draws))

    def said_at(place):
        design = torch.cat((torch.ones(3, 1), place), dim=1)
        mean = (design * belief._mean).sum(dim=1)
        return mean, (design[:, None] @ belief._covariance @ design[..., None]).flatten()

    place, move = torch.randn(3, 5, generator=draws), torch.randn(3, 5, generator=draws)
    before = said_at(place)
    belief.move(move)
    torch.testing.assert_close(said_at(place - move), before, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(belief._covariance, belief._covariance.mT)


def test_a_move_makes_the_slope_less_certain_along_the_way_above_all():
    belief = beliefs()
    before = belief._covariance.diagonal(dim1=1, dim2=2).clone()
    belief.move(3 * torch.eye(5)[:3])
    gained = belief._covariance.diagonal(dim1=1, dim2=2)[:, 1:] - before[:, 1:]
    assert (gained > 0).all()
    assert torch.equal(gained.argmax(dim=1), torch.arange(3))


# -- reproducibility ----------------------------------------------------------------------------------


def test_same_seed_same_faces_and_another_seed_others(ascend):
    torch.manual_seed(0)
    first, _ = ascend(queries=100)
    torch.manual_seed(1)
    again, _ = ascend(queries=100)
    other, _ = ascend(queries=100, seed=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.01)


def test_running_twice_gives_the_same(make_adversary, plain, hidden):
    attack = ZerothOrder(ZerothOrderOptions(**SMALL | {"queries": 100}))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    before = {name: value.clone() for name, value in attack.state_dict().items()}
    first = attack.recover(observation(Service(hidden, 0.1).score))
    assert torch.equal(attack.recover(observation(Service(hidden, 0.1).score)), first)
    assert all(torch.equal(value, before[name]) for name, value in attack.state_dict().items())


@pytest.mark.parametrize("chunk", [5, 1024])
def test_a_victim_is_recovered_alike_alone_and_among_others(make_adversary, plain, hidden, chunk):
    attack = ZerothOrder(ZerothOrderOptions(**SMALL | {"queries": 150, "chunk": chunk}))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    together = attack.recover(observation(Service(hidden).score))
    few = attack.recover(observation(Service(hidden).score).first(3))
    torch.testing.assert_close(few, together[:3], rtol=0, atol=1e-3)


def test_a_stored_fit_loads_into_a_prepared_attack(make_adversary, plain, hidden):
    adversary = make_adversary(plain(image_size=SIZE))
    options = ZerothOrderOptions(**SMALL | {"queries": 60})
    attack = ZerothOrder(options)
    report = attack.learn(adversary)
    assert report.saturated is None
    assert report.details["components"] == 40
    assert 0.5 < report.details["explained_variance"] <= 1
    fresh = ZerothOrder(options)
    fresh.prepare(adversary)
    fresh.load_state_dict(attack.state_dict())
    expected = attack.recover(observation(Service(hidden).score))
    assert torch.equal(fresh.recover(observation(Service(hidden).score)), expected)


# -- bad input ----------------------------------------------------------------------------------------


def test_it_says_what_it_needs(make_adversary, plain):
    attack = ZerothOrder()
    with pytest.raises(ValueError, match="prepared or fitted"):
        attack.recover(observation(None))
    attack.prepare(make_adversary(plain(image_size=SIZE)))
    with pytest.raises(ValueError, match="score queries"):
        attack.recover(observation(None))


def test_nobody_to_attack_gives_no_faces(make_adversary, plain):
    attack = ZerothOrder(ZerothOrderOptions(**SMALL))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    assert attack.recover(observation(lambda faces, persons: faces, 0)).shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(6, 3, 16, 16), torch.zeros(6, 1, 16, 16).byte(), torch.zeros(6, 3).byte()]
)
def test_unusable_public_faces_are_refused(make_adversary, plain, wrong):
    with pytest.raises(ValueError, match="uint8"):
        ZerothOrder().learn(make_adversary(plain(image_size=SIZE), faces=wrong))
