"""The verdict on a setting: means over seeds, who leaks least, ties, what is not compared, and what is worth it."""

import csv
import io
import json

import numpy as np
import pytest
from run_folders import measure, write_run

from bench.errors import MissingError
from bench.run.archive import load_runs
from reports.cells import attempts, over_seeds, settings, worst_case
from reports.formats import leaderboard_csv
from reports.report import write_leaderboard, write_report
from reports.summary import summary, worst_rows
from reports.verdict import COSTS_AT_MOST, LEAVES_AT_MOST, least, standings, verdicts

PEOPLE = 60


def setting_of(*folders):
    (setting,) = settings(load_runs(folders))
    return setting


def passing(share, *, images=2 * PEOPLE, shift=0):
    """Of so many images, two a person, which pass: the same people come first, but for ``shift``."""
    return np.roll(np.arange(images) < round(share * images), shift)


def run(folder, defense, share, **options):
    """A run after which ``share`` of recovered faces pass at FAR 1e-3: 5 % of guesses do, and all unprotected faces."""
    return write_run(
        folder / f"{defense}-{share}", defense=defense, type2=passing(share), **{"accuracy": 0.96} | options
    )


def verdict_of(*folders):
    (one,) = verdicts(setting_of(*folders))
    return one


def told(verdict):
    return {one.defense: one.worth for one in verdict.standings}


# -- over seeds ----------------------------------------------------------------------------------------


def test_a_mean_over_seeds_has_an_interval_of_both_worked_out_by_hand():
    mean = over_seeds("ssim", [measure(value, 0.03) for value in (0.5, 0.6, 0.7)])
    assert mean.value == pytest.approx(0.6)
    # Standard error .1 / sqrt(3), Student's t of two degrees of freedom 4.302653, and the runs' own half of .03.
    half = ((4.302653 * 0.1 / 3**0.5) ** 2 + 0.03**2) ** 0.5
    assert mean.ci95 == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)
    assert mean.n == 24
    assert over_seeds("ssim", [measure(0.5)]) == measure(0.5)
    assert over_seeds("ssim", [measure(0.99), measure(0.6)]).ci95[1] == 1.0  # no face is more like than the face itself
    rates = over_seeds("type2_far_1e3", [measure(0.9, 0.05), measure(1.0, 0.0)])
    assert rates.ci95[1] == 1.0


@pytest.mark.parametrize("shared", [True, False], ids=["the same victims", "other victims"])
@pytest.mark.parametrize("between", [0.0, 0.01, 0.03])
def test_the_interval_over_seeds_holds_the_truth(shared, between):
    rng, own, seeds, trials = np.random.default_rng(3), 0.01, 3, 400
    victims = rng.normal(0, own, (trials, 1 if shared else seeds))
    values = 0.5 + victims + rng.normal(0, between, (trials, seeds))
    intervals = [over_seeds("ssim", [measure(v, 1.96 * own) for v in row]).ci95 for row in values]
    assert np.mean([low <= 0.5 <= high for low, high in intervals]) >= 0.94


def test_seeds_of_one_cell_stand_in_one_row(tmp_path):
    values = (0.5, 0.6, 0.7)
    folders = [write_run(tmp_path / str(seed), seed=seed, ssim=(value,) * 8) for seed, value in enumerate(values)]
    table = summary(setting_of(*folders), 1)
    (row,) = (row for row in table.rows if row.kind == "measured")
    assert row.entries["ssim"].number == pytest.approx(0.6)
    assert row.entries["attack"].note == "mean of 3 seeds: 0, 1, 2"
    (worst,) = worst_rows(setting_of(*folders)).values()
    assert "mean of 3 seeds" in worst.entries["attack"].note
    assert worst.entries["ssim"].interval != "[0.590, 0.610]"


def test_seeds_that_met_other_attacks_are_not_averaged(tmp_path):
    folders = [
        write_run(tmp_path / "a", seed=0, ssim=(0.5,) * 8),
        write_run(tmp_path / "b", seed=1, ssim=(0.6,) * 8),
        write_run(tmp_path / "c", seed=1, attack="linear", ssim=(0.9,) * 8),
    ]
    setting = setting_of(*folders)
    assert worst_case(setting.cells, "ssim").measure.value == pytest.approx(0.9)
    (one,) = standings(setting, "whitebox", "ssim")
    assert one.objection == "its seeds did not meet the same attacks"


