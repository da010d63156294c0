"""`bench recogniser info`: what a recogniser is, and its figures against those worked out from its weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_models import linear_model
from sklearn.metrics import roc_auc_score
from small_sets import people, write_pairs

from bench.data.decode import decode_image
from bench.data.verification_pack import read_pack
from bench.nets.recogniser import build_recogniser
from bench.plugins import make_defense
from bench.recognition.state import save_recogniser

SIDE = 16
WEIGHTS = np.random.default_rng(3).normal(size=(3 * SIDE * SIDE, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recogniser of pictures, one of PartialFace's channels, and two packs."""
    root = tmp_path_factory.mktemp("world")
    net = linear_model(root / "net.onnx", WEIGHTS, ("n", 3, SIDE, SIDE))
    save_recogniser(build_recogniser("ir-tiny", (27, SIDE, SIDE), 8, seed=1), root / "frequencies.safetensors")
    (root / "packs").mkdir()
    for name, first in (("lfw", 0), ("agedb_30", 100)):
        write_pairs(root / "packs" / f"{name}.bin", people(20, 2, size=SIDE, first=first))
    return SimpleNamespace(net=net, frequencies=root / "frequencies.safetensors", packs=root / "packs", root=root)


def areas(pack, embed):
    """Area under the ROC curve of a pack's pairs, its embeddings being those of ``embed`` (N, 3, H, H) in [0, 1]."""
    held = read_pack(pack)
    faces = torch.stack([decode_image(image, SIDE) for image in held.images]).float() / 255
    unit = torch.nn.functional.normalize(embed(faces) + embed(faces.flip(-1)))
    return roc_auc_score(held.same, (unit[0::2] * unit[1::2]).sum(1).detach())


def test_what_it_is_and_how_well_it_tells_the_packs_apart(bench, world):
    code, out, err = bench("recogniser", "info", world.net, "--data-root", world.packs, "--range", "0..255", "--json")
    assert code == 0, err
    report = json.loads(out)
    told = report["recogniser"]
    assert (told["format"], told["layout"], told["input_size"], told["channels"]) == ("onnx", "NCHW", [SIDE, SIDE], 3)
    assert (told["input_range"], told["embedding_size"], told["values"]) == ("0..255", 12, WEIGHTS.size)
    assert len(told["sha256"]) == 64
    assert list(report["packs"]) == ["agedb_30", "lfw"]
    assert any("colours are those that tell some people of agedb_30 apart" in note for note in report["notes"])
    order = [2, 1, 0] if told["colours"] == "BGR" else [0, 1, 2]
    for name, figures in report["packs"].items():

        def embed(faces):
            return (255 * faces[:, order]).flatten(1) @ torch.from_numpy(WEIGHTS)

        assert figures["pairs"] == 40
        assert figures["auc"]["value"] == pytest.approx(areas(world.packs / f"{name}.bin", embed), abs=1e-6)
        assert figures["accuracy"]["value"] > 0.8
    code, out, _ = bench(
        "recogniser", "info", world.net, "--data-root", world.packs, "--verify", "lfw", "--colours", "RGB"
    )
    assert code == 0
    assert told["sha256"] in out
    assert "lfw" in out
    assert "agedb_30" not in out


def test_a_recogniser_of_frequencies_is_measured_behind_its_defence(bench, world):
    code, out, err = bench("recogniser", "info", world.frequencies, "--json")
    report = json.loads(out)
    assert (code, report["packs"], report["recogniser"]["channels"]) == (0, {}, 27), err
    assert report["recogniser"]["input_range"] is report["recogniser"]["colours"] is None
    assert "27 channels: give the --defense" in report["notes"][0]
    arguments = ("--data-root", world.packs / "lfw.bin", "--defense", "fixed-subset", "-o", "subset=2", "--json")
    code, out, err = bench("recogniser", "info", world.frequencies, *arguments)
    assert code == 0, err
    figures = json.loads(out)["packs"]["lfw"]
    defense = make_defense("fixed-subset", {"subset": 2}, "cpu", SIDE)
    network = build_recogniser("ir-tiny", (27, SIDE, SIDE), 8, seed=1).eval()

    def embed(faces):
        return network(defense.protect(faces, torch.Generator()).representation)

    assert figures["auc"]["value"] == pytest.approx(areas(world.packs / "lfw.bin", embed), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("absent.pt",), 5, "recogniser: absent.pt does not exist"),
        (("{packs}/lfw.bin",), 3, "lfw.bin"),
        (("{net}", "--size", "32"), 2, "size of its input is 16, and 32 was asked for"),
        (("{net}", "--range", "0..2"), 2, "input of the recogniser: range: input should be"),
        (("{net}", "--defense", "partialface"), 2, "3 channels of 16 x 16, and is sent 27"),
        (("{frequencies}", "--defense", "blur"), 2, "27 channels of 16 x 16, and is sent 3"),
        (("{net}", "--defense", "biohash"), 2, "by bench run --recogniser"),
        (("{net}", "--data-root", "nowhere"), 5, "nowhere does not exist"),
        (("{net}", "--data-root", "{packs}", "--verify", "cfp_fp"), 5, "cfp_fp"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(bench, world, arguments, code, message):
    filled = [argument.format(**{name: str(path) for name, path in vars(world).items()}) for argument in arguments]
    ended, _, err = bench("recogniser", "info", *filled)
    assert (ended, message in err, err.count("\n")) == (code, True, 1), err
