"""``bench compare``: what differs between two runs."""

import pytest
from gate_world import make_run

from bench.errors import UsageError
from bench.gate.compare import compare
from bench.run.archive import load_run


def compared(tmp_path, first, second):
    return compare(load_run(make_run(tmp_path / "a", **first)), load_run(make_run(tmp_path / "b", **second)))


def test_settings_and_figures(tmp_path):
    difference = compared(tmp_path, {}, {"retrained": 1, "shift": {"ssim": 0.1}, "options": {"subset": "0"}})
    assert [(s.kind, s.name, s.first, s.second) for s in difference.settings] == [
        ("asked", "defense_options.subset", None, "0")
    ]
    figures = {figure.figure: figure for figure in difference.figures}
    ssim = figures["recovery.ssim"]
    assert ssim.victims == "same victims"
    assert ssim.change == pytest.approx(0.1, abs=0.01)
    assert 0.05 < ssim.ci95[0] <= ssim.change <= ssim.ci95[1] < 0.15
    assert figures["utility.accuracy"].victims == "identical"
    assert "recovery.lpips" not in figures


def test_other_victims_give_wider_intervals(tmp_path):
    paired = compared(tmp_path / "p", {}, {"retrained": 1})
    unpaired = compared(tmp_path / "u", {}, {"seed": 7})
    width = []
    for difference in (paired, unpaired):
        [ssim] = [figure for figure in difference.figures if figure.figure == "recovery.ssim"]
        width.append(ssim.ci95[1] - ssim.ci95[0])
    assert width[1] > 5 * width[0]


def test_a_figure_of_one_run_only_has_no_change(tmp_path):
    difference = compared(tmp_path, {}, {"attack": "linkage", "linkage": 0.7})
    figures = {figure.figure: figure for figure in difference.figures}
    assert figures["linkage.rank1"].first is None
    assert figures["linkage.rank1"].change is None
    assert figures["recovery.ssim"].second is None


def test_several_attacks_are_compared_one_by_one(tmp_path):
    difference = compared(tmp_path, {"attack": "linear,unet"}, {"attack": "unet,template", "shift": {"ssim": 0.1}})
    figures = {figure.figure: figure for figure in difference.figures}
    assert figures["attacks.unet.recovery.ssim"].change == pytest.approx(0.1)
    assert figures["attacks.linear.recovery.ssim"].second is figures["attacks.template.recovery.ssim"].first is None
    assert [name for name in figures if name.endswith("utility.accuracy")] == ["utility.accuracy"]
    alone = compared(tmp_path / "alone", {"attack": "linear,unet"}, {"attack": "template"})
    [accuracy] = [figure for figure in alone.figures if figure.figure == "utility.accuracy"]
    assert accuracy.change == 0


def test_failed_runs_and_other_protocols_are_refused(tmp_path):
    good, bad = load_run(make_run(tmp_path / "a")), load_run(make_run(tmp_path / "b", status="error"))
    with pytest.raises(UsageError, match=r"failed \(disk full\): it has no figures to compare"):
        compare(good, bad)
    with pytest.raises(UsageError, match="of protocol version 0, not 2"):
        compare(good, load_run(make_run(tmp_path / "c", protocol="0")))