# -- who leaks least ---------------------------------------------------------------------------------


def test_victims_are_paired(tmp_path):
    """Intervals of 40 and 50 % overlap; that the same people pass, and more of them, tells the two apart."""
    one, other, apart = (run(tmp_path / name, name, share) for name, share in (("a", 0.4), ("b", 0.5), ("c", 0.5)))
    leaders = least(standings(setting_of(one, other), "whitebox", "type2_far_1e3"))
    assert [leader.defense for leader in leaders] == ["a"]
    # Where other people pass, as many more of them are chance.
    apart = write_run(tmp_path / "d", defense="d", type2=passing(0.5, shift=60), accuracy=0.96)
    leaders = least(standings(setting_of(one, apart), "whitebox", "type2_far_1e3"))
    assert [leader.defense for leader in leaders] == ["a", "d"]


def test_a_tie_is_said_as_one_and_nothing_is_bold(tmp_path):
    folders = [run(tmp_path, "a", 0.2), run(tmp_path, "b", 0.2), run(tmp_path, "none", 1.0, accuracy=0.97)]
    verdict = verdict_of(*folders)
    assert "a and b are worth it, and cannot be told apart" in verdict.sentence
    assert told(verdict)["a"] == told(verdict)["b"] == ("worth it", "")
    rows = worst_rows(setting_of(*folders))
    assert [rows[name, "whitebox"].entries["type2_far_1e3"].best for name in ("a", "b", "none")] == [True, True, False]
    assert not any(row.entries["ssim"].best for row in rows.values()), "all are equal"
    rows = worst_rows(setting_of(*folders[:2]))
    assert not any(entry.best for row in rows.values() for entry in row.entries.values())


def test_bold_are_those_of_whom_the_sentence_says_that_they_leak_least(tmp_path):
    """What is measured beside all defences makes no comparison of two of them stricter."""
    folders = [run(tmp_path, "a", 0.2), run(tmp_path, "b", 0.25), run(tmp_path, "none", 1.0, accuracy=0.97)]
    all_three = least(standings(setting_of(*folders), "whitebox", "type2_far_1e3"))
    assert [one.defense for one in all_three] == ["a", "b"]  # so near that it matters how many are compared
    assert "a is worth it, and leaks least of the 2 that are" in verdict_of(*folders).sentence
    rows = worst_rows(setting_of(*folders))
    assert [rows[name, "whitebox"].entries["type2_far_1e3"].best for name in ("a", "b")] == [True, False]


def test_nothing_is_bold_where_no_defence_does_better_than_none(tmp_path):
    folders = [run(tmp_path, "a", 0.9), run(tmp_path, "none", 0.4), run(tmp_path, "b", 0.6)]
    rows = worst_rows(setting_of(*folders))
    assert not any(entry.best for row in rows.values() for entry in row.entries.values())


def test_comparisons_are_as_many_as_they_are(tmp_path):
    """One defence of two differs from the best by 3 points, for sure; of forty that is chance."""
    first = write_run(tmp_path / "a", defense="a", type2=passing(0.3), accuracy=0.96)
    near = write_run(tmp_path / "z", defense="z", type2=passing(0.36), accuracy=0.96)
    many = [write_run(tmp_path / f"{n}", defense=f"m{n}", type2=passing(0.9), accuracy=0.96) for n in range(38)]
    alone = least(standings(setting_of(first, near), "whitebox", "type2_far_1e3"))
    among = least(standings(setting_of(first, near, *many), "whitebox", "type2_far_1e3"))
    assert [one.defense for one in alone] == ["a"]
    assert [one.defense for one in among] == ["a", "z"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"saturated": False}, "unsaturated"),
        ({"above_floor": False}, "no attack is better than a floor"),
        ({"attack": "linear"}, "it met other attacks: linear instead of unet"),
    ],
)
def test_what_met_weaker_attackers_is_not_the_least_and_not_worth_it(tmp_path, options, reason):
    folders = [run(tmp_path, "low", 0.1, **options), run(tmp_path, "a", 0.3), run(tmp_path, "none", 1.0)]
    verdict = verdict_of(*folders)
    assert "a is worth it:" in verdict.sentence
    assert reason in verdict.unsettled["low"]
    assert verdict.standings[0].defense == "low", "it stays in its place"
    assert reason in leaderboard_csv([setting_of(*folders)])


