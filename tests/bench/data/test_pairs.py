from __future__ import annotations

import itertools

import pytest
import torch

from bench.data.pairs import draw_pairs, read_pairs
from bench.errors import DataError, MissingError

VIEW2 = (
    "2\t2\nAnn\t1\t2\nBob\t1\t3\nAnn\t1\tBob\t2\nCy\t1\tBob\t3\nDee\t1\t2\nDee\t2\t3\nDee\t1\tEve\t2\nEve\t1\tDee\t1\n"
)


def write(tmp_path, text):
    path = tmp_path / "pairs.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_view_2(tmp_path):
    listed = read_pairs(write(tmp_path, VIEW2))
    assert listed.folds == 2
    assert listed.same.tolist() == [True, True, False, False] * 2
    assert [p.fold for p in listed.pairs] == [0] * 4 + [1] * 4
    assert (listed.pairs[1].first, listed.pairs[1].second) == (("Bob", 1), ("Bob", 3))
    assert (listed.pairs[3].first, listed.pairs[3].second, listed.pairs[3].line) == (("Cy", 1), ("Bob", 3), 5)
    assert listed.names == ("Ann", "Bob", "Cy", "Dee", "Eve")


def test_view_1_and_blanks_and_windows_line_ends(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_bytes(b"1\r\nAnn 1 2\r\n\r\nAnn 1 Bob 2\r\n")
    listed = read_pairs(path)
    assert listed.folds == 1
    assert listed.same.tolist() == [True, False]
    assert listed.pairs[1].line == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_and_line_ends_of_other_editors(tmp_path, encoding, end):
    path, text = tmp_path / "pairs.txt", VIEW2.replace("Eve", "Zo\u00eb").replace("\n", end)
    path.write_bytes(text.encode(encoding))
    if encoding in ("utf-16-le", "utf-16-be"):  # without the mark nothing says so
        with pytest.raises(
            DataError, match=r"pairs\.txt (is not UTF-8 text .*save it as UTF-8|line 1: expected 'folds)"
        ):
            read_pairs(path)
    else:
        assert read_pairs(path).names == ("Ann", "Bob", "Cy", "Dee", "Zo\u00eb")


def test_blanks_among_tabs(tmp_path):
    listed = read_pairs(write(tmp_path, "1 1\nAnn\t1  2\nAnn 1\tBob 2 \n"))
    assert [(pair.first, pair.second) for pair in listed.pairs] == [(("Ann", 1), ("Ann", 2)), (("Ann", 1), ("Bob", 2))]


def test_names_with_blanks_need_tabs(tmp_path):
    listed = read_pairs(write(tmp_path, "1\nJo Doe\t1\t2\nJo Doe\t1\tZoë\t2\n"))
    assert listed.names == ("Jo Doe", "Zoë")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("Ann\t1\t2\n", "line 1: expected 'folds"),
        ("0\n", "line 1: expected 'folds"),
        ("2\t2\nAnn\t1\t2\n", r"line 1: the header promises 2 x \(2 x 2\) = 8 pairs, 1 follow"),
        (VIEW2.replace("Bob\t1\t3\n", "Bob\t1\tAnn\t3\n"), r"line 3: expected 3 columns \(a genuine pair\), found 4"),
        (
            VIEW2.replace("Cy\t1\tBob\t3", "Cy\t1\t3"),
            r"line 5: expected 4 columns \(an impostor pair\), found 3, got 'Cy\\t1\\t3'",
        ),
        (VIEW2.replace("Bob\t1\t3", "Bob\t0\t3"), "line 3: image numbers"),
        (VIEW2.replace("Bob\t1\t3", "Bob\t1\tx"), "line 3: image numbers"),
        (VIEW2.replace("Bob\t1\t3", "Bob\t1\t" + 5000 * "9"), "line 3: image numbers"),
        (5000 * "9" + "\n", "line 1: expected 'folds"),
        (VIEW2.replace("Bob\t1\t3", "Bob\t3\t3"), "line 3: an image is paired with itself"),
        (VIEW2.replace("Cy\t1\tBob\t3", "Bob\t1\tBob\t3"), "line 5: an impostor pair names the same person"),
    ],
)
def test_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path, text))


def test_missing_and_binary(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_bytes(b"1\n\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_pairs(tmp_path / "pairs.txt")


def labels_of(counts: list[int]) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("counts", "per_fold", "folds"),
    [
        ([5] * 40, 600, 10),
        ([30] * 50, 20, 10),
        ([2] * 10 + [1] * 100, 600, 10),
        ([2, 3, 4, 1, 1], 600, 2),
        ([40, 2, 1, 1, 1, 1], 600, 2),
        ([6] * 7, 600, 3),
    ],
)
def test_drawn_pairs(counts, per_fold, folds):
    labels = labels_of(counts)
    pairs = draw_pairs(labels, generator(), per_fold=per_fold)
    first, second = labels[pairs.first], labels[pairs.second]
    assert torch.equal(first == second, pairs.same)
    assert (pairs.first != pairs.second).all()
    unordered = torch.stack([torch.minimum(pairs.first, pairs.second), torch.maximum(pairs.first, pairs.second)])
    assert len(unordered.unique(dim=1).T) == len(pairs)
    assert pairs.fold.unique().tolist() == list(range(folds))
    people = []
    for fold in range(folds):
        here = pairs.fold == fold
        assert 0 < 2 * int(pairs.same[here].sum()) == int(here.sum()) <= per_fold
        people.append(set(first[here].tolist()) | set(second[here].tolist()))
    assert all(fold.isdisjoint(other) for fold, other in itertools.combinations(people, 2))


def test_all_pairs_are_used_where_they_are_few():
    # Two folds of identities with 3 and 3 images each: 6 genuine pairs, 9 impostor pairs a fold.
    pairs = draw_pairs(labels_of([3] * 4), generator())
    assert torch.bincount(pairs.fold[pairs.same]).tolist() == [6, 6]
    assert torch.bincount(pairs.fold[~pairs.same]).tolist() == [6, 6]


def test_genuine_pairs_are_spread_over_identities():
    labels = labels_of([50] * 20)
    pairs = draw_pairs(labels, generator(), folds=2, per_fold=40)
    per_person = torch.bincount(labels[pairs.first[pairs.same]], minlength=20)
    assert per_person.tolist() == [2] * 20


def test_every_pair_of_a_person_can_be_drawn():
    labels = torch.tensor([0] * 5 + [1] * 5 + [2, 3])
    pairs = draw_pairs(labels, generator(), per_fold=1000)
    drawn = {frozenset((int(a), int(b))) for a, b in zip(pairs.first, pairs.second, strict=True)}
    # 10 genuine pairs a person, but only 5 impostor pairs (5 images x 1) a fold: half are kept.
    assert len(drawn) == len(pairs) == 20


def test_seed_decides():
    labels = labels_of([4] * 40)
    pairs, again, other = (draw_pairs(labels, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(pairs.first, again.first)
    assert torch.equal(pairs.second, again.second)
    assert not torch.equal(pairs.first[:50], other.first[:50])


@pytest.mark.parametrize("counts", [[], [5], [5, 5], [5, 5, 5], [5, 1, 1, 1, 1], [1] * 20])
def test_too_few(counts):
    with pytest.raises(DataError, match="at least 4 are needed, 2 of them with two images"):
        draw_pairs(labels_of(counts), generator())
