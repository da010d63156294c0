"""Which packs are verified beside the victims, and what one of them becomes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_sets import people, write_pairs, write_records

from bench.data.decode import decode_batch, in_array
from bench.errors import DataError, MissingError, UsageError
from bench.run.protocols import check_packs, find_packs, load_pack

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """``train.rec`` with ``lfw.bin``, ``cfp_fp.bin`` (of larger images) and ``agedb_30.bin``."""
    folder = write_records(tmp_path_factory.mktemp("packs"), people(6, 3), people(4, 2, first=500))
    write_pairs(folder / "cfp_fp.bin", people(5, 2, size=48, first=600))
    write_pairs(folder / "agedb_30.bin", people(4, 2, first=700))
    return folder


def found(*asked, root, dataset="insightface", **options):
    return list(find_packs([Path(name) for name in asked], dataset, root, options))


def test_by_default_all_beside_the_one_of_the_victims(root):
    assert found(root=root) == ["agedb_30", "cfp_fp"]
    assert found(root=root, pack="cfp_fp.bin") == ["agedb_30", "lfw"]
    assert found("none", root=root) == []


def test_the_default_is_no_pack_where_the_victims_are_of_none(root, tmp_path):
    assert found(root=root / "train.rec") == []
    assert found(root=None, dataset="synthetic") == []
    assert found(root=tmp_path, dataset="folder") == []


def test_a_pack_alone_is_that_of_the_victims(root):
    assert found(root=root / "lfw.bin") == []
    assert found("lfw", "cfp_fp", root=root / "lfw.bin") == ["cfp_fp"]


def test_packs_are_named_or_pointed_at(root):
    assert found("lfw", "cfp_fp.bin", "agedb_30", root=root) == ["cfp_fp", "agedb_30"]
    assert found(root / "cfp_fp.bin", root=None, dataset="synthetic") == ["cfp_fp"]
    assert found("cfp_fp", root=root / "train.rec") == ["cfp_fp"]
    assert found("cfp_fp", root=root, dataset="folder") == ["cfp_fp"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (["calfw"], MissingError, r"has no pack 'calfw\.bin' \(it has agedb_30\.bin, cfp_fp\.bin, lfw\.bin\)$"),
        (["elsewhere/calfw.bin"], MissingError, "^--verify: there is no verification pack elsewhere/calfw.bin$"),
        (["none", "lfw"], UsageError, "^--verify none leaves out all packs: name packs, or none$"),
        (["cfp_fp", "cfp_fp"], UsageError, "^--verify: two packs are called cfp_fp: give each a name of its own$"),
    ],
)
def test_what_cannot_be_found_is_one_line(root, asked, error, message):
    with pytest.raises(error, match=message):
        found(*asked, root=root)


def test_a_damaged_pack_is_refused_with_the_way_out(root, tmp_path):
    check_packs([root / "lfw.bin"])
    whole = (root / "cfp_fp.bin").read_bytes()
    damaged = tmp_path / "cfp_fp.bin"
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"{re.escape(str(damaged))} is no .*damaged.* \(--verify names the packs to m"
    ):
        check_packs([damaged])


def nobody(faces):
    return np.zeros(len(faces), dtype=bool)


def test_a_pack_of_another_size_is_resized(root):
    pack = load_pack(root / "cfp_fp.bin", SIZE, nobody)
    assert (pack.name, pack.faces.size, len(pack.faces), len(pack.pairs), pack.notes) == ("cfp_fp", SIZE, 10, 10, ())
    encoded = [in_array(image) for person in people(5, 2, 48, 600) for image in person]
    expected, _ = decode_batch(encoded, SIZE, exact=True)
    # The first genuine pair is of the first person's two images.
    ends = torch.stack((pack.pairs.first[0], pack.pairs.second[0]))
    assert torch.equal(pack.faces.images[ends], expected[:2])


def test_who_is_learnt_from_is_left_out_with_all_pairs(root):
    whole = load_pack(root / "agedb_30.bin", SIZE, nobody)
    learnt = whole.faces.images[:1]
    pack = load_pack(root / "agedb_30.bin", SIZE, lambda faces: faces.among(learnt))
    person = whole.faces.labels[0]
    ends = torch.stack((whole.faces.labels[whole.pairs.first], whole.faces.labels[whole.pairs.second]))
    kept = (ends != person).all(dim=0)
    assert 0 < int(kept.sum()) == len(pack.pairs) < len(whole.pairs)
    assert torch.equal(pack.pairs.first, whole.pairs.first[kept])
    assert torch.equal(pack.pairs.same, whole.pairs.same[kept])
    assert pack.notes == ("agedb_30.bin: 3 pairs of 1 people whose image a recogniser learns from are left out",)
