"""Runs with recognisers that somebody brings along: what they see, what they are told apart by, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_models import linear_model
from tiny_runs import finished, made, pipeline, registered, stages_of
from torch.nn import functional

from bench.errors import DataError, MissingError, UsageError
from bench.images import to_float
from bench.nets.recogniser import build_recogniser
from bench.recognition.state import save_recogniser
from bench.run.config import resolve
from bench.run.stage import StageCache

SIDE = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Recognisers of PartialFace's 27 channels and of plain faces, and of pictures of 8 pixels a side, in files."""
    folder = tmp_path_factory.mktemp("recognisers")
    for name, channels in (("frequencies", 27), ("pictures", 3)):
        recogniser = build_recogniser("ir-tiny", (channels, SIDE, SIDE), 16, seed=channels)
        save_recogniser(recogniser, folder / f"{name}.safetensors")
    weights = np.random.default_rng(0).normal(size=(3 * 8 * 8, 20)).astype(np.float32)
    linear_model(folder / "small.onnx", weights, ("n", 3, 8, 8))
    return {path.stem: path for path in folder.iterdir()}


def cosines(recogniser, defense, faces, pairs):
    """Of the pairs, as the protocol has it: image and mirror image added, then normalised."""
    pixels, generator = to_float(faces.images), torch.Generator()
    both = (recogniser(defense.protect(side, generator).representation) for side in (pixels, pixels.flip(-1)))
    with torch.no_grad():
        embeddings = functional.normalize(sum(both))
    return (embeddings[pairs.first] * embeddings[pairs.second]).sum(1)


def test_a_brought_recogniser_sees_what_the_defence_sends_and_another_one_plain_faces(out, files):
    cell = pipeline(
        out,
        defense="fixed-subset",
        attack="linear",
        recogniser=files["frequencies"],
        plain_recogniser=files["pictures"],
    )
    stages = stages_of(cell)
    faces, pairs = stages.splits.victims, stages.splits.pairs
    for name, channels in (("fixed-subset", 27), ("none", 3)):
        defense = stages.defense(name, {})
        recogniser = build_recogniser("ir-tiny", (channels, SIDE, SIDE), 16, seed=channels).eval()
        scores = stages.do(stages.verification_job(defense))
        torch.testing.assert_close(scores, cosines(recogniser, defense, faces, pairs), rtol=0, atol=1e-5)
    planned = {stage.name: stage.what for stage in cell.plan().stages}
    assert planned["recogniser-brought"] == "try frequencies.safetensors on fixed-subset"
    assert planned["recogniser-brought-plain"] == "try pictures.safetensors on none"
    assert not any(name.startswith("recogniser-provider") for name in planned)


@pytest.fixture(scope="module")
def run(out, files):
    """Blurred pictures, seen by one recogniser with and without the blur."""
    small = {"recogniser": files["small"], "plain_recogniser": files["small"]}
    with registered():
        return finished(out, defense="blur", attack="linear", recogniser_input={"range": "0..1"}, **small)


def test_a_result_says_what_was_brought_along_and_that_its_training_is_not_known(run, files):
    result, directory = run
    assert not any(stage.startswith("recogniser-provider") for stage in made(directory))
    assert result.utility.unprotected.accuracy.value > 0.5
    told = result.recognisers
    assert set(told) == {"recogniser", "plain_recogniser"}
    first = told["recogniser"]
    assert (first.name, first.format, first.channels, first.input_size) == ("small.onnx", "onnx", 3, (8, 8))
    assert (first.input_range, first.embedding_size, first.values) == ("0..1", 20, 3 * 8 * 8 * 20)
    assert sum("whom it learnt from is not known" in warning for warning in result.warnings) == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"defense": "blur", "recogniser": "frequencies"},
            UsageError,
            "27 channels of 32 x 32, and is sent 3 channels",
        ),
        (
            {"defense": "partialface", "recogniser": "small"},
            UsageError,
            "3 channels .* sent 27 channels .* by partialface",
        ),
        (
            {"recogniser": "frequencies", "image_size": 48},
            UsageError,
            "27 channels of 32 x 32, and is sent 27 .* 48 x 48",
        ),
        ({"plain_recogniser": "frequencies"}, UsageError, "--plain-recogniser: .* sent 3 channels .* by none"),
        ({"defense": "none", "plain_recogniser": "small"}, UsageError, "as --recogniser"),
        ({"defense": "blur", "recogniser": "small", "evaluator": "small"}, UsageError, "one file"),
        ({"defense": "blur", "recogniser": "small", "teacher": "pictures"}, UsageError, "learns from no --teacher"),
        ({"defense": "blur", "recogniser": "small", "recogniser_input": {"size": 16}}, UsageError, "is 8, and 16 was"),
        ({"recogniser_input": {"range": "0..1"}}, UsageError, "recogniser_input gives range of no recogniser"),
        ({"recogniser": "absent.pt"}, MissingError, "absent.pt does not exist; give --recogniser"),
        ({"recogniser": __file__}, DataError, "is no recogniser: expected an ONNX file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused_before_anything_is_computed(out, files, changes, error, words):
    named = {key: files.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(error, match=words) as caught:
        pipeline(out, **{"defense": "fixed-subset", "attack": "linear", **named})
    assert "\n" not in str(caught.value)


def test_an_attack_may_not_use_the_provider_s_plain_recogniser(out, files):
    with pytest.raises(UsageError, match=r"is the plain-recogniser small\.onnx"):
        pipeline(
            out,
            defense="fixed-subset",
            attack="linkage",
            attack_options={"teacher": files["small"]},
            plain_recogniser=files["small"],
        )


def test_the_input_is_part_of_the_key_and_the_settings_keep_old_names(out, files):
    def key(**changes):
        stages = stages_of(pipeline(out, defense="blur", attack="linear", recogniser=files["small"], **changes))
        return stages.recogniser_key(stages.defense("blur", {}), "provider")

    assert key() != key(recogniser_input={"range": "0..255"})
    plain = resolve({"defense": "blur", "attack": "linear"}, {})
    assert not any("recogniser" in name for name in plain.identifying())
    given = resolve({"defense": "blur", "attack": "linear", "recogniser_input": {"size": "112x96"}}, {})
    assert given.recogniser_input.size == (112, 96)
    assert "recogniser_input" in given.identifying()
    assert isinstance(stages_of(pipeline(out, defense="blur", attack="linear")).cache, StageCache)
