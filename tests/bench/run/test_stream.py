"""``bench run --set stream=true``, tiny: a run from faces on disk is the run from the same faces in memory."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
import tiny_runs
from small_sets import people, picture, write_folder, write_records, write_shards
from tiny_runs import events, made, measured, stages_of

from bench.data.encoded import IdentityView
from bench.data.faces import FaceSet
from bench.errors import BenchError, DataError, MissingError
from bench.nets.checkpoints import load_recogniser
from bench.recognition import state as training_state
from bench.recognition import training
from bench.run.sources import fingerprint

SIZE = 32
TINY = {
    "defense": "pixelate",
    "attack": "linear",
    "probes": 4,
    "evaluator_backbone": "mobilefacenet",
    "dataset_options": {},
    "training": {"epochs": 2, "warmup_epochs": 0, "batch_size": 16, "embedding_size": 16, "precision": "32-true"},
}
#: From disk, whatever cannot be decoded left out.
STREAM = {"stream": True, "stream_on_error": "skip"}


def pipeline(out, root, dataset="insightface", **changes):
    return tiny_runs.pipeline(out, **{**TINY, "data_root": root, "dataset": dataset, **changes})


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """40 people; two of them share a picture, one is a victim, one picture is damaged."""
    everyone, victims = people(40, 6), people(6, 2, first=500)
    everyone[3][1] = everyone[17][2] = picture(900, 0)
    everyone[8][0] = victims[2][1]
    everyone[20][4] = everyone[20][4][:200]
    return write_records(tmp_path_factory.mktemp("pack"), everyone, victims)


@pytest.fixture(scope="module")
def runs(pack, out):
    """One run from memory, one from disk."""
    both = pipeline(out, pack), pipeline(out, pack, **STREAM)
    return [(one, one.run()) for one in both]


def losses(one):
    stages = stages_of(one)
    job = stages.recogniser_job(stages.defense("none", {}), "provider")
    return load_recogniser(stages.cache.path(job.stage, job.key) / "recogniser.safetensors")[1]["losses"]


@pytest.mark.slow
class TestRun:
    def test_both_have_the_same_people_and_gaps(self, runs):
        (memory, one), (disk, other) = runs
        assert other.dataset == one.dataset
        assert other.dataset.skipped == 3
        reasons = [[event["reason"] for event in events(run.directory, "skipped")] for run in (memory, disk)]
        assert reasons[0] == reasons[1]
        assert stages_of(disk).splits.provider.used_names == stages_of(memory).splits.provider.used_names

    def test_both_learn(self, runs):
        memory, disk = (losses(one) for one, _ in runs)
        assert disk != memory  # another order
        assert disk == pytest.approx(memory, rel=0.15)
        assert disk[1] < disk[0]

    def test_public_faces_and_victims_are_in_memory_and_the_others_are_not(self, runs):
        splits = stages_of(runs[1][0]).splits
        kinds = {name: type(part) for name, part in splits.parts.items()}
        assert kinds == {"provider": IdentityView, "evaluator": IdentityView, "public": FaceSet, "victims": FaceSet}
        for one, other in itertools.combinations(splits.parts.values(), 2):
            assert not one.used_names & other.used_names

    def test_what_leaks_is_the_same(self, runs):
        """The attack and its victims are the same to the bit, only the trained judge differs."""
        (_, one), (_, other) = runs
        assert other.recovery.ssim == one.recovery.ssim
        assert other.recovery.psnr == one.recovery.psnr

    def test_a_smaller_memory_trains_no_recogniser_again_and_says_what_it_left(self, runs, pack, out):
        one = pipeline(out, pack, **STREAM, stream_images=12)
        result = one.run()
        assert not [stage for stage in made(one.directory) if stage.startswith(("scan", "recogniser"))]
        assert result.dataset.images["public"] <= 12
        left = result.dataset.details["public_left_on_disk"]
        assert left + result.dataset.images["public"] == runs[1][1].dataset.images["public"]
        assert any("stream_images" in warning for warning in result.warnings)

    def test_the_plan_reads_no_more_than_it_must(self, runs, pack, out, tmp_path):
        known = pipeline(out, pack, **STREAM).plan()
        assert all(stage.cached for stage in known.stages)
        assert known.stages[0].name == "scan"
        assert measured(pipeline(tmp_path / "new", pack, **STREAM), tmp_path)["scan"] > 0
        assert not (tmp_path / "new").exists()


def test_a_defence_is_fitted_to_as_many_faces_as_memory_holds(pack, tmp_path):
    stages = stages_of(pipeline(tmp_path, pack, **STREAM, stream_images=20))
    faces = stages._provider_in_memory()
    assert 12 <= len(faces) <= 20
    assert faces.used_names < stages.splits.provider.used_names


@pytest.mark.slow
def test_a_run_that_was_killed_within_an_epoch_ends_as_one_that_was_not(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOOK_EVERY", 2)
    monkeypatch.setattr(training_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_state, "SAVE_SHARE", 1e9)
    save, saved = training_state.TrainingState.save, []

    def kill(self, history, reached=None):
        save(self, history, reached)
        saved.append(reached)
        if len(saved) == 2:
            raise BenchError("killed")

    whole, broken = (pipeline(tmp_path / name, pack, **STREAM, defense="none") for name in ("whole", "broken"))
    stages = stages_of(whole)
    stages.recogniser(stages.defense("none", {}))
    monkeypatch.setattr(training_state.TrainingState, "save", kill)
    with pytest.raises(BenchError, match="killed"):
        broken.run()
    assert saved[1]["position"] == 4
    monkeypatch.setattr(training_state.TrainingState, "save", save)
    stages = stages_of(broken)
    stages.recogniser(stages.defense("none", {}))
    assert losses(broken) == losses(whole)


class TestRefusal:
    def test_a_dataset_that_cannot_be_streamed(self, bench):
        code, _, line = bench(*["run", "--defense", "none", "--attack", "linear", "--set", "stream=true", "--dry-run"])
        assert code == 2
        assert line.count("\n") == 1
        assert "'synthetic' cannot be streamed (those that can: folder, insightface, lfw, webdataset)" in line

    def test_a_damaged_image(self, pack, tmp_path):
        one = pipeline(tmp_path, pack, stream=True)
        with pytest.raises(DataError, match=r"record 125 at offset .*stream_on_error=skip"):
            stages_of(one).splits  # noqa: B018

    def test_a_missing_shard(self, tmp_path):
        pattern = write_shards(tmp_path / "shards", people(8, 2), shards=3)
        (tmp_path / "shards" / "faces-0001.tar").unlink()
        with pytest.raises(MissingError, match=r"faces-0001\.tar does not exist \(1 of 3 shards are missing\)"):
            stages_of(pipeline(tmp_path, pattern, "webdataset", stream=True)).splits  # noqa: B018


class TestKeys:
    def test_a_pattern_stands_for_its_shards(self, tmp_path):
        pattern = write_shards(tmp_path, people(8, 2), shards=2)
        before = fingerprint(pattern)
        assert fingerprint(pattern) == before
        os.utime(tmp_path / "faces-0001.tar", (1, 1))
        assert fingerprint(pattern) != before

    def test_a_folder_stands_for_its_files(self, tmp_path):
        root = write_folder(tmp_path / "faces", people(3, 2))
        before = fingerprint(root)
        (root / "p001" / "p001_0002.jpg").unlink()
        assert fingerprint(root) != before

    def test_a_record_that_an_archive_cannot_set_counts(self, tmp_path):
        root = write_folder(tmp_path / "faces", people(3, 2))
        file = root / "p001" / "p001_0002.jpg"
        before, times, content = fingerprint(root), file.stat(), bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert fingerprint(root) != before

    def test_hidden_files_and_the_runs_do_not_count(self, tmp_path):
        root = write_folder(tmp_path / "faces", people(3, 2))
        before = fingerprint(root, root / "runs")
        (root / "p001" / ".DS_Store").write_text("x")
        (root / "runs" / "cache").mkdir(parents=True)
        (root / "runs" / "cache" / "x.jpg").write_text("x")
        assert fingerprint(root, root / "runs") == before
        assert fingerprint(root) != before

    def test_what_the_faces_depend_on(self, pack, out, tmp_path):
        def keys(root=pack, **changes):
            stages = stages_of(pipeline(out, root, **changes))
            return stages.faces_key, stages.data_key

        memory, disk = keys(), keys(**STREAM)
        assert keys(stream_images=100, stream_on_error="skip") == memory  # say nothing where nothing is streamed
        held = keys(**STREAM, stream_images=100)
        assert held[0] == disk[0] != memory[0]
        assert len({memory[1], disk[1], held[1]}) == 3
        moved = shutil.copytree(pack, tmp_path / "moved")
        assert (keys(moved), keys(moved, **STREAM)) == (memory, disk)

    @pytest.mark.parametrize("changes", [{}, STREAM], ids=["memory", "disk"])
    def test_data_are_known_by_what_they_show(self, tmp_path, changes):
        """Another picture under the name, size and time of an old one is other data; a file beside it is not."""
        root = write_folder(tmp_path / "faces", people(8, 3))

        def key():
            return stages_of(pipeline(tmp_path / "out", root, "folder", **changes)).data_key

        def show(person):
            """One picture or another, of one size in bytes and one time."""
            (root / "p001" / "p001_0002.jpg").write_bytes(picture(person, 1).ljust(4096, b"\0"))
            os.utime(root / "p001" / "p001_0002.jpg", (1, 1))

        show(1)
        before = key()
        (root / "p001" / ".DS_Store").write_text("x")
        (root / "runs").mkdir()
        (root / "runs" / "notes.txt").write_text("x")
        assert key() == before
        show(77)
        assert key() != before


@pytest.mark.parametrize("how", [{}, STREAM], ids=["memory", "disk"])
def test_a_limit_leaves_the_verification_set_whole_and_has_keys_of_its_own(pack, tmp_path, how):
    whole, limited = (stages_of(pipeline(tmp_path, pack, **how, **more)) for more in ({}, {"limit": 150}))
    splits = limited.splits
    assert 100 < sum(len(part) for name, part in splits.parts.items() if name != "victims") <= 150
    assert len(splits.pairs) == len(whole.splits.pairs)
    assert limited.data_key != whole.data_key
    if how:
        assert limited.data["dataset"].scan_job().key != whole.data["dataset"].scan_job().key
