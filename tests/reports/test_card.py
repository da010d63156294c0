"""The model card says of an exported network what its run measured, what it was trained on, and what not to do."""

from __future__ import annotations

import json

import pytest
from gate_world import make_run

from bench.run.archive import load_run
from bench.run.export import Exported
from reports.card import model_card


def card_of(folder, what):
    exported = Exported(
        file="x.onnx",
        what=what,
        inputs={"representation": ("batch", 27, 64, 64)},
        output="embedding",
        evaluator=False,
        difference=2e-6,
        sha256="ab" * 32,
    )
    return model_card(load_run(folder), exported)


def test_a_recognisers_card_has_its_accuracy_and_what_it_was_trained_on(tmp_path):
    folder = make_run(tmp_path / "run", accuracy=0.8125, warnings=["a | of <two> *lines*"])
    document = json.loads((folder / "metrics.json").read_text())
    document["dataset"] |= {"images": {"provider": 1234}, "identities": {"provider": 56}}
    (folder / "metrics.json").write_text(json.dumps(document))
    card = card_of(folder, "recogniser")
    assert "1,234 images of 56 people" in card
    assert "- accuracy: 81.2" in card or "- accuracy: 81.3" in card
    assert "ab" * 32 in card
    assert "epochs 4" in card
    assert r"a &#124; of &lt;two&gt; \*lines\*" in card


def test_an_attacks_card_has_what_it_gives_back(tmp_path):
    folder = make_run(tmp_path / "run")
    ssim = json.loads((folder / "metrics.json").read_text())["recovery"]["ssim"]
    card = card_of(folder, "attack")
    assert "Network of the attack unet on partialface" in card
    (line,) = [line for line in card.splitlines() if line.startswith("- SSIM")]
    assert abs(float(line.split(":")[1].split()[0]) - ssim["value"]) < 0.01
    assert "[" in line


@pytest.mark.parametrize(("what", "trained_on"), [("recogniser", "webdataset"), ("attack", "folder")])
def test_of_several_data_sets_it_names_the_one_that_was_trained_on(tmp_path, what, trained_on):
    folder = make_run(tmp_path / "run")
    document = json.loads((folder / "metrics.json").read_text())
    document["dataset"] |= {
        "name": "lfw",
        "sources": {"victims": "lfw", "dataset": "webdataset", "attack_data": "folder"},
    }
    (folder / "metrics.json").write_text(json.dumps(document))
    _, _, section = card_of(folder, what).partition("## Trained on\n\n")
    assert section.startswith(f"{trained_on}: ")


@pytest.mark.parametrize("what", ["recogniser", "attack"])
def test_a_run_without_figures_says_so(tmp_path, what):
    card = card_of(make_run(tmp_path / "run", status="error"), what)
    assert "Nothing." in card
    assert "left no figures" in card
