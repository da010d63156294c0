"""The baseline file: what is in it, what survives an edit, and what is refused."""

import json
from importlib.resources import files

import pytest
from gate_world import IMAGES, PEOPLE, make_run

from bench.errors import DataError, MissingError, UsageError
from bench.gate.baseline import Baseline, make_baseline, read_baseline, write_baseline
from bench.gate.scores import FIGURES
from bench.run.archive import load_run, load_runs


@pytest.fixture
def stored(baseline, tmp_path):
    path = tmp_path / "baseline.json"
    write_baseline(baseline, path)
    return path


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_round_trip(baseline, stored):
    assert read_baseline(stored) == baseline


def test_expected_values_are_means_over_the_runs(baseline, seeds):
    [cell] = baseline.cells
    assert len(cell.runs) == len(seeds)
    values = [load_run(seed).result.recovery.ssim.value for seed in seeds]
    assert cell.figures["recovery.ssim"].value == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert cell.figures["recovery.ssim"].margin > cell.figures["recovery.ssim"].tolerance


def test_scores_are_kept_by_person_without_names(baseline, stored):
    [cell] = baseline.cells
    for run in cell.runs:
        assert len(run.people) == PEOPLE
        assert run.figures["recovery.ssim"].counts == [IMAGES] * PEOPLE
        assert len(run.figures["recovery.ssim"].sha256) == 64
    assert "person-0" not in stored.read_text()
    # Other seeds show other people of the same names.
    assert not set(cell.runs[0].people) & set(cell.runs[1].people)


def test_lists_of_scores_take_one_line(stored):
    longest = max(stored.read_text().splitlines(), key=len)
    assert longest.count(",") >= PEOPLE - 1
    assert len(stored.read_text().splitlines()) < 600


def test_tolerances_may_be_edited(stored):
    edit(stored, lambda d: d["cells"][0]["figures"]["recovery.ssim"].update(absolute=0.5, relative=0.1))
    ssim = read_baseline(stored).cells[0].figures["recovery.ssim"]
    assert ssim.tolerance == pytest.approx(0.5 + 0.1 * ssim.value)
    assert ssim.excluded == ssim.tolerance


def test_edited_tolerances_survive_a_new_baseline(stored, seeds):
    edit(stored, lambda d: d["cells"][0]["figures"]["recovery.ssim"].update(absolute=0.5))
    edit(stored, lambda d: d.update(alpha=0.01))
    again = make_baseline(load_runs(seeds[:2]), read_baseline(stored))
    assert again.cells[0].figures["recovery.ssim"].absolute == 0.5
    assert again.alpha == 0.01


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda d: d.update(sigma=1), "sigma: Extra inputs are not permitted"),
        (lambda d: d.update(cells=[]), "cells: List should have at least 1 item"),
        (lambda d: d["cells"].append(d["cells"][0]), r"the cell partialface / unet .* is there twice"),
        (
            lambda d: d["cells"][0]["figures"]["recovery.ssim"].update(absolute=-1),
            r"absolute: .*greater",
        ),
        (lambda d: d["cells"][0]["figures"]["recovery.ssim"].update(value=0.1), "is not the mean of its runs"),
        (lambda d: d["cells"][0]["runs"][0]["figures"]["recovery.ssim"].update(value=0.1), "it was edited by hand"),
        (lambda d: d["cells"][0]["runs"][0]["figures"]["recovery.ssim"]["means"].pop(), "means and counts must match"),
        (lambda d: d["cells"][0]["runs"][0]["people"].pop(), "has 12 people, the run 11"),
        (lambda d: d["cells"][0]["runs"][0].update(people=["a"] * PEOPLE), "a person is listed twice"),
        (lambda d: d["cells"][0]["runs"][0]["figures"].pop("recovery.ssim"), "has no scores of it"),
        (lambda d: d["cells"][0]["runs"][0]["figures"]["recovery.ssim"].update(se=0.1), "either means with counts or"),
    ],
)
def test_a_damaged_baseline_is_one_clear_line(stored, change, line):
    edit(stored, change)
    with pytest.raises(DataError, match=line) as caught:
        read_baseline(stored)
    assert str(caught.value).startswith(f"baseline {stored} cannot be used: ")
    assert "\n" not in str(caught.value)


def test_half_a_file_and_no_file(stored, tmp_path):
    stored.write_text(stored.read_text()[:500])
    with pytest.raises(DataError, match="cannot be used: document: Invalid JSON"):
        read_baseline(stored)
    with pytest.raises(MissingError, match="does not exist: make one with `bench baseline RUN"):
        read_baseline(tmp_path / "none.json")


def test_a_baseline_of_a_failed_run_is_refused(tmp_path):
    run = load_run(make_run(tmp_path / "run", status="error"))
    with pytest.raises(UsageError, match=r"failed \(disk full\): a baseline needs runs that succeeded"):
        make_baseline([run])


def test_a_baseline_of_version_1_is_read(baseline, stored):
    def age(document):
        document["schema"] = "1"
        for figure in document["cells"][0]["figures"].values():
            del figure["direction"]
            figure["higher_is_better_for"] = "utility"

    edit(stored, age)
    assert read_baseline(stored) == baseline
    edit(stored, lambda document: document["cells"][0].pop("figures"))
    with pytest.raises(DataError, match="not a baseline of schema 1 either"):
        read_baseline(stored)


def test_the_same_run_twice_is_refused(seeds):
    with pytest.raises(UsageError, match="two runs of seed 0 are one and the same"):
        make_baseline([load_run(seeds[0]), load_run(seeds[0])])


def test_another_protocol_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is of protocol version 0, not 2"):
        make_baseline([load_run(make_run(tmp_path / "run", protocol="0"))])


def test_runs_that_differ_in_more_than_the_seed_are_other_cells(tmp_path):
    made = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", seed=1),
        make_run(tmp_path / "c", options={"sigma": "1"}),
        make_run(tmp_path / "d", training={"epochs": 5}),
        make_run(tmp_path / "e", defense="none"),
    ]
    cells = make_baseline(load_runs(made)).cells
    assert [len(cell.runs) for cell in cells] == [2, 1, 1, 1]
    assert cells[1].key.label == "partialface[sigma=1] / unet (whitebox, synthetic, quick, 64 px)"
    assert cells[0].key.differences(cells[2].key) == ["training.epochs 4 -> 5"]


def test_options_of_flags_and_of_files_are_the_same(tmp_path):
    made = [make_run(tmp_path / "a", options={"sigma": "1"}), make_run(tmp_path / "b", seed=1, options={"sigma": 1})]
    assert len(make_baseline(load_runs(made)).cells) == 1


def test_runs_of_one_seed_tell_what_training_anew_changes(tmp_path):
    made = [make_run(tmp_path / str(k), retrained=k, shift={"ssim": 0.02 * k}) for k in range(6)]
    several = make_baseline(load_runs(made)).cells[0].figures["recovery.ssim"]
    alone = make_baseline(load_runs(made[:1])).cells[0].figures["recovery.ssim"]
    assert alone.repeat_sd == FIGURES["recovery.ssim"].guard.repeat_sd
    assert several.repeat_sd > 4 * alone.repeat_sd
    assert several.repeat_df == alone.repeat_df + 5
    assert several.seed_sd == alone.seed_sd


def test_the_shipped_schema_is_the_models():
    """Regenerate with ``python -m bench.gate.baseline`` when the models change on purpose."""
    shipped = json.loads(files("bench").joinpath("schema", "baseline-2.json").read_text())
    assert shipped == Baseline.model_json_schema(by_alias=True)
