"""The two attacks that climb verification scores in the latents of eigenfaces."""

from __future__ import annotations

import pytest
import torch
from score_service import SIZE, SMALL, VICTIMS, OnLatents, Service, observation, recovered
from torch.nn import functional

import attacks.zeroth_order
from attacks.hill_climb import HillClimb, HillClimbOptions
from attacks.zeroth_order import ZerothOrder, ZerothOrderOptions, _Belief

BOTH = [HillClimb, ZerothOrder]


@pytest.fixture
def hidden(make_faces):
    return make_faces(VICTIMS, seed=7) / 255


@pytest.fixture
def climb(make_adversary, plain, hidden):
    """Fits, attacks the hidden faces, and returns the recovered ones and the service."""

    def run(attack, *, noise=0.0, **options):
        adversary = make_adversary(plain(image_size=SIZE), "blackbox")
        return recovered(attack(attack.Options(**SMALL | options)), adversary, hidden, noise)

    return run


@pytest.mark.parametrize("attack", BOTH)
def test_it_reaches_the_template_where_scores_are_exact(climb, attack):
    faces, service = climb(attack)
    floor = service.truth(torch.full((VICTIMS, 3, SIZE, SIZE), 0.45))
    assert floor.mean() < 0.4
    assert service.truth(faces).min() > 0.98


@pytest.mark.parametrize("attack", BOTH)
def test_it_finds_the_face_itself_and_not_only_its_score(climb, hidden, make_faces, attack):
    """The embedding sees 12 dimensions of about 75: in those the recovered face is nearer to the hidden one."""
    faces, _ = climb(attack)
    mean = make_faces(60).float().mean(dim=0) / 255

    def alignment(recovered):
        return functional.cosine_similarity((recovered - mean).flatten(1), (hidden - mean).flatten(1)).mean()

    assert alignment(faces) > alignment(faces.roll(1, dims=0)) + 0.15


@pytest.mark.parametrize(("noise", "least"), [(0.1, 0.93), (0.3, 0.8)])
@pytest.mark.parametrize("attack", BOTH)
def test_it_climbs_through_noise(climb, attack, noise, least):
    faces, service = climb(attack, noise=noise, queries=1000)
    assert service.truth(faces).mean() > least


@pytest.mark.parametrize("attack", BOTH)
def test_a_score_that_says_nothing_leads_nowhere(climb, attack):
    faces, service = climb(attack, noise=1e4)
    grey = service.truth(torch.full((VICTIMS, 3, SIZE, SIZE), 0.45)).mean()
    assert abs(service.truth(faces).mean() - grey) < 0.25


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("attack", "budgets"), [(HillClimb, (30, 100, 400, 1600)), (ZerothOrder, (20, 50, 120, 400))])
def test_more_queries_recover_more(climb, attack, budgets, noise):
    scores = []
    for queries in budgets:
        faces, service = climb(attack, noise=noise, queries=queries)
        scores.append(float(service.truth(faces).mean()))
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.2


@pytest.mark.parametrize("queries", [1, 2, 3, 15, 16, 17, 100, 333])
@pytest.mark.parametrize(
    ("attack", "options", "unused"),
    [
        (HillClimb, {}, 1),  # candidates come in pairs
        (HillClimb, {"starts": 4}, 1),
        (ZerothOrder, {}, 0),
        (ZerothOrder, {"estimator": "central"}, 32),
        (ZerothOrder, {"estimator": "forward"}, 16),
    ],
)
def test_the_budget_holds_for_every_victim_and_is_used(climb, attack, options, unused, queries):
    _, service = climb(attack, queries=queries, **options)
    assert queries - unused <= service.asked.min() <= service.asked.max() <= queries


