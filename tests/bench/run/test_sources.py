"""Three roles, three data sets: who is where, what depends on what, and 24 people of one's own as victims."""

from __future__ import annotations

import shutil
import tomllib

import pytest
import torch
from PIL import Image
from small_sets import people, picture, write_folder, write_pairs, write_records
from tiny_runs import TINY, finished, made, pipeline, stages_of

from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.errors import DataError, MissingError, UsageError
from bench.run.config import resolve, write_config

FAST = {
    "defense": "pixelate",
    "attack": "linear",
    "probes": 8,
    "batch_size": 16,
    "training": {**TINY["training"], "batch_size": 16, "embedding_size": 16},
}
OWN, PHOTOGRAPHS = 24, 3


def write_own(root, count=OWN, images=PHOTOGRAPHS):
    """Photographs of so many people, rendered, as somebody keeps them: a folder a person."""
    options = SyntheticOptions(identities=count, images_per_identity=images, image_size=32, seed=5)
    faces = load_synthetic(options).in_memory
    for number, (image, label) in enumerate(zip(faces.images, faces.labels.tolist(), strict=True)):
        (root / f"Person_{chr(65 + label)}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"Person_{chr(65 + label)}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own(tmp_path_factory.mktemp("own") / "photographs")


@pytest.fixture(scope="module")
def first_look(out, own):
    return finished(out, **FAST, victims=f"folder:{own}")


def test_people_of_ones_own_are_the_victims(first_look, own):
    result, directory = first_look
    assert result.status == "success"
    assert result.dataset.name == "folder"
    assert result.dataset.sources == {"victims": "folder", "dataset": "synthetic"}
    assert result.dataset.synthetic  # who is learnt from is
    assert result.dataset.identities["victims"] == OWN
    assert result.dataset.images["victims"] == OWN * PHOTOGRAPHS
    # All others come from the rendered faces, of whom no share goes to victims.
    others = {part: count for part, count in result.dataset.identities.items() if part != "victims"}
    assert sum(others.values()) == round(40 * 0.92)
    assert "-folder-seed0-" in directory.name
    assert result.recovery.ssim.n == 8
    assert result.utility.accuracy.n > 0


def test_the_plan_of_such_a_run_knows_what_is_there(first_look, out, own):
    plan = pipeline(out, **FAST, victims=f"folder:{own}").plan()
    assert [stage.name for stage in plan.stages if not stage.cached] == []
    assert plan.stages[0].name == "data"
    assert any(f"about {OWN * PHOTOGRAPHS} victim images" in stage.what for stage in plan.stages)


def test_other_victims_train_no_recogniser_again(first_look, out, tmp_path):
    fewer = write_own(tmp_path / "fewer", 8)
    result, directory = finished(out, **FAST, victims=f"folder:{fewer}")
    assert result.dataset.identities["victims"] == 8
    assert not [stage for stage in made(directory) if stage.startswith(("recogniser", "data"))]


# -- what depends on what ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Learners, the victims of ``lfw.bin``, others in ``cfp_fp.bin``, and a learner among those of ``agedb_30.bin``."""
    everyone = people(20, 3)
    folder = write_records(tmp_path_factory.mktemp("packs"), everyone, people(6, 2, first=500))
    write_pairs(folder / "cfp_fp.bin", people(7, 2, first=600))
    write_pairs(folder / "agedb_30.bin", [everyone[4], *people(5, 2, first=700)])
    return folder


def provider(out, root=None, **settings):
    """The stages of a run, and the job of its recogniser of plain faces."""
    given = {"dataset": "insightface", "dataset_options": {}, "data_root": root} if root else {}
    stages = stages_of(pipeline(out, **FAST, **given, **settings))
    return stages, stages.recogniser_job(stages.defense("none", {}), "provider")


def pack(name):
    return {"dataset_options": {"pack": f"{name}.bin"}}


def test_another_pack_takes_the_same_recogniser(packs, out):
    given = {"dataset": "insightface", "data_root": packs, "verify": "none"}
    stages, job = provider(out, **given, **pack("lfw"))
    stages.do(job)
    other, again = provider(out, **given, **pack("cfp_fp"))
    assert other.splits.victims.identities == 7
    assert other.splits.provider.used_names == stages.splits.provider.used_names
    assert (again.stage, again.key) == (job.stage, job.key)
    assert other.cache.holds(again.stage, again.key)
    assert other.data_key != stages.data_key
    judge = [s.recogniser_job(s.defense("none", {}), "evaluator").key for s in (stages, other)]
    assert judge[0] == judge[1]


def test_a_pack_with_a_learner_in_it_does_not(packs, out):
    given = {"dataset": "insightface", "data_root": packs, "verify": "none"}
    _, job = provider(out, **given, **pack("lfw"))
    other, again = provider(out, **given, **pack("agedb_30"))
    assert other.splits.excluded == ("train:000004",)
    assert again.key != job.key


def test_neither_attackers_nor_victims_of_another_set_change_what_is_trained(packs, out, tmp_path):
    train = write_folder(tmp_path / "train", people(12, 3, first=1000))
    attack = [write_folder(tmp_path / f"attack{n}", people(6 + n, 3, first=2000 + 100 * n)) for n in range(2)]
    runs = [
        provider(
            out, train_data=f"folder:{train}", attack_data=f"folder:{attack[one]}", victims=f"insightface:{packs / of}"
        )
        for one, of in ((0, "lfw.bin"), (1, "lfw.bin"), (0, "cfp_fp.bin"))
    ]
    assert len({job.key for _, job in runs}) == 1
    assert len({stages.data_key for stages, _ in runs}) == 3
    assert [stages.splits.public.identities for stages, _ in runs] == [6, 7, 6]
    assert "dataset" not in runs[0][0].data  # nothing is rendered that nobody asks for
    moved = shutil.copytree(train, tmp_path / "moved")
    same = provider(
        out, train_data=f"folder:{moved}", victims=f"insightface:{packs / 'lfw.bin'}", attack_data=f"folder:{attack[0]}"
    )
    assert same[1].key == runs[0][1].key
    (moved / "p003" / "p003_0001.jpg").write_bytes(picture(1003, 77))
    other = provider(
        out, train_data=f"folder:{moved}", victims=f"insightface:{packs / 'lfw.bin'}", attack_data=f"folder:{attack[0]}"
    )
    assert other[1].key != runs[0][1].key


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "disk"])
def test_who_is_in_two_sets_is_left_out_of_one_and_said(packs, out, tmp_path, stream):
    train = write_folder(tmp_path / "train", people(12, 3, first=1000))
    (train / "p000").rename(train / "Jo_Doe")
    victims = write_folder(tmp_path / "victims", people(8, 3, first=3000))
    (victims / "p001").rename(victims / "jo_doe")
    (victims / "p002" / "p002_0001.jpg").write_bytes(picture(1005, 1))  # of p005 of those who are trained on
    attack = write_folder(tmp_path / "attack", people(6, 3, first=2000))
    (attack / "p002" / "p002_0001.jpg").write_bytes(picture(1007, 2))
    (attack / "p003" / "p003_0001.jpg").write_bytes(picture(3004, 0))
    sets = {"train_data": f"folder:{train}", "attack_data": f"folder:{attack}", "victims": f"folder:{victims}"}
    stages, _ = provider(out, **sets, stream=stream)
    splits = stages.splits
    trained = splits.provider.used_names | splits.evaluator.used_names
    assert {"Jo_Doe", "p005"}.isdisjoint(trained)
    assert len(trained) == 10
    assert splits.public.used_names == {"p000", "p001", "p004", "p005"}
    assert len(splits.victims.used_names) == 8
    assert sorted(splits.excluded) == ["Jo_Doe", "p005"]
    told = " ".join(splits.notes)
    assert "2 people of train_data are left out, for a victim shares an image or a name with them" in told
    assert "1 people of attack_data are left out, for a victim" in told
    assert "1 people of attack_data are left out, for somebody who is trained on" in told


