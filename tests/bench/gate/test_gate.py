"""Runs against a baseline: what passes, what regresses, what broke, and what cannot be compared."""

import json

import pytest
from gate_world import make_run

from bench.errors import DataError, UsageError
from bench.gate.baseline import make_baseline
from bench.gate.gate import gate
from bench.results import NO_BETTER
from bench.run.archive import load_run, load_runs


def figures(verdict):
    return {figure.figure: figure for figure in verdict.figures}


def test_the_very_same_run_passes(baseline, seeds):
    report = gate(baseline, load_runs(seeds), name="b.json")
    assert (report.outcome, report.exit_code) == ("pass", 0)
    assert len(report.cells) == len(seeds)
    for verdict in report.cells:
        assert {figure.victims for figure in verdict.figures} <= {"identical", "same victims"}
        assert figures(verdict)["recovery.ssim"].change == 0


def test_training_anew_passes_paired(judged):
    verdict = judged(seed=2, retrained=1)
    ssim = figures(verdict)["recovery.ssim"]
    assert verdict.outcome == "pass"
    assert ssim.victims == "same victims"
    assert ssim.change != 0


@pytest.mark.parametrize("seed", range(10, 30))
def test_twenty_other_seeds_pass(judged, seed):
    verdict = judged(seed=seed)
    assert verdict.outcome == "pass", verdict
    assert figures(verdict)["recovery.ssim"].victims == "other victims"


def test_more_leakage_regresses(judged):
    verdict = judged(seed=1, retrained=1, shift={"ssim": 0.1})
    ssim = figures(verdict)["recovery.ssim"]
    assert ssim.change == pytest.approx(0.1, abs=0.01)
    assert ssim.ci95[0] > ssim.tolerance


@pytest.mark.parametrize(
    ("harm", "figure"),
    [
        ({"seed": 1, "shift": {"ssim": 0.1}}, "recovery.ssim"),
        ({"entropy": 2.58}, "defense.entropy_bits"),  # even where the attack does not care
        ({"accuracy": 0.3}, "utility.accuracy"),
    ],
)
def test_what_is_harmed_regresses_and_nothing_else(judged, harm, figure):
    verdict = judged(retrained=1, **harm)
    assert verdict.outcome == "regress"
    assert {name: f.outcome for name, f in figures(verdict).items() if f.outcome != "pass"} == {figure: "regress"}


def test_more_leakage_regresses_on_other_victims_too(judged):
    assert judged(seed=40, shift={"ssim": 0.2, "psnr_aligned": 8.0}).outcome == "regress"


def test_pairing_finds_what_other_victims_would_hide(judged):
    """The same harm, on the same victims and on others."""
    harm = {"ssim": 0.06}
    assert judged(seed=3, retrained=1, shift=harm).outcome == "regress"
    assert judged(seed=41, shift=harm).outcome != "regress"


def test_less_leakage_is_a_notice(judged):
    verdict = judged(seed=0, retrained=1, shift={"ssim": -0.2})
    assert verdict.outcome == "pass"
    assert figures(verdict)["recovery.ssim"].improved
    assert any(note.startswith("better than the baseline: recovery.ssim") for note in verdict.notes)


def test_an_attack_no_better_than_a_floor_does_not_pass_whatever_its_figures(judged):
    verdict = judged(retrained=1, above_floor=False, warnings=[f"{NO_BETTER} (SSIM -0.1)"])
    assert {figure.outcome for figure in verdict.figures} == {"pass"}
    assert verdict.outcome == "inconclusive"
    assert any(NO_BETTER in note for note in verdict.notes)


def test_a_fallen_canary_is_a_broken_attack_not_better_privacy(judged):
    verdict = judged(seed=0, retrained=1, shift={"ssim": -0.2}, ceiling_shift={"ssim": -0.4})
    assert verdict.outcome == "broken attack"
    assert any("broken attack: it gets less out of unprotected faces" in note for note in verdict.notes)
    assert not any("better than" in note for note in verdict.notes)


