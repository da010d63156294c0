"""What may be compared, what it is called, and the worst case: pointwise on the same victims, else the largest."""

import json

import pytest
from run_folders import VICTIMS, write_run

from bench.run.archive import load_runs
from reports.cells import settings, worst_case


def grouped(*folders):
    return settings(load_runs(folders))


def test_only_comparable_runs_stand_together(tmp_path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", defense="blur"),
        write_run(tmp_path / "c", protocol="1"),
        write_run(tmp_path / "d", synthetic=False),
        write_run(tmp_path / "e", image_size=112),
    ]
    apart = grouped(*folders)
    names = [[cell.run.directory.name for cell in setting.cells] for setting in apart]
    assert names == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [setting.synthetic for setting in apart] == [True, True, False, True]
    assert len({setting.title for setting in apart}) == 4


def test_recognisers_that_were_brought_along_stand_apart(tmp_path):
    """Whose plain faces the same recogniser sees may be compared, whatever sees what the defences send."""
    brought = {
        "a": {},
        "b": {"recogniser": "/models/plain.pt"},
        "c": {"recogniser": "/models/frequencies.pt", "plain_recogniser": "/models/plain.pt"},
        "d": {"recogniser": "/models/frequencies.pt"},
    }
    for name, changes in brought.items():
        manifest = write_run(tmp_path / name) / "manifest.json"
        document = json.loads(manifest.read_text())
        document["config"] |= changes
        manifest.write_text(json.dumps(document))
    apart = grouped(*(tmp_path / name for name in brought))
    names = [[cell.run.directory.name for cell in setting.cells] for setting in apart]
    assert names == [["a"], ["b", "c"], ["d"]]
    assert [("plain.pt" in setting.title) for setting in apart] == [False, True, False]


def test_labels_hold_the_options_that_differ(tmp_path):
    folders = [
        write_run(tmp_path / "a", options={"tables": "official", "views": 3}),
        write_run(tmp_path / "b", options={"tables": "random", "views": 3}),
        write_run(tmp_path / "c", defense="blur"),
    ]
    (setting,) = grouped(*folders)
    assert list(setting.defenses) == ["partialface (tables=official)", "partialface (tables=random)", "blur"]


def test_a_failed_run_belongs_to_the_defence_it_was_asked_for(tmp_path):
    folders = [
        write_run(tmp_path / "a", options={"tables": "random"}),
        write_run(tmp_path / "b", options={"tables": "random"}, attack="linear", error="it broke"),
    ]
    (setting,) = grouped(*folders)
    assert {name: len(cells) for name, cells in setting.defenses.items()} == {"partialface": 2}
    assert [cell.attack for cell, _ in setting.measured] == ["unet"]


# -- the worst case ----------------------------------------------------------------------------------


def cells(*folders):
    (setting,) = grouped(*folders)
    return setting.cells


def test_on_the_same_victims_the_worst_attack_counts_for_each(tmp_path):
    low, high = (0.2, 0.8) * (VICTIMS // 2), (0.9, 0.3) * (VICTIMS // 2)
    worst = worst_case(
        cells(write_run(tmp_path / "a", ssim=low), write_run(tmp_path / "b", attack="linear", ssim=high)), "ssim"
    )
    assert worst is not None
    assert worst.measure.value == pytest.approx((0.9 + 0.8) / 2)
    # Two images of each person, so that every person has the same mean: resampling people changes nothing.
    assert worst.measure.ci95 is None
    assert worst.strongest.attack == "linear"


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
    worst = worst_case(cells(*folders), "ssim")
    assert worst is not None
    assert worst.measure.value == pytest.approx(0.6)


def test_linkage_is_not_known_of_each_victim(tmp_path):
    folders = write_run(tmp_path / "a"), write_run(tmp_path / "b", attack="linkage", linkage=True, saturated=False)
    worst = worst_case(cells(*folders), "linkage")
    assert worst is not None
    assert worst.measure.value == 0.8
    assert worst.strongest.attack == "linkage"
    assert worst.strongest.unsaturated


def test_what_nobody_measured_has_no_worst_case(tmp_path):
    (only,) = cells(write_run(tmp_path / "a"))
    assert worst_case([only], "lpips") is None
    assert worst_case([only], "linkage") is None