def test_a_failed_attack_is_an_objection(tmp_path):
    folders = [run(tmp_path / "u", name, share) for name, share in (("low", 0.1), ("a", 0.3))]
    folders += [write_run(tmp_path / "l", defense="low", attack="linear", error="not finite")]
    folders += [run(tmp_path / "l2", "a", 0.3, attack="linear")]
    assert verdict_of(*folders).unsettled == {"low": "an attack failed"}


# -- what is worth it --------------------------------------------------------------------------------


def test_worth_is_asked_of_the_unfavourable_ends(tmp_path):
    """Guesses pass at 5 %, unprotected faces always; accuracy is known to 2 points, and is 97 % without a defence."""
    middle = 0.05 + LEAVES_AT_MOST * 0.95
    cases = {
        "good": (0.1, 0.96), "leaks": (0.9, 0.96), "perhaps": (middle, 0.96), "both": (0.9, 0.6),
        "costs": (0.1, 0.97 - COSTS_AT_MOST - 0.03), "may-cost": (0.1, 0.97 - COSTS_AT_MOST + 0.01),
    }  # fmt: skip
    folders = [run(tmp_path, name, share, accuracy=accuracy) for name, (share, accuracy) in cases.items()]
    found = told(verdict_of(*folders))
    assert {name: worth for name, (worth, _) in found.items()} == {
        "good": "worth it", "leaks": "not worth it", "perhaps": "not shown", "costs": "not worth it",
        "may-cost": "not shown", "both": "not worth it",
    }  # fmt: skip
    assert found["leaks"][1] == f"leaves {(0.9 - 0.05) / 0.95:.0%} of what leaks without it"
    assert found["costs"][1] == "costs 8.0 points of accuracy"
    assert " and " in found["both"][1]


def test_that_nothing_is_worth_it_is_said_only_where_all_are_refuted(tmp_path):
    bad = [run(tmp_path, "leaky", 0.9), run(tmp_path, "useless", 0.1, accuracy=0.6)]
    sentence = verdict_of(*bad).sentence
    assert "neither of the 2 defences is worth it; useless leaks least" in sentence
    assert "10.0 %" in sentence or "10 %" in sentence
    assert "60.0 %" in sentence or "60 %" in sentence
    open_ = run(tmp_path, "open", 0.3, saturated=False)
    assert "none of the 3 defences is shown to be worth it" in verdict_of(*bad, open_).sentence


def test_an_objection_does_not_save_what_costs_or_leaks_too_much(tmp_path):
    folders = [run(tmp_path, "a", 0.9, saturated=False), run(tmp_path, "b", 0.1, accuracy=0.6, saturated=False)]
    assert {worth for worth, _ in told(verdict_of(*folders)).values()} == {"not worth it"}


def test_few_people_prove_little(tmp_path):
    """Nothing passes of two people, of whom Wilson's interval says that up to .658 might."""
    folder = write_run(tmp_path / "a", type2=np.zeros(4, dtype=bool), accuracy=0.97)
    (one,) = verdict_of(folder).standings
    assert one.worth == ("not shown", "it may leave 64% of what leaks without it")
    assert one.left[2] == pytest.approx((0.6576 - 0.05) / 0.95, abs=1e-3)


def test_small_sets_are_ranked_by_a_figure_that_they_have(tmp_path):
    verdict = verdict_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", defense="blur", cosine=0.2))
    assert verdict.name == "type2_tar"
    assert verdict.standings[0].defense == "blur"
    linked = verdict_of(write_run(tmp_path / "c", attack="linkage", linkage=True))
    assert (linked.name, linked.standings[0].left[0]) == ("linkage", pytest.approx(0.3 / 0.45))


