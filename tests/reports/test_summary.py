"""The summary: every run has its row, failed ones too; floors, ceilings and published figures stand beside them."""

import numpy as np
import pandas as pd
import pytest
from run_folders import inversion, template_protection, write_run

from bench.results import NO_BETTER
from bench.run.archive import load_runs
from reports.cells import settings, worst_floor
from reports.formats import report_csv, report_markdown
from reports.provenance import warnings
from reports.published import matching, published
from reports.report import write_leaderboard
from reports.summary import (
    across_table,
    facts,
    identification_table,
    protocol_table,
    summary,
    template_table,
    worst_rows,
)


def setting_of(*folders):
    (setting,) = settings(load_runs(folders))
    return setting


def by_heading(table, row):
    return {column.heading: row[column] for column in table.columns}


def best_rows(setting):
    """The worst cases by defence, of a setting of one rung."""
    return {defense: row for (defense, _), row in worst_rows(setting).items()}


def test_rows(tmp_path):
    setting = setting_of(
        write_run(tmp_path / "a"), write_run(tmp_path / "b", attack="linkage", linkage=True),
        write_run(tmp_path / "c", attack="linear", error="out of memory"),
    )  # fmt: skip
    table = summary(setting, 1)
    kinds = [row.kind for row in table.rows]
    assert kinds[:4] == ["worst", "measured", "measured", "failed"]
    assert kinds[4:] == ["published"] * (len(kinds) - 4)
    worst, unet, linkage, failed = (by_heading(table, row) for row in table.rows[:4])
    assert worst["attack"].note == "over 2 attack runs; incomplete: 1 failed"
    assert (worst["SSIM"].text, worst["SSIM"].note) == ("0.700", "unet; floor 0.400")
    assert (worst["linkage, %"].text, worst["linkage, %"].note) == ("80.0", "linkage; floor 50.0")
    assert (unet["SSIM"].note, unet["accuracy, %"].note) == ("ceiling 0.990", "unprotected 97.0")
    assert linkage["linkage, %"].note == "ceiling 95.0"
    assert linkage["SSIM"].number is None
    assert "failed" in failed["attack"].note
    assert all(entry.number is None for entry in failed.values())
    floors = [by_heading(table, row) for row in table.foot]
    assert [floor["defence"].text for floor in floors] == ["floor: mean face", "floor: noise", "floor: guessing"]
    assert floors[0]["SSIM"].text == "0.400"
    assert floors[2]["linkage, %"].text == "50.0"
    assert "synthetic faces" in table.caption


def test_protocols_have_a_column_each(tmp_path):
    packs = {"cfp_fp": (0.81, 0.96), "agedb_30": (0.72, 0.95)}
    setting = setting_of(
        write_run(tmp_path / "a", protocols=packs),
        write_run(tmp_path / "b", defense="blur", protocols={"cfp_fp": (0.6, 0.96)}),
        write_run(tmp_path / "c", defense="pixelate"),
    )
    table = protocol_table(setting, 1)
    assert [column.heading for column in table.columns] == ["run", "of", "victims, %", "cfp_fp, %", "agedb_30, %"]
    rows = [[row[column].text for column in table.columns[1:]] for row in table.rows]
    assert rows == [
        ["protected", "90.0", "81.0", "72.0"],
        ["unprotected", "97.0", "96.0", "95.0"],
        ["protected", "90.0", "60.0", "–"],
        ["unprotected", "97.0", "96.0", "–"],
    ]
    assert table.rows[0][table.columns[3]].note == "TAR@FAR 1e-2: 40.5"
    assert protocol_table(setting_of(write_run(tmp_path / "d")), 1) is None
    assert ",utility.protocols.agedb_30.protected.accuracy,0.72," in report_csv([setting])