@pytest.mark.parametrize("gain", [{"ceiling_shift": {"ssim": 0.02}}, {"accuracy": 0.95}])
def test_a_canary_or_utility_that_rises_is_no_news(judged, gain):
    assert judged(retrained=1, **gain).outcome == "pass"


def test_a_figure_that_is_no_longer_measured_is_undecided(baseline, seeds, tmp_path):
    directory = make_run(tmp_path / "run", seed=0, retrained=1)
    document = json.loads((directory / "metrics.json").read_text())
    document["recovery"]["identity"]["cosine"].update(value=None, ci95=None, reason="no evaluator")
    (directory / "metrics.json").write_text(json.dumps(document))
    report = gate(baseline, [load_run(directory)], name="b")
    assert (report.outcome, report.exit_code) == ("inconclusive", 4)
    cosine = figures(report.cells[0])["recovery.identity.cosine"]
    assert cosine.note == "not measured: no evaluator"


def test_large_but_unproven_is_inconclusive(baseline, tmp_path):
    """Without a margin, as many victims as these cannot show that nothing changed."""
    [cell] = baseline.cells
    strict = {name: figure.model_copy(update={"margin": 0.0}) for name, figure in cell.figures.items()}
    run = load_run(make_run(tmp_path / "run", seed=50))
    report = gate(baseline.model_copy(update={"cells": [cell.model_copy(update={"figures": strict})]}), [run], name="b")
    assert report.outcome == "inconclusive"


def test_a_missing_cell_fails_and_says_what_was_there_instead(baseline, tmp_path):
    run = load_run(make_run(tmp_path / "run", options={"subset": "0"}, queries=2))
    report = gate(baseline, [run], name="b")
    assert (report.outcome, report.exit_code) == ("missing", 1)
    assert "-o subset default -> 0" in report.cells[0].notes[1]
    assert len(report.extra) == 1
    assert "partialface[subset=0]" in report.extra[0]


def test_another_attack_is_an_extra_run_and_does_no_harm(baseline, seeds, tmp_path):
    other = make_run(tmp_path / "run", attack="linear")
    report = gate(baseline, load_runs([*seeds, other]), name="b")
    assert report.outcome == "pass"
    assert len(report.extra) == 1


def test_a_variant_is_held_against_its_names(judged):
    verdict = judged(ignore_options=True, seed=0, retrained=1, options={"subset": "0"}, shift={"ssim": 0.1})
    assert verdict.outcome == "regress"


def test_options_are_ignored_only_where_one_cell_is_meant(tmp_path):
    runs = [make_run(tmp_path / str(k), options={"sigma": str(k)}) for k in range(2)]
    baseline = make_baseline(load_runs(runs))
    other = load_run(make_run(tmp_path / "other", options={"sigma": "7"}))
    with pytest.raises(UsageError, match="could be held against 2 cells"):
        gate(baseline, [other], name="b", ignore_options=True)


def test_a_changed_default_is_judged_and_told(judged):
    verdict = judged(seed=0, retrained=1, resolved={"subset": 0})
    assert "options are not those of the baseline: -o subset null -> 0" in verdict.notes


def test_a_new_setting_of_the_suite_does_not_lose_the_cell(judged):
    verdict = judged(seed=0, retrained=1, a_new_setting=3)
    assert verdict.outcome == "pass"
    assert any("a_new_setting" in note for note in verdict.notes)


@pytest.mark.parametrize("ignore_options", [False, True])
def test_a_failed_run_fails(judged, ignore_options):
    options = {"images": "1"} if ignore_options else {}
    verdict = judged(status="error", ignore_options=ignore_options, attack_options=options)
    assert verdict.outcome == "failed"
    assert verdict.notes == ["the run failed: disk full"]


