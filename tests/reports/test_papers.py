"""Tables of papers filled from runs: what was printed, what was measured, the difference, and why a row is empty."""

import csv
import io
import json
import re

import pytest
from run_folders import inversion, template_protection, write_run

from bench.run.archive import load_runs
from reports.cells import settings
from reports.formats import table_csv
from reports.papers import filled
from reports.published import paper_tables


def table_of(name, *folders):
    (table,) = filled(paper_tables()[name], settings(load_runs(folders)))
    return table


def rows_of(table, defense):
    """What it has of a defence: row -> text of each column."""
    return {
        row.entries["of"].text: [row[column].text for column in table.columns[2:]]
        for row in table.rows
        if row.entries["defence"].text.startswith(defense)
    }


def why_not(table, defense):
    (row,) = (r for r in table.rows if (r.entries["defence"].text, r.entries["of"].text) == (defense, "measured"))
    return row.entries["of"].note


# As printed: Mi et al., ICCV 2023, tables 1 and 2; Mi et al., CVPR 2024, tables 1 and 2.
@pytest.mark.parametrize(
    ("name", "defense", "printed"),
    [
        ("paper-partialface", "partialface", "99.80 97.63 97.79 92.03 96.07 93.64 94.93"),
        ("paper-partialface", "ppfr-fd", "99.68 95.04 97.37 90.78 95.72 – 94.10"),
        ("paper-partialface", "peep", "98.41 74.47 87.47 79.58 90.06 5.82 6.02"),
        ("paper-partialface-recovery", "duetface", "0.866 19.88 96.52"),
        ("paper-minusface", "minusface", "99.78 96.92 97.57 91.90 95.90 93.37 94.70"),
        ("paper-minusface-recovery", "partialface", "0.59 13.23"),
    ],
)
def test_what_was_printed(name, defense, printed):
    assert rows_of(table_of(name), defense)["published"] == printed.split()


def test_every_row_and_every_column_has_something_printed():
    for paper in paper_tables().values():
        assert paper.id.startswith("paper-")
        values = {defense: [paper.value(defense, column) for column in paper.columns] for defense in paper.rows}
        assert all(any(value is not None for value in row) for row in values.values()), paper.id
        assert all(any(value is not None for value in column) for column in zip(*values.values(), strict=True)), (
            paper.id
        )


def test_recognition_is_filled_pack_by_pack_and_subtracted(tmp_path):
    packs = {"lfw": (0.95, 0.97), "cfp_fp": (0.81, 0.96)}
    table = table_of("paper-partialface", write_run(tmp_path / "a", protocols=packs))
    rows = rows_of(table, "partialface")
    assert [rows["measured"][:2], rows["difference"][:2]] == [["95.0", "81.0"], ["-4.8", "-16.6"]]
    assert set(rows["measured"][2:]) == set(rows["difference"][2:]) == {"–"}
    assert why_not(table, "peep") == "no run"
    assert why_not(table, "cpgan") == "not in this suite"


def test_the_pack_of_the_victims_counts_and_other_victims_do_not(tmp_path):
    folder = write_run(tmp_path / "a", accuracy=0.9)
    assert why_not(table_of("paper-partialface", folder), "partialface") == "no run with recognition on these packs"
    result = json.loads((folder / "metrics.json").read_text())
    result["dataset"]["details"]["pack"] = "lfw.bin"
    (folder / "metrics.json").write_text(json.dumps(result))
    assert rows_of(table_of("paper-partialface", folder), "partialface")["measured"][0] == "90.0"


def test_seeds_are_averaged(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed, ssim=(value,) * 8) for seed, value in enumerate((0.6, 0.8))]
    rows = rows_of(table_of("paper-partialface-recovery", *folders), "partialface")
    assert (rows["measured"][0], rows["difference"][0]) == ("0.7", "+0.109")
    assert "worst case" not in rows


