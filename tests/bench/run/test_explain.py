"""`bench explain`: the frequencies are those that were sent, and what is found is written, shown and drawn."""

import json
import math
from dataclasses import replace

import pytest
import torch
from pictures import noise
from pixel_judge import write_pixel_judge
from tiny_runs import pipeline

from bench.data.faces import FaceSet
from bench.errors import UsageError
from bench.plugins import make_defense
from bench.results import Explanation, Reliance
from bench.run import explain as explaining
from bench.run.archive import load_run
from bench.run.explain import COUNT, EXPRESSIONS, _groups, explain, expressive_faces, sends_frequencies, told_apart
from bench.run.textbook import textbook_spectrum
from defenses.base import Defense
from reports.cells import settings
from reports.maps import frequency, reliance_figures

PRUNED = (0, 1, 2, 3, 8, 9, 10, 16, 17, 24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of linear on partialface, with a recogniser that has seen next to nothing: its folder."""
    out = tmp_path_factory.mktemp("explain")
    judge = write_pixel_judge(out / "judge.onnx")
    cell = pipeline(
        out / "runs", defense="partialface", attack="linear", evaluator=[judge], probes=8, image_size=24,
        dataset_options={"identities": 24, "images_per_identity": 3},
    )  # fmt: skip
    cell.run()
    return cell.directory


@pytest.mark.parametrize("name", ["partialface", "fixed-subset", "arcface-fd", "dctdp", "fracface", "duetface"])
def test_every_channel_is_the_frequency_that_it_is_said_to_be(name):
    """What is sent without noise is, but for scale and shift, the map of the textbook's transform."""
    defense, faces = make_defense(name, {}, "cpu", 24), noise(2, 24)
    state = defense.draw(2, torch.Generator().manual_seed(0))
    states = None if state is None else state[:, None]
    groups = _groups(defense, torch.zeros(2, 1, *defense.representation_shape), states)[:, 0]
    spectrum = textbook_spectrum(faces.double()).flatten(1, 2)
    checked = set()
    for face in range(2):
        maps = defense.linear_operator(None if state is None else state[face])(faces[face : face + 1].double())[0]
        own = groups[face][groups[face] >= 0]
        assert len(own) == len(maps)
        for channel, place in enumerate(own.tolist()):
            pair = torch.stack([maps[channel].flatten(), spectrum[face, place].flatten()])
            assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(1, abs=1e-6)
            checked.add(place)
    assert len(checked) >= 27


def test_what_sends_no_frequencies_is_refused():
    assert not sends_frequencies(make_defense("blur", {}, "cpu", 24))
    assert not sends_frequencies(make_defense("none", {}, "cpu", 24))


def test_a_run_is_explained(finished, bench):
    explanation, path = explain(finished, faces=2)
    assert Explanation.model_validate_json(path.read_bytes()) == explanation == load_run(finished).explanation
    assert explanation.faces == 2
    assert len(explanation.sent) == COUNT
    assert sum(explanation.sent) == 2 * 27
    for place, count in enumerate(explanation.sent):
        assert count == 0 or place % 64 not in PRUNED
        assert explanation.sent[place % 64] == count  # a rank picks the same frequencies of all colours
    for reliance in (explanation.recogniser, explanation.attacks["linear"]):
        assert len(reliance.occlusion) == COUNT
        for count, value in zip(explanation.sent, reliance.occlusion, strict=True):
            assert (value is None) == (count == 0)
            assert value is None or (math.isfinite(value) and value >= -1e-6)
        assert max(value for value in reliance.occlusion if value is not None) > 0
    assert explanation.recogniser.gradient is not None
    assert (explanation.attacks["linear"].gradient is None) == ("gradient" in explanation.attacks["linear"].reasons)
    code, out, _ = bench("explain", finished, "--faces", "2", "--json")
    assert code == 0
    assert json.loads(out)["recogniser"]["occlusion"] == explanation.recogniser.occlusion


def test_an_attack_that_takes_too_long_is_left_out_with_the_reason(finished, tmp_path):
    kept = (finished / "explain.json").read_bytes() if (finished / "explain.json").is_file() else None
    explanation, path = explain(finished, faces=4, seconds=1e-6)
    assert explanation.attacks["linear"].occlusion is None
    assert "takes more than" in explanation.attacks["linear"].reasons["occlusion"]
    assert explanation.recogniser.occlusion is not None
    if kept is not None:
        path.write_bytes(kept)


def test_the_figure_names_what_is_relied_on_most(finished):
    values = [None if place % 64 in PRUNED else 0.001 for place in range(COUNT)]
    values[64 + 21] = 0.5
    explanation = Explanation(
        run_id="x", faces=9, sent=[1] * COUNT, recogniser=Reliance(occlusion=values, gradient=None),
        attacks={"linear": Reliance(occlusion=list(reversed(values)), gradient=values)},
    )  # fmt: skip
    path = finished / "explain.json"
    kept = path.read_bytes() if path.is_file() else None
    path.write_text(explanation.model_dump_json())
    try:
        occlusion, gradient = reliance_figures(settings([load_run(finished)])[0], 1)
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)
    assert frequency(64 + 21) == "Cb (2, 5)"
    assert "recogniser: most on Cb (2, 5)" in occlusion.description
    assert f"linear: most on {frequency(COUNT - 1 - 85)}" in occlusion.description
    assert "recogniser" not in gradient.description
    assert "linear: most on Cb (2, 5)" in gradient.description


