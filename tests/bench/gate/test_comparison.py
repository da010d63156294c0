"""The statistics of a change: against closed forms, hand-worked cases, and the rates that the rule promises."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from bench.gate.baseline import Expected, _expected
from bench.gate.comparison import (
    PRIOR_WEIGHT,
    Change,
    Variance,
    between_runs,
    change,
    moderated,
    pool,
    quantile,
    references,
    victims_variance,
)
from bench.gate.scores import RunScores, Scores
from bench.gate.verdict import decide, holm, worst

NAME = "recovery.ssim"


def run(means, *, seed=0, source="faces", people=None, counts=None, digest=None):
    counts = counts or [1] * len(means)
    value = float(np.average(means, weights=counts))
    figures = {NAME: Scores(value=value, means=[float(m) for m in means], counts=counts, sha256=digest)}
    people = people or [f"{seed}-{i}" for i in range(len(means))]
    return RunScores(run_id="r", seed=seed, source=source, victims=len(means), people=people, figures=figures)


def summary(value, se, *, seed=0, victims=10):
    return RunScores(run_id="r", seed=seed, source="s", victims=victims, figures={NAME: Scores(value=value, se=se)})


NOTHING = Variance(0.0, 1.0)


class TestVictims:
    def test_one_mean_has_its_textbook_variance(self):
        values = np.random.default_rng(0).normal(size=40)
        variance = victims_variance(NAME, [(run(values), 1.0)], rate=False)
        assert variance.value == pytest.approx(values.var(ddof=1) / 40, rel=0.12)
        assert variance.df == pytest.approx(39)

    def test_few_people_are_not_taken_for_all_there_are(self):
        """Of three, the plain bootstrap variance is short by a third."""
        variance = victims_variance(NAME, [(run([0.0, 0.5, 1.0]), 1.0)], rate=False)
        assert variance.value == pytest.approx(0.25 / 3, rel=0.15)

    def test_the_same_people_are_compared_pairwise(self):
        base = np.random.default_rng(1).normal(size=30)
        steps = np.random.default_rng(2).normal(0.5, 0.01, size=30)
        people = [str(i) for i in range(30)]
        runs = [run(base + steps, people=people), run(base, people=people)]
        paired = victims_variance(NAME, [(runs[0], 1.0), (runs[1], -1.0)], rate=False)
        assert paired.value == pytest.approx(steps.var(ddof=1) / 30, rel=0.15)

    def test_the_order_of_the_people_does_not_matter(self):
        values = np.random.default_rng(3).normal(size=20)
        people = [str(i) for i in range(20)]
        first, second = run(values, people=people), run(values[::-1], people=people[::-1])
        assert victims_variance(NAME, [(first, 1.0), (second, -1.0)], rate=False).value == 0

    def test_other_people_add_up(self):
        rng = np.random.default_rng(4)
        first, second = run(rng.normal(size=50), seed=1), run(rng.normal(size=50), seed=2)
        alone = [victims_variance(NAME, [(r, 1.0)], rate=False).value for r in (first, second)]
        both = victims_variance(NAME, [(first, 1.0), (second, -1.0)], rate=False)
        assert both.value == pytest.approx(sum(alone))
        assert both.df > 49

    def test_shared_people_cancel_and_the_others_stay(self):
        """Half of the people are shared: between paired and unpaired, whatever their place in the list."""
        rng = np.random.default_rng(5)
        values = rng.normal(size=60)
        people = [str(i) for i in range(90)]
        now = run(values, people=people[:60])
        half = run(np.concatenate([values[30:], rng.normal(size=30)]), people=people[30:])
        none = run(values, people=[f"x{i}" for i in range(60)])
        partly, unpaired = (victims_variance(NAME, [(now, 1.0), (r, -1.0)], rate=False).value for r in (half, none))
        assert partly == pytest.approx(unpaired / 2, rel=0.3)

    def test_people_count_by_their_images(self):
        """One person with nine images of ten decides the mean, and its resampled variance."""
        variance = victims_variance(NAME, [(run([1.0, 0.0, 0.0], counts=[8, 1, 1]), 1.0)], rate=False)
        equal = victims_variance(NAME, [(run([1.0, 0.0, 0.0]), 1.0)], rate=False)
        assert variance.value > equal.value

    def test_a_person_without_a_value_takes_no_part(self):
        scores = Scores(value=0.5, means=[0.0, None, 1.0], counts=[1, 0, 1])
        lacking = RunScores(run_id="r", seed=0, source="s", victims=3, people=["a", "b", "c"], figures={NAME: scores})
        full = run([0.0, 1.0], people=["a", "c"])
        variance = [victims_variance(NAME, [(r, 1.0)], rate=False) for r in (lacking, full)]
        assert variance[0] == variance[1]

    def test_everybody_alike_still_leaves_a_rate_open(self):
        alike = run([0.0] * 10)
        assert victims_variance(NAME, [(alike, 1.0)], rate=False).value == 0
        assert victims_variance(NAME, [(alike, 1.0)], rate=True).value == pytest.approx(1 / 12**2)

    def test_one_person_tells_nothing(self):
        assert victims_variance(NAME, [(run([0.5]), 1.0)], rate=False) is None
        lonely = change(NAME, run([0.5]), [run([0.4], seed=1)], NOTHING, rate=False)
        assert lonely.se is None
        assert lonely.ci95 is None

    def test_figures_without_people_bring_their_own_error(self):
        variance = change(NAME, summary(0.7, 0.03), [summary(0.5, 0.04, seed=1)], NOTHING, rate=False)
        assert variance.se == pytest.approx(0.05)
        assert variance.pairing == "other victims"


def test_pooling_by_hand():
    """Satterthwaite: (4 + 1)^2 / (16/8 + 1/2) = 10."""
    assert pool([Variance(4.0, 8), Variance(1.0, 2)]) == Variance(5.0, 10.0)
    assert pool([Variance(0.0, 3)]).df == math.inf


def test_quantiles_become_normal():
    assert quantile(0.975, math.inf) == pytest.approx(1.959964, abs=1e-5)
    assert quantile(0.975, 4) == pytest.approx(2.776, abs=1e-3)


class TestBetweenRuns:
    def test_seeds_that_differ_by_more_than_their_victims(self):
        rng = np.random.default_rng(6)
        levels = rng.normal(0, 0.2, size=40)
        runs = [run(level + rng.normal(0, 0.1, size=25), seed=i) for i, level in enumerate(levels)]
        variance = between_runs(NAME, runs, rate=False, same_seed=False)
        assert len(variance) == 40 * 39 / 2
        assert sum(variance) / len(variance) == pytest.approx(levels.var(ddof=1), rel=0.1)

    def test_victims_alone_are_not_called_a_difference_between_seeds(self):
        rng = np.random.default_rng(7)
        runs = [run(rng.normal(0, 0.5, size=25), seed=i) for i in range(40)]
        variance = between_runs(NAME, runs, rate=False, same_seed=False)
        assert abs(sum(variance) / len(variance)) < 0.2 * 0.25 / 25

    def test_runs_of_one_seed_are_another_matter(self):
        runs = [run([0.1, 0.2], seed=0, people=["a", "b"]), run([0.3, 0.4], seed=0, people=["a", "b"])]
        assert between_runs(NAME, runs, rate=False, same_seed=False) == []
        assert between_runs(NAME, runs, rate=False, same_seed=True) == [pytest.approx(0.2**2 / 2)]

    def test_few_runs_are_drawn_towards_what_is_assumed(self):
        assert moderated([], 1, 0.1) == Variance(pytest.approx(0.01), PRIOR_WEIGHT)
        halfway = moderated([0.03], PRIOR_WEIGHT + 1, 0.1)
        assert halfway == Variance(pytest.approx(0.02), 2 * PRIOR_WEIGHT)
        assert moderated([-0.5], PRIOR_WEIGHT + 1, 0.1).value == pytest.approx(0.005)  # never below nothing


class TestChange:
    def test_a_further_run_is_predicted_as_the_runs_differ(self):
        rng = np.random.default_rng(8)
        runs = [run(rng.normal(size=20), seed=i) for i in range(4)]
        now = run(rng.normal(size=20), seed=9)
        without, given = (change(NAME, now, runs, Variance(tau, 5), rate=False) for tau in (0.0, 0.3))
        assert given.se**2 - without.se**2 == pytest.approx(0.3 * 1.25)
        assert given.value == pytest.approx(now.figures[NAME].value - np.mean([r.figures[NAME].value for r in runs]))

    def test_identical_scores_did_not_change(self):
        now = run([0.1, 0.5], digest="abc")
        assert change(NAME, now, [now], Variance(1.0, 3), rate=True).pairing == "identical"

    def test_equal_figures_of_other_people_are_not_the_same_scores(self):
        now, same, other = summary(1.0, 0.1), summary(1.0, 0.1), summary(1.0, 0.1, seed=1)
        assert change(NAME, now, [same], NOTHING, rate=True).pairing == "identical"
        assert change(NAME, now, [other], NOTHING, rate=True).se > 0

    def test_a_run_is_compared_with_its_own_seed(self):
        runs = [run([0.1, 0.2], seed=i, source=f"s{i}") for i in range(3)]
        again = run([0.3, 0.2], seed=1, source="s1")
        assert references(again, runs) == ([runs[1]], True)
        assert references(run([0.3, 0.2], seed=1, source="other"), runs) == (runs, False)


def expected(role="privacy", direction="leakage", margin=0.05):
    spread = {"seed_sd": 0.0, "seed_df": 1, "repeat_sd": 0.0, "repeat_df": 1}
    return Expected(value=0.5, role=role, direction=direction, absolute=0.05, margin=margin, **spread)


def decided(now, se=0.01, df=math.inf, *what, pairing="other victims", **tolerated):
    """The verdict on a figure of which 0.5 was expected."""
    figure = {NAME: Change(0.5, now, se, df, pairing)}
    [verdict] = decide(figure, {NAME: expected(*what, **tolerated)}, alpha=0.01, alpha_pass=0.05)
    return verdict


class TestDecision:
    @pytest.mark.parametrize(
        ("value", "outcome"), [(0.10, "regress"), (0.0, "pass"), (-0.5, "pass"), (0.05, "inconclusive")]
    )
    def test_beyond_within_or_across(self, value, outcome):
        assert decided(0.5 + value).outcome == outcome

    def test_the_p_values_are_those_of_two_t_tests(self):
        verdict = decided(0.57, 0.02, 8, margin=0.1)
        assert verdict.p_harm == pytest.approx(stats.t.sf(1.0, 8))
        assert verdict.p_safe == pytest.approx(stats.t.sf(1.5, 8), rel=1e-3)

    def test_what_is_detectable_is_found_nine_times_in_ten(self):
        found = decided(0.5, 0.02, 12, margin=0.2).detectable
        passes_up_to = 0.2 - 0.02 * stats.t.isf(0.05, 12)
        assert stats.t.sf((passes_up_to - found) / 0.02, 12) == pytest.approx(0.9)

    def test_many_figures_make_each_one_harder_to_condemn(self):
        risen = Change(0.5, 0.5 + 0.05 + 0.025, 0.01, math.inf, "other victims")  # z = 2.5, p = 0.006
        calm = Change(0.5, 0.5, 0.01, math.inf, "other victims")
        among = decide({"a": risen, "b": calm}, dict.fromkeys("ab", expected()), alpha=0.01, alpha_pass=0.05)
        assert decided(risen.now).outcome == "regress"
        assert [verdict.outcome for verdict in among] == ["inconclusive", "pass"]

    @pytest.mark.parametrize(
        ("role", "direction", "outcome"),
        [
            ("privacy", "leakage", "pass"),
            ("privacy", "privacy", "regress"),
            ("utility", "utility", "regress"),
            ("canary", "leakage", "broken attack"),
        ],
    )
    def test_what_a_fall_means(self, role, direction, outcome):
        assert decided(0.3, 0.01, math.inf, role, direction).outcome == outcome

    @pytest.mark.parametrize(("value", "outcome"), [(0.0, "pass"), (0.05, "pass"), (0.0501, "regress")])
    def test_exact_figures_are_judged_by_their_size(self, value, outcome):
        assert decided(0.5 + value, 0.0, pairing="same victims").outcome == outcome

    def test_unknown_chance_decides_nothing(self):
        verdict = decided(0.9, None)
        assert (verdict.outcome, verdict.ci95) == ("inconclusive", None)
        assert "fewer than two people" in verdict.note


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.02, "c": 0.9}) == pytest.approx({"a": 0.03, "b": 0.04, "c": 0.9})
    assert holm({"a": 0.5, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


class TestRates:
    """Runs as the quick preset has them: a dozen people, and seeds that differ more than their victims do."""

    #: figure -> level, standard deviation between seeds, between people.
    WORLD = (
        ("recovery.ssim", 0.70, 0.015, 0.04),
        ("recovery.psnr_aligned", 20.0, 0.45, 1.1),
        ("recovery.identity.cosine", 0.6, 0.05, 0.1),
        ("recovery.ceiling.ssim", 0.97, 0.003, 0.006),
    )

    def scores(self, rng, seed, harm):
        figures = {}
        for name, level, between, people in self.WORLD:
            means = level + harm.get(name, 0.0) + rng.normal(0, between) + rng.normal(0, people, size=12)
            # Equal counts: the value is the plain mean.
            figures[name] = Scores(value=float(means.mean()), means=means.tolist(), counts=[5] * 12)
        people = [f"{seed}-{i}" for i in range(12)]
        return RunScores(run_id="r", seed=seed, source=f"s{seed}", victims=12, people=people, figures=figures)

    def outcomes(self, baselines, runs, seeds, harm):
        rng = np.random.default_rng(0)
        outcomes: Counter[str] = Counter()
        for _ in range(baselines):
            base = [self.scores(rng, seed, {}) for seed in range(seeds)]
            figures = {name: _expected(name, base, len(self.WORLD)) for name, *_ in self.WORLD}
            for seed in range(100, 100 + runs):
                now = self.scores(rng, seed, harm)
                changes = {
                    name: change(name, now, base, figure.between(paired=False), rate=figure.rate)
                    for name, figure in figures.items()
                }
                outcomes[worst(v.outcome for v in decide(changes, figures, alpha=0.002, alpha_pass=0.05))] += 1
        return outcomes

    @pytest.mark.slow
    @pytest.mark.parametrize("seeds", [1, 4, 8])
    def test_no_false_alarm_in_two_hundred_runs_of_other_seeds(self, seeds):
        """At a rate of 0.002, more than 3 of 200 happen once in a thousand times; and few are undecided."""
        outcomes = self.outcomes(10, 20, seeds, {})
        assert outcomes["regress"] <= 3
        assert outcomes["inconclusive"] <= 3

    def test_harm_is_found(self):
        """0.12 of SSIM and 4 dB: what a defence loses that shows everybody the same channels."""
        outcomes = self.outcomes(5, 20, 8, {"recovery.ssim": 0.12, "recovery.psnr_aligned": 4.0})
        assert outcomes["regress"] >= 90