# -- what is refused ---------------------------------------------------------------------------------


def test_too_few_people_are_told_what_to_do(own, out, tmp_path):
    alone = {"dataset": "folder", "data_root": own, "dataset_options": {}}
    with pytest.raises(
        DataError, match=r"24 identities are too few to share out .*: at least 3\d are needed \(people of y"
    ):
        stages_of(pipeline(out, **FAST, **alone)).splits  # noqa: B018
    with pytest.raises(DataError, match=r"--victims folder:PATH, with others to learn from at --dataset"):
        stages_of(pipeline(out, **FAST, **alone)).splits  # noqa: B018
    three = write_own(tmp_path / "three", 3)
    with pytest.raises(
        DataError, match=r"^3 identities of victims are too few .*: at least 4 are needed, with two ima"
    ):
        stages_of(pipeline(out, **FAST, victims=f"folder:{three}")).splits  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"victims": "photos"},
            UsageError,
            r"victims.*write DATASET:FOLDER, such as folder:photos; datasets are folder, ",
        ),
        ({"train_data": "folder"}, UsageError, r"train_data.*say where folder lies: folder:FOLDER"),
        ({"attack_data": "folder:/nowhere/faces"}, MissingError, r"^--attack-data: /nowhere/faces does not exist$"),
        ({"source_options": {"victims": {"crop": 0.8}}}, UsageError, r"source_options\.victims: there is no victims"),
        (
            {"distractors": "synthetic", "source_options": {"distractors": {"crop": 0.8}}},
            UsageError,
            r"^dataset 'synthetic' has no option 'crop': available: identities, ",
        ),
    ],
)
def test_what_names_no_data_set_is_one_line(out, settings, error, message):
    with pytest.raises(error, match=message):
        pipeline(out, **FAST, **settings)


def test_options_reach_their_data_set(own, out):
    named = {"victims": f"folder:{own}"}
    whole, part = (
        stages_of(pipeline(out, **FAST, **named, source_options=options)).data["victims"].source.in_memory.images
        for options in ({}, {"victims": {"crop": 0.5}})
    )
    middle = torch.nn.functional.interpolate(whole[:, :, 8:24, 8:24].float(), size=(32, 32), mode="bilinear")
    assert (part.float() - middle).abs().mean() < 4 < (part.float() - whole.float()).abs().mean()


def test_a_written_configuration_is_the_same_run(own, tmp_path):
    settings = {**TINY, **FAST, "victims": f"folder:{own}", "source_options": {"victims": {"crop": 0.5}}}
    config = resolve(settings, {})
    write_config(config, tmp_path / "run.toml")
    assert tomllib.loads((tmp_path / "run.toml").read_text())["source_options"] == {"victims": {"crop": 0.5}}
    assert resolve({}, {}, tmp_path / "run.toml") == config
