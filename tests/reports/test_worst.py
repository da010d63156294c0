"""The worst case of a defence: pointwise on the same victims, the largest otherwise."""

import pytest
from run_folders import VICTIMS, write_run

from bench.run.archive import load_runs
from reports.cells import settings, worst_case


def cells(*folders):
    (setting,) = settings(load_runs(folders))
    return setting.cells


def test_on_the_same_victims_the_worst_attack_counts_for_each(tmp_path):
    low, high = (0.2, 0.8) * (VICTIMS // 2), (0.9, 0.3) * (VICTIMS // 2)
    found = worst_case(
        cells(write_run(tmp_path / "a", ssim=low), write_run(tmp_path / "b", attack="linear", ssim=high)), "ssim"
    )
    assert found is not None
    assert found.measure.value == pytest.approx((0.9 + 0.8) / 2)
    # Two images of each person, so that every person has the same mean: resampling people changes nothing.
    assert found.measure.ci95 is None
    assert found.strongest.attack == "linear"


def test_the_attacks_of_one_run_count_as_those_of_several(tmp_path):
    low = (0.2, 0.8) * (VICTIMS // 2)
    both = cells(write_run(tmp_path / "a", attack="linear,unet", ssim=low))
    assert [cell.attack for cell in both] == ["linear", "unet"]
    worst = worst_case(both, "ssim")
    assert worst is not None
    assert worst.measure.value == pytest.approx(0.8)  # the second attack gets what the first does not
    alone = cells(write_run(tmp_path / "b", attack="linear,unet", error="it broke"))
    assert worst_case(alone, "ssim") is None


def test_other_seeds_are_other_victims(tmp_path):
    low, high = (0.2, 0.8) * (VICTIMS // 2), (0.9, 0.3) * (VICTIMS // 2)
    folders = write_run(tmp_path / "a", ssim=low), write_run(tmp_path / "b", attack="linear", ssim=high, seed=1)
    found = worst_case(cells(*folders), "ssim")
    assert found is not None
    assert found.measure.value == pytest.approx(0.6)


def test_linkage_is_not_known_of_each_victim(tmp_path):
    folders = write_run(tmp_path / "a"), write_run(tmp_path / "b", attack="linkage", linkage=True, saturated=False)
    found = worst_case(cells(*folders), "linkage")
    assert found is not None
    assert found.measure.value == 0.8
    assert found.strongest.attack == "linkage"
    assert found.strongest.unsaturated


def test_what_nobody_measured_has_no_worst_case(tmp_path):
    (only,) = cells(write_run(tmp_path / "a"))
    assert worst_case([only], "lpips") is None
    assert worst_case([only], "linkage") is None
