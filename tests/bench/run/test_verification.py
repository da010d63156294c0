"""Further verification packs in a run: one figure each, beside the victims', and nothing else changes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from small_sets import people, write_pairs, write_records
from tiny_runs import PACKED, made, pipeline, stages_of

from bench.data.faces import FaceSet
from bench.errors import DataError, MissingError
from bench.measures import kind_at
from bench.metrics.verification import lfw_accuracy, pair_scores
from bench.recognition.embed import embed_faces
from bench.results import Verification, measures


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 people to learn from, the victims' pack, a copy of it, and one in which learners stand among others."""
    everyone, victims = people(40, 4), people(6, 2, first=500)
    folder = write_records(tmp_path_factory.mktemp("packs"), everyone, victims)
    shutil.copy(folder / "lfw.bin", folder / "cfp_fp.bin")
    write_pairs(folder / "agedb_30.bin", [*people(8, 2, first=600), *everyone])
    return folder


@pytest.fixture(scope="module")
def alone(out, root):
    cell = pipeline(out, **PACKED, data_root=root, verify="none")
    return cell.run(), cell


@pytest.fixture(scope="module")
def run(alone, out, root):
    cell = pipeline(out, **PACKED, data_root=root)
    return cell.run(), cell


def test_every_pack_is_verified_and_nothing_else_is_made(run, alone):
    result, cell = run
    assert list(result.utility.protocols) == ["agedb_30", "cfp_fp"]
    expected = [f"verify-{pack}-{of}" for pack in ("agedb_30", "cfp_fp") for of in ("pixelate", "none")]
    assert made(cell.directory) == expected
    assert alone[0].utility.protocols == {}
    assert result.utility.model_copy(update={"protocols": {}}) == alone[0].utility
    assert (result.recovery, result.dataset) == (alone[0].recovery, alone[0].dataset)
    assert not [warning for warning in alone[0].warnings if ".bin: " in warning]


def test_a_pack_of_the_victims_has_their_figures(run):
    utility = run[0].utility
    victims = utility.model_dump(include=set(Verification.model_fields))
    assert utility.protocols["cfp_fp"].protected.model_dump() == victims
    assert utility.protocols["cfp_fp"].unprotected == utility.unprotected


def test_whom_the_recogniser_learns_from_is_left_out(run, root):
    result, cell = run
    (warning,) = (warning for warning in result.warnings if warning.startswith("agedb_30.bin: "))
    stages = stages_of(cell)
    learners = stages.splits.provider
    assert f"of {learners.identities} people whose image a recogniser learns from are left out" in warning
    pack = stages.verification_set(root / "agedb_30.bin")
    used = torch.unique(torch.cat((pack.pairs.first, pack.pairs.second)))
    assert not pack.faces.subset(used).among(learners.images).any()
    assert result.utility.protocols["agedb_30"].protected.pairs == len(pack.pairs) < 2 * 48


def test_the_figures_are_those_of_the_recognisers(run, root):
    result, cell = run
    stages = stages_of(cell)
    pack = stages.verification_set(root / "agedb_30.bin")
    for of, name in (("protected", "pixelate"), ("unprotected", "none")):
        defense = stages.defense(name, {})
        embeddings = embed_faces(
            stages.recogniser(defense), defense, pack.faces, generators=lambda _: torch.Generator(), batch_size=16
        )
        expected = lfw_accuracy(pair_scores(embeddings, pack.pairs), pack.pairs.same, pack.pairs.fold).mean
        figures = getattr(result.utility.protocols["agedb_30"], of)
        assert figures.accuracy.value == pytest.approx(expected)


def test_every_figure_of_a_pack_is_known(run):
    places = [place for place, _ in measures({"utility": run[0].utility}) if ".protocols." in place]
    assert {kind_at(place).heading for place in places} == {"accuracy", "AUC", "EER", "TAR@FAR"}


def test_of_faces_on_disk_the_same_people_are_left_out(run, root, out):
    memory = stages_of(run[1]).verification_set(root / "agedb_30.bin")
    stages = stages_of(pipeline(out, **PACKED, data_root=root, stream=True))
    assert not isinstance(stages.splits.provider, FaceSet)
    disk = stages.verification_set(root / "agedb_30.bin")
    assert (disk.key, disk.notes) == (memory.key, memory.notes)


def test_a_template_defence_enrols_and_matches_the_pairs_of_a_pack(run, out, root):
    stages = stages_of(pipeline(out, **PACKED | {"defense": "biohash", "attack": "template"}, data_root=root))
    defense = stages.defense("biohash", {})
    pack = stages.verification_set(root / "cfp_fp.bin")
    scores = stages.do(stages.verification_job(defense, pack))
    first, second = stages.do(stages.embeddings_job(defense, pack))
    assert scores.shape == (len(pack.pairs),)
    victims = stages.do(stages.embeddings_job(defense))
    np.testing.assert_allclose(first, victims[0], atol=1e-6)
    np.testing.assert_allclose(second, victims[1], atol=1e-6)
    # Templates are the closer the closer the faces are, whatever the keys of a pack.
    assert np.corrcoef(scores, (first * second).sum(dim=1))[0, 1] > 0.8


def test_what_cannot_be_verified_is_refused_before_anything_is_trained(out, root, tmp_path):
    with pytest.raises(MissingError, match=r"has no pack 'calfw\.bin' \(it has agedb_30\.bin, cfp_fp\.bin, lfw\.bin\)"):
        pipeline(tmp_path, **PACKED, data_root=root, verify="lfw,calfw")
    damaged = tmp_path / "calfw.bin"
    damaged.write_bytes(b"no pack")
    cell = pipeline(tmp_path, **PACKED, data_root=root, verify=damaged)
    with pytest.raises(DataError, match=r"calfw\.bin is no verification pack"):
        cell.run()
    assert made(cell.directory) == []


def test_a_pack_without_a_pair_left_is_named(out, root, tmp_path):
    write_pairs(tmp_path / "calfw.bin", people(40, 2))
    cell = pipeline(out, **PACKED, data_root=root, verify=tmp_path / "calfw.bin")
    stages = stages_of(cell)
    names = stages.splits.provider.used_names
    everyone = people(40, 2)
    write_pairs(tmp_path / "calfw.bin", [everyone[int(name.removeprefix("train:"))] for name in sorted(names)])
    with pytest.raises(DataError, match="pack calfw: verification needs both genuine and impostor pairs"):
        cell.run()