def test_another_protocol_is_refused(baseline, tmp_path):
    run = load_run(make_run(tmp_path / "run", protocol="0"))
    with pytest.raises(UsageError, match=r"is of protocol version 0, not 2: their figures cannot be\s+compared"):
        gate(baseline, [run], name="b")


def test_raw_values_must_be_those_of_the_figures(baseline, tmp_path):
    directory = make_run(tmp_path / "run")
    document = json.loads((directory / "metrics.json").read_text())
    document["recovery"]["ssim"]["value"] = 0.1
    (directory / "metrics.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"recovery\.ssim is 0\.1 in metrics\.json .* one of them was altered"):
        gate(baseline, [load_run(directory)], name="b")


def test_a_manifest_without_a_cell_is_one_clear_line(baseline, tmp_path):
    directory = make_run(tmp_path / "run", preset=None)
    with pytest.raises(DataError, match=r"manifest\.json does not say what was run: preset"):
        gate(baseline, [load_run(directory)], name="b")


def test_linkage_is_guarded_by_its_summary(tmp_path):
    baseline = make_baseline(load_runs([make_run(tmp_path / "base", attack="linkage", linkage=0.6)]))

    def outcome(**made):
        run = load_run(make_run(tmp_path / str(made), attack="linkage", **made))
        return gate(baseline, [run], name="b").outcome

    assert outcome(linkage=0.61) == "pass"
    assert outcome(linkage=0.97) == "regress"


def test_each_of_several_attacks_is_of_its_own_cell(baseline, tmp_path):
    """As if it had been run alone; options for another one do not matter to it."""
    options = {"linear": {"rank": "9"}}
    run = load_run(make_run(tmp_path / "run", attack="linear,unet", retrained=1, attack_options=options))
    report = gate(baseline, [run], name="b")
    assert [(verdict.cell, verdict.outcome) for verdict in report.cells] == [(baseline.cells[0].key.label, "pass")]
    alone = load_run(make_run(tmp_path / "alone", retrained=1))
    assert report.cells[0].figures == gate(baseline, [alone], name="b").cells[0].figures
    [extra] = report.extra
    assert extra.startswith("partialface / linear[rank=9] (whitebox")
    both = make_baseline([run])
    assert [cell.key.attack for cell in both.cells] == ["linear", "unet"]
    worse = load_run(
        make_run(tmp_path / "worse", attack="linear,unet", seed=0, attack_options=options, shift={"ssim": 0.2})
    )
    assert [verdict.outcome for verdict in gate(both, [worse], name="b").cells] == ["regress", "regress"]
    failed = load_run(make_run(tmp_path / "failed", attack="linear,unet", attack_options=options, status="error"))
    assert [verdict.outcome for verdict in gate(both, [failed], name="b").cells] == ["failed", "failed"]


def test_blind_figures_are_named(seeds, tmp_path):
    """One run alone leaves so much open that half of all acceptances could be lost unseen."""
    alone = make_baseline(load_runs(seeds[:1]))
    [verdict] = gate(alone, [load_run(make_run(tmp_path / "run", seed=60))], name="b").cells
    blind = {name: figure for name, figure in figures(verdict).items() if figure.blind}
    assert "recovery.identity.type1_tar" in blind
    assert all(figure.detectable > 0.3 for figure in blind.values())
    [note] = [note for note in verdict.notes if note.startswith("blind: ")]
    assert all(name in note for name in blind)


def test_a_seed_of_the_baseline_has_a_narrower_margin(seeds, baseline, tmp_path):
    """Its victims are the same, and only what training anew changes is left open."""
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed, retrained=1) for seed in (0, 60)]
    own, other = (gate(baseline, [load_run(run)], name="b").cells[0] for run in runs)
    assert (own.outcome, other.outcome) == ("pass", "pass")
    name = "recovery.identity.type1_tar"
    expected = baseline.cells[0].figures[name]
    assert figures(own)[name].margin == expected.paired_margin < expected.margin == figures(other)[name].margin