@pytest.mark.parametrize("attack", BOTH)
def test_one_query_gives_the_mean_face(climb, make_faces, attack):
    faces, _ = climb(attack, queries=1)
    mean = make_faces(60).float().mean(dim=0) / 255
    torch.testing.assert_close(faces, ((mean + mean.flip(-1)) / 2).expand_as(faces), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", BOTH)
def test_the_penalty_keeps_the_latents_short(make_adversary, plain, hidden, attack):
    lengths = []
    for penalty in (0.0, 0.01):
        search = attack(attack.Options(**SMALL | {"penalty": penalty}))
        report = search.learn(make_adversary(plain(image_size=SIZE)))
        faces = search.recover(observation(Service(hidden).score))
        lengths.append(float(search.prior.project(faces).norm(dim=1).mean()))
    assert lengths[1] < 0.7 * lengths[0]
    assert report.details["components"] == 40
    assert 0.5 < report.details["explained_variance"] <= 1


@pytest.mark.parametrize("attack", BOTH)
def test_noisy_scores_are_asked_for_from_further_away(attack):
    """At the end of a climb, how far candidates lie from each other."""
    draws, spreads = torch.Generator().manual_seed(0), []
    for noise in (0.0, 1.0):

        def formula(latents, noise=noise):
            spreads.append(float(latents.std(dim=1).mean()))
            return latents[..., 0] + noise * torch.randn(latents.shape[:2], generator=draws)

        attack(attack.Options(queries=1000)).search(OnLatents(formula, 1000, 4), torch.zeros(4, 20))
    exact, noisy = spreads[len(spreads) // 2 - 1], spreads[-1]
    assert noisy > 2 * exact
    assert noisy < 1.5


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize(("attack", "more"), [(HillClimb, {"starts": 2}), (ZerothOrder, {})])
def test_a_victim_is_recovered_alike_alone_and_among_others(make_adversary, plain, hidden, attack, more, chunk):
    search = attack(attack.Options(**SMALL | {"queries": 150, "chunk": chunk, **more}))
    search.learn(make_adversary(plain(image_size=SIZE)))
    together = search.recover(observation(Service(hidden).score))
    few = search.recover(observation(Service(hidden).score).rows(slice(3)))
    torch.testing.assert_close(few, together[:3], rtol=0, atol=1e-3)


def two_hills(latents):
    """A hill of height -0.05 at -2, on whose slope the start lies, and one of height 0 at 3."""
    first = latents[..., 0]
    return -0.1 * torch.minimum((first + 2).square() + 0.5, (first - 3).square())


@pytest.mark.parametrize(("starts", "top"), [(1, -2.0), (12, 3.0)])
def test_several_starts_find_the_higher_hill(starts, top):
    attack = HillClimb(HillClimbOptions(queries=4000, starts=starts, batch=8, penalty=0))
    latents = attack.search(OnLatents(two_hills, 4000, 3), torch.zeros(3, 2))
    torch.testing.assert_close(latents[:, 0], torch.full((3,), top), rtol=0, atol=0.2)


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_plain_differences_climb_too(climb, estimator):
    faces, service = climb(ZerothOrder, estimator=estimator, queries=1500, radius=0.1)
    assert service.truth(faces).mean() > 0.93


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_remembering_answers_beats_forgetting_them(climb, noise):
    scores = []
    for estimator in ("filter", "central", "forward"):
        faces, service = climb(ZerothOrder, estimator=estimator, queries=200, noise=noise)
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

    def said_at(point):
        design = torch.cat((torch.ones(3, 1), point), dim=1)
        mean = (design * belief._mean).sum(dim=1)
        return mean, (design[:, None] @ belief._covariance @ design[..., None]).flatten()

    point, move = torch.randn(3, 5, generator=draws), torch.randn(3, 5, generator=draws)
    before = said_at(point)
    belief.move(move)
    torch.testing.assert_close(said_at(point - move), before, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(belief._covariance, belief._covariance.mT)


def test_a_move_makes_the_slope_less_certain_along_the_way_above_all():
    belief = beliefs()
    before = belief._covariance.diagonal(dim1=1, dim2=2).clone()
    belief.move(3 * torch.eye(5)[:3])
    gained = belief._covariance.diagonal(dim1=1, dim2=2)[:, 1:] - before[:, 1:]
    assert (gained > 0).all()
    assert torch.equal(gained.argmax(dim=1), torch.arange(3))