def test_another_attack_is_a_worst_case_and_no_measurement_of_the_paper_s(tmp_path):
    folder = write_run(tmp_path / "a", attack="linear", ssim=(0.9,) * 8)
    table = table_of("paper-partialface-recovery", folder)
    assert why_not(table, "partialface") == "no run by unet at whitebox"
    assert rows_of(table, "partialface")["worst case"][0] == "0.900"
    both = table_of("paper-partialface-recovery", folder, write_run(tmp_path / "b"))
    rows = rows_of(both, "partialface")
    assert [rows[name][0] for name in ("measured", "difference", "worst case")] == ["0.700", "+0.109", "0.900"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"options": {"tables": "random"}}, "no run of its defaults, 1 with other options"),
        ({"knowledge": "oracle"}, "no run by unet at whitebox"),
        ({"error": "out of memory"}, "no run by unet at whitebox"),
        ({"defense": "peep"}, "no run"),
    ],
)
def test_a_row_without_a_run_says_so(tmp_path, options, reason):
    paper, runs = (
        paper_tables()["paper-partialface-recovery"],
        settings(load_runs([write_run(tmp_path / "a", **options)])),
    )
    (table,) = filled(paper, runs)
    assert why_not(table, "partialface") == reason
    assert "difference" not in rows_of(table, "partialface")


def test_templates(tmp_path):
    made = {"attack": "template", "knowledge": "oracle", "template": template_protection(), "inversion": inversion(0.6)}
    rows = rows_of(table_of("paper-fem", write_run(tmp_path / "a", defense="mlp-hash", **made)), "mlp-hash")
    assert (rows["published"], rows["measured"], rows["difference"]) == (["82.1"], ["60.0"], ["-22.1"])


def test_runs_that_do_not_compare_make_tables_of_their_own(tmp_path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", image_size=112),
        write_run(tmp_path / "c", defense="x"),
    ]
    tables = filled(paper_tables()["paper-partialface-recovery"], settings(load_runs(folders)))
    assert [re.search(r"\d+ px, protocol", table.caption)[0] for table in tables] == [
        "64 px, protocol",
        "112 px, protocol",
    ]
    assert all("synthetic faces" in table.caption for table in tables)


def test_csv_has_numbers(tmp_path):
    table = table_of("paper-partialface-recovery", write_run(tmp_path / "a"))
    lines = list(csv.DictReader(io.StringIO(table_csv([table]))))
    published, measured, difference = (line for line in lines if line["defence"] == "partialface")
    assert float(measured["SSIM"]) - float(published["SSIM"]) == pytest.approx(float(difference["SSIM"]))
    assert (float(measured["SSIM low"]), float(measured["SSIM high"])) == (0.69, 0.71)


# -- the command -------------------------------------------------------------------------------------


def test_the_command(bench, tmp_path):
    folder = write_run(tmp_path / "a")
    code, out, _ = bench("table", "--list", "--json")
    assert code == 0
    assert {"paper-partialface", "paper-minusface"} <= {row["table"] for row in json.loads(out)}
    code, out, _ = bench("table", "paper-partialface-recovery", folder)
    assert code == 0
    lines = out.splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("partialface"))
    assert "0.591" in lines[place]
    assert "0.700" in lines[place + 1]
    assert "+0.109" in lines[place + 2]
    code, out, _ = bench("table", "paper-partialface-recovery", folder, "--json")
    (document,) = json.loads(out)
    assert next(row for row in document["rows"] if row["of"] == "difference")["ssim"] == pytest.approx(0.109)
    assert bench("table", "paper-partialface", "--format", "latex")[1].count(r"\begin{tabular}") == 1
    code, out, _ = bench("table", "paper-partialface", folder, "--format", "html", "--out", tmp_path / "t.html")
    assert (code, out.strip()) == (0, str(tmp_path / "t.html"))
    assert "<caption>" in (tmp_path / "t.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "which table?"),
        (["paper-partialfaces"], "did you mean 'paper-partialface'"),
        (["paper-partialface", "--out", "x.txt"], "--out needs --format"),
    ],
)
def test_a_wrong_call_is_one_line(bench, tmp_path, arguments, line):
    code, out, err = bench("table", *arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.splitlines()) == 1