def test_each_rung_has_its_worst_case_and_its_verdict(tmp_path):
    shares = {"oracle": 0.9, "blackbox": 0.1, "whitebox": 0.5}
    folders = [run(tmp_path / rung, "a", share, knowledge=rung) for rung, share in shares.items()]
    setting = setting_of(*folders)
    assert [verdict.knowledge for verdict in verdicts(setting)] == ["blackbox", "whitebox", "oracle"]
    rows = worst_rows(setting)
    assert {rung: row.entries["type2_far_1e3"].number for (_, rung), row in rows.items()} == pytest.approx(
        {rung: 100 * share for rung, share in shares.items()}
    )
    (board,) = (
        path for path in write_leaderboard(tmp_path / "oracle", tmp_path / "out").files if path.suffix == ".csv"
    )
    lines = list(csv.DictReader(io.StringIO(board.read_text())))
    assert {line["knowledge"] for line in lines} == {"oracle"}
    assert {line["verdict"] for line in lines} == {"not worth it: leaves 89% of what leaks without it"}


# -- attempts ----------------------------------------------------------------------------------------


def test_killed_and_superseded_attempts_are_left_out_unless_asked_for(tmp_path, bench):
    runs = tmp_path / "runs"
    old = write_run(runs / "old", ssim=(0.9,) * 8)
    config = json.loads((old / "manifest.json").read_text())
    del config["config"]["queries"]  # a setting that came with a later version
    (old / "manifest.json").write_text(json.dumps(config))
    write_run(runs / "new", started="2026-01-02T00:00:00+00:00")
    write_run(runs / "other-options", options={"tables": "random"}, started="2026-01-03T00:00:00+00:00")
    write_run(runs / "failed-first", defense="blur", error="out of memory")
    write_run(runs / "then-done", defense="blur", started="2026-01-02T00:00:00+00:00")
    write_run(runs / "fails", defense="pixelate", error="it broke", started="2026-01-02T00:00:00+00:00")
    write_run(runs / "killed", defense="noise", killed=True)
    kept, killed, superseded = attempts(load_runs([runs]))
    names = [{run.directory.name for run in some} for some in (kept, killed, superseded)]
    assert names == [{"new", "other-options", "then-done", "fails"}, {"killed"}, {"old", "failed-first"}]
    page, md, *_ = (path.read_text() for path in write_leaderboard(runs, tmp_path / "out").files)
    for document in (page, md):
        assert "1 killed or not finished (killed)" in document
        assert "it broke" in document
        assert "out of memory" not in document
    code, out, _ = bench("leaderboard", runs, "--out", tmp_path / "all", "--all", "--json")
    assert code == 0
    assert "KeyboardInterrupt" in (tmp_path / "all" / "leaderboard.md").read_text()
    assert json.loads(out)["verdicts"]


def test_nothing_but_killed_runs_is_one_line(tmp_path):
    write_run(tmp_path / "runs" / "killed", killed=True)
    with pytest.raises(MissingError, match=r"no run has ended: 1 killed .*--all"):
        write_report([tmp_path / "runs"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the page ----------------------------------------------------------------------------------------


def test_a_page_opens_with_the_verdict_and_shows_each_defence_as_a_card(tmp_path):
    folders = [run(tmp_path, "low", 0.1), run(tmp_path, "high", 0.9), run(tmp_path, "none", 1.0)]
    (sentence,) = (verdict.sentence for verdict in verdicts(setting_of(*folders)))
    written = [write_report(folders, tmp_path / "out"), write_leaderboard(tmp_path, tmp_path / "out")]
    assert all(one.verdicts[0].endswith(f", {sentence}") for one in written)
    for page in (one.files[0].read_text() for one in written):
        main = page.partition("<main")[2]
        assert main.index(sentence) < main.index('class="warnings"') < main.index('class="ranking"')
        assert '<details class="warnings">' in main, "folded"
        places = [main.index(f"<h4>{name}</h4>") for name in ("low", "high", "none")]
        assert places == sorted(places)
        assert main.count('<ul class="strip">') == 3
        # From guessing at 5 % to unprotected faces at 100 %: of the bar, 10 % reach 5 points beyond the floor.
        assert '<span class="track" style="left:5.0%;width:95.0%">' in main
        assert '<span class="fill" style="left:5.0%;width:5.0%">' in main