def test_templates_and_galleries_stand_in_a_table(tmp_path):
    setting = setting_of(write_run(tmp_path / "a", galleries=True), write_run(tmp_path / "b", defense="blur"))
    table = identification_table(setting, 1)
    assert [column.heading for column in table.columns] == [
        "run", "of", "benchmark", "TAR@FAR 1e-4, %", "rank-1, %", "TPIR@FPIR 1e-1, %",
    ]  # fmt: skip
    assert [[row[column].text for column in table.columns[1:]] for row in table.rows] == [
        ["protected", "ijbc", "80.0", "70.0", "60.0"],
        ["unprotected", "ijbc", "95.0", "85.0", "75.0"],
        ["protected", "victims among 100 of folder", "–", "50.0", "40.0"],
        ["unprotected", "victims among 100 of folder", "–", "90.0", "80.0"],
    ]
    assert table.rows[2][table.columns[4]].note == "among 10: 60.0; 100: 50.0"
    assert identification_table(setting_of(write_run(tmp_path / "c")), 1) is None
    assert "| ijbc |" in report_markdown([setting])


def test_published_figures_are_matched_by_name(tmp_path):
    table = summary(setting_of(write_run(tmp_path / "a")), 1)
    printed = [by_heading(table, row) for row in table.rows if row.kind == "published"]
    assert {"ICCV 2023", "CVPR 2024", "NeurIPS 2025"} == {row["attack"].note.rpartition(": ")[2] for row in printed}
    assert printed[0]["SSIM"].text == "0.591"
    assert printed[0]["accuracy, %"].text == "99.8"
    assert matching("partialface", ["linear"]) == []
    assert matching("unheard-of", ["unet"]) == []


def test_published_rates_are_shares_of_one():
    for figure in published():
        rates = [value for name, value in figure.values.items() if name not in ("psnr", "psnr_aligned")]
        assert all(0 <= rate <= 1 for rate in rates), figure
        assert figure.values, figure


