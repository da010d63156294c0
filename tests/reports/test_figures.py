"""Figures: their geometry against known values, and SVG that is safe inside a page."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from run_folders import VICTIMS, inversion, template_protection, write_run
from sklearn.metrics import roc_curve

from bench.run.archive import load_runs
from reports.cells import settings
from reports.figures import (
    _front,
    distributions,
    pareto,
    roc,
    roc_figure,
    strength_figures,
    template_figure,
    training_figures,
)
from reports.maps import confusion_figures, frequency_figures, state_figure
from reports.svg import draw, entry, spread

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def setting(tmp_path):
    folders = [
        write_run(tmp_path / "a", strength=True),
        write_run(tmp_path / "b", attack="linkage", linkage=True),
        write_run(tmp_path / "c", defense="blur", ssim=(0.9,) * 8),
        write_run(tmp_path / "d", defense="biohash", template=template_protection(), inversion=inversion()),
    ]
    (setting,) = settings(load_runs(folders))
    return setting


def test_roc_against_scikit_learn():
    rng = np.random.default_rng(0)
    same = rng.random(200) < 0.4
    scores = np.round(same + rng.normal(0, 1, 200), 1)  # rounded: ties
    far, tar = roc(scores, same)
    expected_far, expected_tar, _ = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(far, expected_far)
    np.testing.assert_allclose(tar, expected_tar)


def test_a_det_curve_is_of_the_errors(setting):
    roc_words, det_words = (
        re.findall(r"(\d+)% \w+ at", roc_figure(setting, 1, "scores", det=det).description) for det in (False, True)
    )
    assert [100 - int(accepted) for accepted in roc_words] == list(map(int, det_words))
    axes = roc_figure(setting, 1, "scores", det=True).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == "false non-match rate (FNMR)"


def test_each_linkage_attack_has_its_own_scores(tmp_path):
    folder = write_run(tmp_path / "a", attack="linkage,other", linkage=True)
    table = pd.read_parquet(folder / "linkage.parquet")
    table["protected_plain"] = table["same"] ^ (table["attack"] == "other")  # one is always right, the other never
    table.to_parquet(folder / "linkage.parquet")
    (setting,) = settings(load_runs([folder]))
    told = roc_figure(setting, 1, "linkage").description
    assert "partialface, linkage (whitebox), linkage of protected and plain: 100% accepted" in told
    assert "partialface, other (whitebox), linkage of protected and plain: 0% accepted" in told
    linked = [drawing.description for drawing in distributions(setting, 1) if "linkage of" in drawing.title]
    assert [re.search(r"same person: median (\S+),", words)[1] for words in linked] == ["1.000", "0.000"]


def test_scores_of_before_several_linkage_attacks_are_of_the_only_one(tmp_path):
    folder = write_run(tmp_path / "a", attack="linkage", linkage=True)
    pd.read_parquet(folder / "linkage.parquet").drop(columns="attack").to_parquet(folder / "linkage.parquet")
    (setting,) = settings(load_runs([folder]))
    assert "partialface, linkage of protected and plain: " in roc_figure(setting, 1, "linkage").description


def test_the_pareto_front_keeps_what_nothing_beats():
    points = [(90.0, 0.8), (80.0, 0.5), (85.0, 0.9), (80.0, 0.6), (70.0, 0.5), (60.0, 0.1)]
    assert _front(points) == [(90.0, 0.8), (80.0, 0.5), (60.0, 0.1)]


def test_spread_keeps_both_ends():
    assert spread(range(5)) == [0, 1, 2, 3, 4]
    thinned = spread(range(1000), most=10)
    assert (thinned[0], thinned[-1], len(thinned)) == (0, 999, 10)


def every_drawing(setting):
    drawings = [pareto(setting, 1, name) for name in ("ssim", "type1_tar", "linkage")]
    drawings += [roc_figure(setting, 1, "scores"), roc_figure(setting, 1, "linkage"), state_figure(setting, 1)]
    drawings += [template_figure(setting, 1), roc_figure(setting, 1, "scores", det=True)]
    for make in (distributions, strength_figures, training_figures, frequency_figures, confusion_figures):
        drawings += make(setting, 1)
    return list(filter(None, drawings))


def test_every_figure_can_stand_in_a_page(setting):
    drawings = every_drawing(setting)
    assert len(drawings) >= 12
    seen = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing.svg)
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        seen += ids
        assert root.attrib["role"] == "img"
        assert root.find(f"{SVG}title").text == drawing.title
        assert set(root.attrib["aria-labelledby"].split()) <= set(ids)
        assert not list(root.iter(f"{SVG}style")), "its styles would be the page's"
        used = re.findall(r"url\(#([^)]+)\)", drawing.svg) + re.findall(r'href="#([^"]+)"', drawing.svg)
        assert set(used) <= set(ids)
        assert not re.search(r"#0000[ef]\d", drawing.svg), "a colour of the page is left out"
        assert "currentColor" in drawing.svg
        assert drawing.description.endswith(".")
    assert len(seen) == len(set(seen))


def test_a_drawing_is_the_same_each_time(setting):
    assert pareto(setting, 1, "ssim") == pareto(setting, 1, "ssim")


def test_figures_of_synthetic_faces_say_so_inside_the_picture(setting):
    drawing = roc_figure(setting, 1, "scores")
    root = ElementTree.fromstring(drawing.svg)
    assert "synthetic faces" in [element.text for element in root.iter(f"{SVG}text")]
    assert "(synthetic faces)" in drawing.title


def test_figures_of_real_faces_do_not(tmp_path):
    (real,) = settings(load_runs([write_run(tmp_path / "a", synthetic=False)]))
    for drawing in every_drawing(real):
        assert "synthetic" not in drawing.svg


@pytest.mark.parametrize("label", ["<script>alert(1)</script>", "$\\frac$", "_hidden", "a&b\"'", "$x$", "\\"])
def test_hostile_labels_are_text(label):
    with draw("x", label, ("", ""), synthetic=False) as drawing:
        drawing.axes.plot([0, 1], [0, 1], label=entry(label))
        drawing.told.append(label)
    root = ElementTree.fromstring(drawing.svg)
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert root.find(f"{SVG}title").text == label
    assert label in [element.text for element in root.iter(f"{SVG}text")]


def test_confused_states_are_told(setting):
    first, second = confusion_figures(setting, 1)
    assert f"{VICTIMS - 2} of {VICTIMS} interceptions named right" in first.description
    assert "state 0 taken for none of the states" in first.description
    assert first.svg != second.svg


def test_states_that_the_defence_does_not_have_are_not_drawn(tmp_path):
    folder = write_run(tmp_path / "a")
    pd.DataFrame({"attack": "unet", "drawn": [18], "named": [0]}).to_parquet(folder / "state_inference.parquet")
    (setting,) = settings(load_runs([folder]))
    assert confusion_figures(setting, 1) == []


def test_frequencies_tell_whether_the_energy_is_known(tmp_path):
    kept = list(range(10, 64))
    known = {"kept_channels": kept, "channel_energy": list(range(64, 0, -1))}
    folders = write_run(tmp_path / "a"), write_run(tmp_path / "b", defense="other", details=known)
    (setting,) = settings(load_runs(folders))
    without, having = frequency_figures(setting, 1)
    assert "does not hold the energy" in without.description
    assert "Darker holds more energy" in having.description
    assert f"{list(range(10))}" in having.description


def test_frequencies_ignore_what_is_no_list_of_channels(tmp_path):
    (setting,) = settings(load_runs([write_run(tmp_path / "a", details={"kept_channels": ["<x>", 99]})]))
    assert frequency_figures(setting, 1) == []


def test_what_was_stolen_decides_the_point_and_the_strongest_attack_its_height(tmp_path):
    runs = [
        ("biohash", "unet", 0.85, inversion(0.6)), ("biohash", "linear", 0.85, inversion(0.9)),
        ("biohash", "unet", 0.85, inversion(0.2, key=False)), ("biohash", "unet", 0.85, inversion(0.95, records=3)),
        ("polyprotect", "unet", 0.8, inversion(0.3, key=False)), ("polyprotect", "unet", None, inversion(0.4)),
    ]  # fmt: skip
    folders = [
        write_run(tmp_path / str(n), defense=name, attack=attack, inversion=got, template=template_protection(accuracy)
                  if accuracy else template_protection().model_copy(update={"verification": {}}))
        for n, (name, attack, accuracy, got) in enumerate(runs)
    ]  # fmt: skip
    (setting,) = settings(load_runs(folders))
    drawing = template_figure(setting, 1)
    points = [re.match(r"(.*): (\S+) % pass, (\S+) % .* key (\S+) %", told) for told in drawing.told]
    assert [(point[1], *map(float, point.groups()[1:])) for point in points] == [
        ("biohash: 1 template, with keys", 85, 90, 85),
        ("biohash: 1 template, without keys", 15, 20, 85),
        ("biohash: 3 templates, with keys", 90, 95, 85),
        ("polyprotect: 1 template, without keys", 25, 30, 80),
    ]
    colours = [set(re.findall(r"var\(--series-(\d)\)", drawing.svg))]
    assert colours == [{"1", "2"}]


def test_without_inverted_templates_there_is_nothing_to_draw(tmp_path):
    (setting,) = settings(load_runs([write_run(tmp_path / "a", template=template_protection())]))
    assert template_figure(setting, 1) is None