# -- expressions -------------------------------------------------------------------------------------


def test_expressions_are_of_everybody_alike():
    faces, whose = expressive_faces(6, 32, seed=3)
    counts = torch.zeros(6, len(EXPRESSIONS), dtype=torch.int64)
    counts.index_put_((whose, faces.labels), torch.ones(len(faces), dtype=torch.int64), accumulate=True)
    assert (counts == counts[0, 0]).all()
    assert faces.names == tuple(EXPRESSIONS)
    same, _ = expressive_faces(6, 32, seed=3)
    assert torch.equal(same.images, faces.images)
    assert not torch.equal(expressive_faces(6, 32, seed=4)[0].images, faces.images)


def test_an_expression_moves_mouth_and_brows_and_leaves_hair_and_background(monkeypatch):
    monkeypatch.setattr(explaining, "draw_conditions", still)
    faces, whose = expressive_faces(4, 64, seed=1)
    pictures = faces.images.float()
    for person in range(4):
        own, shown = pictures[whose == person], faces.labels[whose == person]
        neutral = own[shown == 0].mean(dim=0)
        for label in range(1, len(EXPRESSIONS)):
            moved = (own[shown == label].mean(dim=0) - neutral).abs().mean(dim=0)
            assert moved[44:60, 20:44].mean() > 3 * moved[:12].mean()


def still(count, generator):
    """The same light, pose and camera for all pictures."""
    from bench.data.synthetic import Conditions, draw_conditions

    drawn = draw_conditions(1, torch.Generator().manual_seed(0))
    return Conditions(drawn.values.expand(count, -1).clone(), drawn.columns)


class Noise(Defense):
    """Sends nothing of anybody."""

    name = "pure-noise"
    summary = "noise alone"

    def transform(self, faces, state, generator):
        return torch.rand(faces.shape, generator=generator)


def test_what_is_sent_decides_what_is_told_apart(tmp_path, monkeypatch):
    """Expressions of a colour each: told from plain faces without fail, and no better than by chance from noise."""

    def coloured(people, size, seed):
        labels = torch.arange(4).repeat(2 * people)
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
        images = colours[labels][:, :, None, None].expand(-1, -1, size, size).contiguous()
        return FaceSet(images, labels, tuple(EXPRESSIONS)), torch.arange(people).repeat_interleave(8)

    monkeypatch.setattr(explaining, "expressive_faces", coloured)
    small = {"image_size": 16, "dataset_options": {"identities": 24, "images_per_identity": 3}}
    attacks = pipeline(tmp_path, defense="none", attack="linear", utility=False, **small).attack_stages()
    told = told_apart(attacks, Noise(image_size=16), 10)
    assert told.unprotected.value == 1
    assert told.chance == 0.25
    assert told.protected.value < 0.5
    assert (told.trained_on, told.protected.n) == (48, 32)

    def unseen(people, size, seed):
        faces, whose = coloured(people, size, seed)
        drawn = torch.Generator().manual_seed(0)
        return replace(faces, images=torch.randint(256, faces.images.shape, generator=drawn, dtype=torch.uint8)), whose

    monkeypatch.setattr(explaining, "expressive_faces", unseen)
    told = told_apart(attacks, Noise(image_size=16), 10)
    assert told.unprotected.value < 0.6
    assert told.protected.value is None
    assert "more people" in told.protected.reason


@pytest.mark.parametrize("people", [1, 2, 3])
def test_too_few_people_are_refused(finished, people):
    with pytest.raises(UsageError, match=f"--expression {people}: at least 5"):
        explain(finished, faces=1, seconds=1e-6, people=people)