def test_the_best_is_bold_only_among_defences_that_met_the_same_attacks(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", defense="blur", ssim=(0.9,) * 8)]
    setting = setting_of(*folders)
    rows = best_rows(setting)
    assert rows["partialface"].entries["ssim"].best
    assert not rows["blur"].entries["ssim"].best
    assert not any("same attacks" in warning for warning in warnings([setting]))

    folders.append(write_run(tmp_path / "c", attack="linear"))
    setting = setting_of(*folders)
    assert not any(entry.best for row in best_rows(setting).values() for entry in row.entries.values())
    (labels,) = (labels for warning, labels in warnings([setting]).items() if "same attacks" in warning)
    assert labels == ["partialface: unet (whitebox), linear (whitebox)", "blur: unet (whitebox)"]


def test_recognisers_that_were_trained_differently_are_not_compared_in_silence(tmp_path):
    folders = [
        write_run(tmp_path / f"{defense}{epochs}", defense=defense, training={"epochs": epochs, "batch_size": 64})
        for defense, epochs in (("none", 10), ("blur", 20))
    ]
    (labels,) = (labels for warning, labels in warnings([setting_of(*folders)]).items() if "trained" in warning)
    assert labels == ["unet (whitebox) on none: epochs=10", "unet (whitebox) on blur: epochs=20"]
    assert not any("trained" in warning for warning in warnings([setting_of(folders[0])]))


def test_a_defence_that_no_attack_has_opened_is_not_the_best_and_its_rows_say_why(tmp_path):
    folders = [
        write_run(tmp_path / "a", ssim=(0.3,) * 8, above_floor=False, saturated=None),
        write_run(tmp_path / "b", defense="blur", ssim=(0.9,) * 8),
        write_run(tmp_path / "c", defense="pixelate", ssim=(0.8,) * 8),
    ]
    setting = setting_of(*folders)
    rows = best_rows(setting)
    assert NO_BETTER in rows["partialface"].entries["attack"].note
    assert not rows["partialface"].entries["ssim"].best
    assert rows["pixelate"].entries["ssim"].best
    notes = {row.entries["attack"].note for row in summary(setting, 1).rows if row.kind == "measured"}
    assert notes == {NO_BETTER, ""}
    told = {defense: " ".join(fact.context for fact in facts(cells)) for defense, cells in setting.defenses.items()}
    assert (NO_BETTER in told["partialface"], NO_BETTER in told["blur"]) == (True, False)
    board = write_leaderboard(tmp_path, tmp_path / "out").files
    assert all(NO_BETTER in path.read_text() for path in board if path.suffix != ".svg")
    assert NO_BETTER in report_csv([setting])


def test_a_worst_case_of_which_an_attack_failed_is_incomplete_and_not_the_best(tmp_path):
    folders = [
        write_run(tmp_path / "a", ssim=(0.3,) * 8), write_run(tmp_path / "b", attack="linear", error="not finite"),
        write_run(tmp_path / "c", defense="blur"), write_run(tmp_path / "d", defense="blur", attack="linear"),
        *(write_run(tmp_path / name, defense="none", attack=name, ssim=(0.9,) * 8) for name in ("unet", "linear")),
    ]  # fmt: skip
    setting = setting_of(*folders)
    rows = best_rows(setting)
    assert rows["partialface"].entries["attack"].note == "over 1 attack run; incomplete: 1 failed"
    assert not rows["partialface"].entries["ssim"].best
    assert rows["blur"].entries["ssim"].best
    assert "incomplete" in list(facts(setting.defenses["partialface"]))[1].context


def test_the_floor_of_a_worst_case_is_the_pointwise_worst_of_the_guesses(tmp_path):
    folder = write_run(tmp_path / "a")
    table = pd.read_parquet(folder / "per_image.parquet")
    rows = table[table["method"] == "ceiling"]
    guesses = {"mean_face": [0.6, 0.2] * 4, "noise": [0.1, 0.5] * 4}
    floors = [rows.assign(method=name, ssim=values) for name, values in guesses.items()]
    pd.concat([table, *floors]).to_parquet(folder / "per_image.parquet")
    assert worst_floor(setting_of(folder).cells, "ssim").value == pytest.approx(0.55)


def test_one_defence_alone_is_not_the_best(tmp_path):
    rows = best_rows(setting_of(write_run(tmp_path / "a")))
    assert not any(entry.best for row in rows.values() for entry in row.entries.values())


def test_warnings_are_said_once_with_their_runs(tmp_path):
    setting = setting_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", attack="linear"))
    (lpips,) = (labels for warning, labels in warnings([setting]).items() if warning.startswith("LPIPS"))
    assert lpips == ["unet (whitebox) on partialface", "linear (whitebox) on partialface"]


# -- template defences -------------------------------------------------------------------------------


def test_each_attack_on_a_template_defence_has_its_row(tmp_path):
    setting = setting_of(
        write_run(tmp_path / "a", defense="polyprotect", template=template_protection(), inversion=inversion(0.6)),
        write_run(tmp_path / "b", defense="polyprotect", template=template_protection(),
                  inversion=inversion(0.7, records=3, key=False), knowledge="oracle"),
        write_run(tmp_path / "c", defense="biohash", template=template_protection(maximal=None)),
        write_run(tmp_path / "d"), write_run(tmp_path / "e", defense="iom", error="broke"),
    )  # fmt: skip
    table = template_table(setting, 1)
    first, second, third = (by_heading(table, row) for row in table.rows)
    assert [row["defence"].text for row in (first, second, third)] == ["polyprotect", "polyprotect", "biohash"]
    assert first["stolen"].text == "1 template, with keys"
    assert second["stolen"].text == "3 templates, without keys"
    assert third["stolen"].text == "–"
    expected = {
        "own key, %": 98, "stolen key, %": 85, "unknown key, %": 52, "replay, %": 1.1, "diverse @1e-3, %": 99,
        "D_sys templates": 0.2, "maximal linkability, bits": 0.5, "embedding cosine": 0.71, "pass, %": 60,
        "pass @1e-3, %": 30, "pass renewed, %": 55, "pass renewed @1e-3, %": 15, "D_sys inverted": 0.33,
        "maximal linkability inverted, bits": 0.25, "D_sys inverted-plain": 0.44,
    }  # fmt: skip
    assert {heading: first[heading].number for heading in expected} == pytest.approx(expected)
    assert first["own key, %"].note == "EER 10.0"
    assert first["D_sys templates"].note == "chance 0.048"
    assert first["embedding cosine"].note == "floor 0.130"
    assert first["maximal linkability, bits"].note.startswith("TMR at most 42.4 %")
    assert second["pass, %"].number == pytest.approx(70)
    assert third["pass, %"].number is None
    assert (third["maximal linkability, bits"].text, third["maximal linkability, bits"].note) == ("–", "")


def test_without_a_template_defence_there_is_no_table_of_them(tmp_path):
    assert template_table(setting_of(write_run(tmp_path / "a")), 1) is None


def test_inverted_templates_stand_in_the_summary_at_their_worst_above_the_mean_embedding(tmp_path):
    made = {"defense": "biohash", "template": template_protection()}
    setting = setting_of(
        write_run(tmp_path / "a", inversion=inversion(0.2), **made),
        write_run(tmp_path / "b", attack="linear", inversion=inversion(0.6), **made),
    )
    table = summary(setting, 1)
    worst, unet, linear = (by_heading(table, row) for row in table.rows[:3])
    assert (worst["pass, %"].number, worst["pass, %"].note) == (60, "linear")
    assert worst["embedding cosine"].note == "unet; floor 0.130"
    assert (unet["pass, %"].number, linear["pass renewed, %"].number) == pytest.approx((20, 55))
    assert [by_heading(table, row)["defence"].text for row in table.foot] == ["floor: mean embedding"]
    assert list(facts(setting.defenses["biohash"]))[-1].figure == "60.0 % [59.0, 61.0]"


def test_the_published_attack_on_protected_templates_stands_at_the_highest_of_its_recognisers(tmp_path):
    assert {figure.defense: figure.values for figure in published() if figure.source.id == "fem"} == {
        "mlp-hash": {"pass_same": 0.821}, "slerpface": {"pass_same": 0.794}, "polyprotect": {"pass_same": 0.503},
    }  # fmt: skip
    folder = write_run(
        tmp_path / "a", defense="slerpface", attack="template", template=template_protection(), inversion=inversion()
    )
    table = summary(setting_of(folder), 1)
    printed = [by_heading(table, row) for row in table.rows if row.kind == "published"]
    assert {(row["accuracy, %"].text, row["pass, %"].text) for row in printed} == {("99.2", "–"), ("–", "79.4")}


def _estimates(folder, noise, *, size=8, seed=0):
    """Estimates of 40 people that share a truth, as near to it as the noise leaves them."""
    truth, draws = np.random.default_rng(7).normal(size=(40, size)), np.random.default_rng(seed)
    sides = {side: list(truth + noise * draws.normal(size=truth.shape)) for side in ("first", "second")}
    people = [f"person {n}" for n in range(40)]
    table = pd.DataFrame({"image": range(40), "identity": people, **sides}).assign(attack="template")
    table.to_parquet(folder / "inverted.parquet")


def test_records_of_two_systems_are_linked_by_what_is_made_of_them(tmp_path):
    made = {"attack": "template", "knowledge": "oracle", "template": template_protection()}
    noises = {"biohash": 0.05, "iom": 0.1, "mlp-hash": 50.0}
    for seed, (name, noise) in enumerate(noises.items()):
        _estimates(write_run(tmp_path / name, defense=name, inversion=inversion(0.6), **made), noise, seed=seed)
    # Another embedding space, and records without their keys: neither can be held against the others.
    _estimates(write_run(tmp_path / "s", defense="slerpface", inversion=inversion(0.6), **made), 0.05, size=6)
    _estimates(write_run(tmp_path / "p", defense="polyprotect", inversion=inversion(0.6, key=False), **made), 0.05)
    table = across_table(setting_of(*sorted(tmp_path.iterdir())), 1)
    linked = {
        (row.entries["a record of"].text, column.key): row[column].number
        for row in table.rows
        for column in table.columns[1:]
    }
    assert linked["biohash", "iom"] > 0.95
    assert linked["iom", "biohash"] > 0.95
    assert linked["biohash", "mlp-hash"] < 0.4
    assert linked["biohash", "slerpface"] is None
    assert ("polyprotect", "biohash") not in linked


def test_a_leaderboard_of_templates_has_their_drawing(tmp_path):
    made = {"attack": "template", "knowledge": "oracle", "template": template_protection()}
    for name in ("biohash", "iom"):
        write_run(tmp_path / "runs" / name, defense=name, inversion=inversion(0.6), **made)
    write_leaderboard(tmp_path / "runs", tmp_path / "out")
    assert (tmp_path / "out" / "templates-1.svg").is_file()
