"""Faces that an attack recovered elsewhere, from the exported file alone, are scored as the run's own are."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from pixel_judge import write_pixel_judge
from tiny_runs import pipeline, stages_of

from attacks.base import Adversary, Knowledge, Observation
from bench.errors import DataError, MissingError, UsageError
from bench.metrics.floors import mean_face
from bench.plugins import make_attack, make_defense
from bench.results import NO_BETTER
from bench.run.archive import load_run
from bench.run.attacker import AttackStages
from bench.run.observe import observe
from bench.run.submission import read_submission, score
from reports.report import write_leaderboard, write_report
from reports.terminal import render_result


@pytest.fixture(scope="module")
def finished(out):
    """A run of linear on one fixed subset, and the faces that it recovered: (result, folder, float (V, 3, H, W))."""
    judge = write_pixel_judge(out / "judge.onnx")
    cell = pipeline(
        out / "runs", defense="fixed-subset", attack="linear", utility=False, evaluator=[judge], seed=5, probes=20
    )
    result = cell.run()
    attacks = AttackStages(stages_of(cell))
    defense = attacks.stages.defense(cell.config.defense, cell.config.defense_options)
    return result, cell.directory, attacks.recovered(cell.attack_configs["linear"][-1], defense).faces


@pytest.fixture(scope="module")
def observed(finished, out):
    """The arrays of the exported file."""
    observe(finished[1], out / "observed.npz")
    with np.load(out / "observed.npz", allow_pickle=False) as held:
        return dict(held)


@pytest.fixture
def submitted(tmp_path):
    """Write a submission, and give its path."""

    def write(**arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return tmp_path / "mine.npz"

    return write


def test_the_runs_own_faces_get_its_own_figures(finished, observed, submitted):
    own, folder, faces = finished
    file = submitted(faces=faces.numpy(), observed=observed["observed"])
    result, directory = score(file, folder)
    assert directory.parent == folder.parent.resolve()
    assert result.recovery.model_dump() == own.recovery.model_dump()
    assert result.linkage.model_dump() == own.linkage.model_dump()
    assert result.attack.floor_test == own.attack.floor_test
    assert (result.attack.name, result.attack.above_floor) == ("submitted:mine", own.attack.above_floor)
    assert result.attack.details == {
        "submitted": hashlib.sha256(file.read_bytes()).hexdigest(),
        "observed": observed["observed"].item(),
        "scored_with": own.run_id,
    }
    run = load_run(directory)
    assert run.result == result
    assert not run.altered
    assert json.loads((directory / "manifest.json").read_text())["submission"] == result.attack.details
    theirs, ours = run.rows("submitted:mine"), load_run(folder).rows("linear")
    assert theirs.drop(columns="method").reset_index(drop=True).equals(ours.drop(columns="method"))
    assert run.rows("submitted:mine ceiling") is not None
    assert len(run.samples.victims) > 0


def test_an_attack_from_the_file_alone_gets_what_the_run_got(finished, observed, submitted):
    own, folder, _ = finished
    about = json.loads(observed["about"].item())
    defense = make_defense(about["defense"], about["options"], "cpu", about["image_size"])
    attack = make_attack("linear", {}, "quick")
    attack.learn(
        Adversary(
            faces=torch.from_numpy(observed["faces"]),
            identities=torch.from_numpy(observed["identities"]),
            knowledge=Knowledge(about["knowledge"]),
            mechanism=lambda generator: defense,
            generator=torch.Generator().manual_seed(1),
            fabric=pipeline(folder.parent, defense="none", attack="linear").machine.fabric,
            traffic=lambda count: iter(()),
        )
    )
    faces = attack.recover(Observation(torch.from_numpy(observed["representations"])))
    result, _ = score(submitted(faces=faces.numpy()), folder, "outside")
    assert result.recovery.ssim.value == pytest.approx(own.recovery.ssim.value, abs=0.01)
    assert any("taken on trust" in warning for warning in result.warnings)


def test_a_mean_face_is_no_better_than_a_floor(finished, observed, submitted):
    own, folder, faces = finished
    guess = mean_face(torch.from_numpy(observed["faces"]), len(faces))
    result, directory = score(submitted(faces=guess.numpy(), observed=observed["observed"]), folder, "guess")
    assert result.attack.above_floor is False
    assert result.recovery.ssim.value == pytest.approx(own.recovery.floors["mean_face"].ssim.value)
    assert any(warning.startswith(NO_BETTER) for warning in result.warnings)
    assert directory.name.startswith("fixed-subset-submitted-guess-whitebox")


def test_reports_mark_what_was_submitted(finished, submitted, tmp_path):
    _, folder, faces = finished
    result, directory = score(submitted(faces=faces.numpy()), folder, "theirs")
    render_result(result, directory)
    write_report([folder, directory], tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "submitted:theirs" in page
    assert "submitted: run elsewhere, scored here" in page
    shutil.copytree(directory, tmp_path / "alone" / "run")
    write_leaderboard(tmp_path / "alone", tmp_path / "board")
    assert "submitted:theirs (whitebox)" in "".join(file.read_text() for file in (tmp_path / "board").glob("*.csv"))
    with pytest.raises(UsageError, match="is a submission itself"):
        score(submitted(faces=faces.numpy()), directory)


def test_pictures_in_a_folder(finished, observed, tmp_path):
    own, folder, faces = finished
    mine = tmp_path / "pictures"
    mine.mkdir()
    for number, face in enumerate(faces):
        pixels = (face * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(mine / f"set2-face_{number + 1}.png")
    (mine / "observed.txt").write_text(f"{observed['observed'].item()}\n")
    (mine / "notes.md").write_text("how it was done")
    result, _ = score(mine, folder)
    assert result.recovery.ssim.value == pytest.approx(own.recovery.ssim.value, abs=1e-3)
    assert result.attack.details["observed"] == observed["observed"].item()
    (mine / "set2-face_3.png").unlink()
    with pytest.raises(DataError, match="no picture 3"):
        score(mine, folder)
    Image.fromarray(pixels).save(mine / "other-3.png")
    assert len(read_submission(mine, len(faces), 32).faces) == len(faces)
    Image.fromarray(pixels).save(mine / "another-3.png")
    with pytest.raises(DataError, match="have one number, 3"):
        score(mine, folder)
    (mine / "another-3.png").rename(mine / "nameless.png")
    with pytest.raises(DataError, match="no number in its name"):
        score(mine, folder)
    Image.fromarray(pixels[:16]).save(mine / "nameless.png")
    (mine / "nameless.png").rename(mine / "4.png")
    (mine / "set2-face_4.png").unlink()
    with pytest.raises(DataError, match=r"4\.png are 16 x 32, the run's 32 x 32"):
        score(mine, folder)


def _packed(header, body=b""):
    """An ``.npz`` file of one array with this header."""
    buffer, text = io.BytesIO(), header.encode() + b"\n"
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("faces.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + body)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_packed("(" * 9000), "no .npz file of plain arrays"),
        (_packed("{'descr': '|u1', 'fortran_order': False, 'shape': (9000000, 3, 1000, 1000)}"), "no .npz file"),
        (_packed("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps([0])), "no .npz file"),
        (_packed("{'descr': '|u1', 'fortran_order': False, 'shape': (80, 3, 624, 624)}", bytes(93 * 2**20)), "unpacks"),
        (_packed("{'descr': '|u1', 'fortran_order': False, 'shape': (4,)}", bytes(4))[:-60], "no .npz file"),
    ],
    ids=["nested", "huge", "objects", "bomb", "cut"],
)
def test_hostile_arrays(tmp_path, content, message):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_submission(tmp_path / "mine.npz", 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda faces: faces[1:], r"holds \d+ faces, the run has \d+ victims"),
        (lambda faces: faces[:, :, ::2, ::2], "16 x 16, the run's 32 x 32: resize"),
        (lambda faces: faces * 255, "floats lie in"),
        (lambda faces: np.where(faces == faces[3], np.nan, faces), "hold values that are not finite"),
        (lambda faces: faces[:, :1], "must be uint8 or float"),
        (lambda faces: (faces * 255).astype(np.int64), "must be uint8 or float"),
        (lambda faces: np.array(list("abc"), dtype=object), "no .npz file of plain arrays"),
    ],
)
def test_faces_that_cannot_be_scored(finished, submitted, change, message):
    _, folder, faces = finished
    with pytest.raises(DataError, match=message):
        score(submitted(faces=change(faces.numpy())), folder)


def test_other_layouts_and_types_are_the_same_faces(finished, submitted):
    faces = finished[2]
    pixels = (faces * 255).round().to(torch.uint8)
    for array in (pixels.numpy(), pixels.permute(0, 2, 3, 1).numpy(), pixels.double().div(255).numpy()):
        read = read_submission(submitted(faces=array), len(faces), 32)
        torch.testing.assert_close(read.faces, pixels.float() / 255)


def test_files_that_are_no_submission(finished, submitted, tmp_path):
    _, folder, faces = finished
    with pytest.raises(DataError, match="was made from another run"):
        score(submitted(faces=faces.numpy(), observed=np.array("0" * 64)), folder)
    with pytest.raises(DataError, match="no array 'faces'"):
        score(submitted(pictures=faces.numpy()), folder)
    with pytest.raises(UsageError, match="--name"):
        score(submitted(faces=faces.numpy()), folder, "../mine")
    with pytest.raises(MissingError, match="does not exist"):
        score(tmp_path / "none.npz", folder)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"no \.npz file"):
        score(tmp_path / "text.npz", folder)
    (tmp_path / "faces.zip").write_text("")
    with pytest.raises(UsageError, match="a folder of pictures"):
        score(tmp_path / "faces.zip", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        score(tmp_path / "empty", folder)


def test_other_judges_than_the_runs_are_noticed(finished, submitted):
    _, folder, faces = finished
    file = folder / "metrics.json"
    before = file.read_text()
    result = json.loads(before)
    result["evaluator"]["accuracy"]["value"] -= 0.01
    file.write_text(json.dumps(result))
    try:
        with pytest.raises(DataError, match="judges of"):
            score(submitted(faces=faces.numpy()), folder)
    finally:
        file.write_text(before)


def test_a_folder_of_pictures_is_read_no_further_than_what_the_run_needs(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    (tmp_path / "observed.txt").write_text("ab" * 32 + "\n" + " " * 10**6 + "c")
    with pytest.raises(DataError, match="holds 4 faces, the run has 3 victims"):
        read_submission(tmp_path, 3, 8)  # and no word of what cannot be decoded
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert read_submission(tmp_path, 4, 8).observed == "ab" * 32
    (tmp_path / "3.png").unlink()
    (tmp_path / "3.png").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match=r"3\.png: not a regular file"):
        read_submission(tmp_path, 4, 8)
