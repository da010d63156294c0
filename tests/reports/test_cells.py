"""What may be compared, and what it is called."""

from run_folders import write_run

from bench.run.archive import load_runs
from reports.cells import settings


def grouped(*folders):
    return settings(load_runs(folders))


def test_only_comparable_runs_stand_together(tmp_path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", defense="blur"),
        write_run(tmp_path / "c", protocol="2"),
        write_run(tmp_path / "d", synthetic=False),
        write_run(tmp_path / "e", image_size=112),
    ]
    found = grouped(*folders)
    names = [[cell.run.directory.name for cell in setting.cells] for setting in found]
    assert names == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [setting.synthetic for setting in found] == [True, True, False, True]
    assert len({setting.title for setting in found}) == 4


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
