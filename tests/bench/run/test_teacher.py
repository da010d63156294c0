"""A run under a teacher: embedded once, told in the result, kept apart from judges and attackers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_models import linear_model
from tiny_runs import TINY, finished, made, measured, pipeline, stages_of

from bench import plugins
from bench.errors import DataError, MissingError, UsageError
from bench.metrics.verification import lfw_accuracy, pair_scores
from bench.nets.onnx import file_digest
from bench.run.config import resolve

SIDE, SIZE = 8, 12
WEIGHTS = np.random.default_rng(0).normal(size=(3 * SIDE * SIDE, SIZE)).astype(np.float32)
TRAINED = {"training": {**TINY["training"], "classification": 0.5}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return linear_model(tmp_path_factory.mktemp("models") / "tutor.onnx", WEIGHTS, ("n", 3, SIDE, SIDE))


@pytest.fixture(scope="module")
def run(out, teacher):
    return finished(out, defense="blur", attack="linear", teacher=teacher, **TRAINED)


def test_the_result_tells_of_the_teacher(run, out, teacher):
    result, directory = run
    assert (result.teacher.name, result.teacher.sha256) == ("tutor", file_digest(teacher))
    assert (result.teacher.embedding_size, result.teacher.input_size) == (SIZE, (SIDE, SIDE))
    assert made(directory).count("teacher") == 1
    stages = stages_of(pipeline(out, defense="blur", attack="linear", teacher=teacher, **TRAINED))
    faces, pairs = stages.splits.victims, stages.splits.pairs
    small = torch.nn.functional.interpolate(faces.images / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
    assert stages.taught("provider").shape == (len(stages.splits.provider), SIZE)
    low, scale = {"(255x-127.5)/128": (-127.5, 128), "0..255": (0, 1), "0..1": (0, 255)}[result.teacher.input_range]
    small = small if result.teacher.colours == "RGB" else small.flip(1)
    fed = (255 * small.clamp(0, 1) + low) / scale
    embedded = (fed + fed.flip(3)).flatten(1) @ torch.from_numpy(WEIGHTS)
    expected = lfw_accuracy(pair_scores(embedded, pairs), pairs.same, pairs.fold).mean
    assert result.utility.teacher.accuracy.value == pytest.approx(expected)
    assert stages.taught("evaluator") is None


def test_another_defence_reuses_what_the_teacher_said(run, out, teacher):
    result, directory = finished(out, defense="pixelate", attack="linear", teacher=teacher, **TRAINED)
    assert "recogniser-provider-pixelate" in made(directory)
    assert not {"teacher", "verify-teacher", "recogniser-provider-none"} & set(made(directory))
    assert "teacher" in result.cached


def test_recognisers_take_the_teachers_size_and_the_judge_none_of_it(run, out, teacher):
    stages = stages_of(pipeline(out, defense="blur", attack="linear", teacher=teacher, **TRAINED))
    plain = plugins.make_defense("none", {}, "quick", 32)
    assert stages.recogniser(plain).spec.embedding_size == SIZE
    assert stages.recogniser(plain, "evaluator").spec.embedding_size == TINY["training"]["embedding_size"]


def test_the_plan_lists_the_teacher(out, teacher, tmp_path):
    seconds = measured(pipeline(out / "new", defense="blur", attack="linear", teacher=teacher), tmp_path)
    assert seconds["teacher"] is not None
    assert [*seconds].index("teacher") < len(seconds) - 1


def test_the_roles_are_different_files(tmp_path, teacher):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(teacher.read_bytes())
    asked = {"defense": "blur", "attack": "linkage"}
    with pytest.raises(UsageError, match=r"--teacher .*tutor\.onnx and --evaluator .*copy\.onnx are one file"):
        pipeline(tmp_path / "new", **asked, teacher=teacher, evaluator=str(copy))
    with pytest.raises(UsageError, match=r"-a teacher=.*copy\.onnx is the teacher tutor\.onnx: .*--teacher, another"):
        pipeline(tmp_path / "new", **asked, teacher=teacher, attack_options={"teacher": str(copy)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            None,
            MissingError,
            r"teacher: .*odd\.onnx does not exist; give --teacher or BENCH_TEACHER a",
        ),
        (b"no model", DataError, r"teacher: .*odd\.onnx is no ONNX model"),
    ],
)
def test_what_is_no_teacher_is_refused(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "odd.onnx").write_bytes(content)
    with pytest.raises(error, match=message):
        pipeline(tmp_path / "new", defense="blur", attack="linear", teacher=tmp_path / "odd.onnx")
    assert not (tmp_path / "new").exists()


def test_a_teacher_of_another_input_is_refused(tmp_path):
    grey = linear_model(tmp_path / "grey.onnx", WEIGHTS[: SIDE * SIDE], ("n", 1, SIDE, SIDE))
    with pytest.raises(DataError, match=r"teacher: .*must map \(N, 3, H, W\)"):
        pipeline(tmp_path / "new", defense="blur", attack="linear", teacher=grey)


def test_what_does_not_go_with_a_teacher_is_one_line(tmp_path, teacher):
    with pytest.raises(UsageError, match="leave out --stream, or --teacher"):
        pipeline(
            tmp_path,
            defense="blur",
            attack="linear",
            teacher=teacher,
            dataset="folder",
            data_root=tmp_path,
            stream=True,
        )
    nothing = (
        r"^configuration: training\.classification=0 leaves nothing to learn from without a teacher: give --teacher$"
    )
    with pytest.raises(UsageError, match=nothing):
        resolve({"defense": "none", "attack": "unet", "training": {"classification": 0}}, {})


def test_presets_under_a_teacher_lie_between_presets_and_what_is_asked_for(teacher):
    asked = {"defense": "none", "attack": "unet", "preset": "cpu"}
    plain, taught = resolve(asked, {}), resolve(asked, {"BENCH_TEACHER": str(teacher)})
    assert plain.training == taught.labels_only
    assert plain.labels_only == plain.training != taught.training
    other = resolve({**asked, "teacher": str(teacher), "training": {"epochs": 3}}, {})
    assert (other.training.epochs, other.labels_only.epochs) == (3, 3)
