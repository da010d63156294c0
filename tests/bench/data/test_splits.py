"""Smaller budgets of faces are parts of larger ones, by whole people."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from PIL import Image

from bench.data.base import Skipped
from bench.data.decode import decode_image
from bench.data.faces import FaceSet, PairProtocol, Source
from bench.data.splits import (
    Splits,
    drop_copies,
    drop_near_copies,
    drop_twins,
    drop_victims,
    split,
    whole_identities,
)
from bench.errors import DataError, UsageError

IMAGES_OF = (3, 1, 4, 2, 5, 1)


@pytest.fixture(scope="module")
def six_people():
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(IMAGES_OF))
    pixels = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 3, 8, 8).clone()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    return FaceSet(pixels, labels[order], tuple("abcdef"))


def take(six_people, budget, seed=0):
    return whole_identities(six_people, budget, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_every_budget_is_a_part_of_the_next(six_people, seed):
    smaller = None
    for budget in range(2, 17):
        taken = take(six_people, budget, seed)
        images = set(taken.images[:, 0, 0, 0].tolist())
        assert len(taken) <= budget or len(taken.names) == 2
        assert smaller is None or smaller <= images
        # Everybody with all their images, under their own name.
        for label, name in enumerate(taken.names):
            assert int((taken.labels == label).sum()) == IMAGES_OF["abcdef".index(name)]
        smaller = images
    assert smaller == set(range(16))


def test_shares_are_of_the_faces(six_people):
    assert take(six_people, 1) is six_people
    assert take(six_people, 1000) is six_people
    assert take(six_people, 0.5).names == take(six_people, 8).names
    # A tenth of a set of 30 is 3, whatever the product is rounded to.
    thirty = FaceSet(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), torch.arange(30), tuple(map(str, range(30))))
    assert len(take(thirty, 0.1)) == 3


def test_two_people_are_the_least(six_people):
    assert len(take(six_people, 0.001).names) == 2


def test_no_budget_is_refused(six_people):
    with pytest.raises(DataError, match="above 0"):
        take(six_people, 0)


def make(values, labels, names):
    """Blank images of the given grey values."""
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return FaceSet(images, torch.tensor(labels), tuple(names), (Skipped("a", "b"),))


@pytest.mark.parametrize("victims", [([4, 5], [0, 1], "cd"), ([9], [0], "za")], ids=["others", "a name without images"])
def test_disjoint_sets_are_left_alone(victims):
    faces = make([1, 2, 3], [0, 0, 1], "ab")
    kept, dropped = drop_victims(faces, make(*victims))
    assert kept is faces
    assert dropped == ()


def test_whole_identities_go_and_labels_stay():
    faces = make([1, 2, 3, 4, 5], [0, 0, 1, 1, 2], "abc")
    kept, dropped = drop_victims(faces, make([9, 2, 8], [0, 1, 1], "cx"))
    assert kept.images[:, 0, 0, 0].tolist() == [3, 4]
    assert kept.labels.tolist() == [1, 1]
    assert kept.names == faces.names
    assert kept.skipped == faces.skipped
    assert [(s.where, s.reason.split()[-1]) for s in dropped] == [("a", "victim"), ("c", "name")]


def noise(seeds: list[int], labels: list[int]) -> FaceSet:
    images = torch.stack(
        [torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(s), dtype=torch.uint8) for s in seeds]
    )
    return FaceSet(images, torch.tensor(labels), tuple("abcdef"))


def test_twins_are_reduced_to_the_one_with_most_images():
    #            a  a  b  b  b  c  c  d  e  e  f
    faces = noise([1, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8], [0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 5])
    kept, dropped = drop_twins(faces)
    # a - b by image 2, b - c by image 4; e repeats an image of its own, which links it to nobody.
    assert kept.used_names == {"b", "d", "e", "f"}
    assert len(kept) == 7
    assert [s.where for s in dropped] == ["a", "c"]
    assert all("shares an identical image with b" in s.reason for s in dropped)


def test_blank_and_nearly_equal_images_make_no_twins():
    faces = noise([1, 2, 3, 4], [0, 1, 2, 3])
    faces.images[0] = faces.images[1] = 7
    faces.images[3] = faces.images[2]
    faces.images[3, 1, 4, 4] ^= 1
    kept, dropped = drop_twins(faces)
    assert kept is faces
    assert dropped == ()


def test_of_the_copies_of_a_person_one_stays():
    #            a  a  a  b  b  c  c
    faces = noise([1, 2, 1, 3, 2, 4, 4], [0, 0, 0, 1, 1, 2, 2])
    kept, dropped = drop_copies(faces)
    assert torch.equal(kept.images, faces.images[[0, 1, 3, 4, 5]])  # what a and b share makes them twins
    assert kept.labels.tolist() == [0, 0, 1, 1, 2]
    assert [(entry.where, "equals another one" in entry.reason) for entry in dropped] == [("a", True), ("c", True)]
    assert drop_copies(kept) == (kept, ())
    blank = FaceSet(torch.full((3, 3, 8, 8), 7, dtype=torch.uint8), torch.tensor([0, 0, 1]), tuple("ab"))
    assert drop_copies(blank)[0].labels.tolist() == [0, 1]


def test_copies_of_a_persons_own_are_no_doubles():
    """Too few people are told how many doubles went, and images are none."""
    learners = faces([3] * 5)
    images = learners.images.clone()
    images[2] = images[1]
    images[14] = images[11]  # persons 4 and 3
    with pytest.raises(DataError, match=r"4 identities \(1 were left out as doubles\) are too few"):
        split(Source("x", FaceSet(images, learners.labels, learners.names)), **SHARES, generator=generator())


def photo(seed):
    """A smooth picture of 64x64 pixels, uint8 (3, 64, 64)."""
    small = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(small, 64, mode="bicubic").clamp(0, 255).to(torch.uint8)[0]


def encoded_anew(image, quality=50):
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return decode_image(buffer.getvalue())


def test_copies_that_were_encoded_anew_resized_or_mirrored():
    first, second = photo(0), photo(1)
    half = torch.nn.functional.interpolate(first[None].float(), 32, mode="area")
    resized = torch.nn.functional.interpolate(half, 64, mode="bilinear").to(torch.uint8)[0]
    darker = (0.7 * first.float()).to(torch.uint8)  # not the same exposure
    images = [first, second, encoded_anew(first), resized, second.flip(2), darker, encoded_anew(second)]
    faces = FaceSet(torch.stack(images), torch.tensor([0, 0, 0, 0, 0, 0, 1]), tuple("ab"))
    kept, dropped = drop_near_copies(faces)
    assert torch.equal(kept.images, faces.images[[0, 1, 5, 6]])
    assert [entry.where for entry in dropped] == ["a"] * 3


def test_no_drawn_pair_is_of_one_image():
    """Of 20 people every third image is a copy, as ``x (1).jpg`` is, and every fourth was encoded anew."""
    photos = [[photo(9 * person + i) for i in range(3)] for person in range(20)]
    images = [image for own in photos for image in (*own, own[0], encoded_anew(own[1]))]
    labels = torch.arange(20).repeat_interleave(5)
    source = Source("x", FaceSet(torch.stack(images), labels, tuple(f"p{i}" for i in range(20))))
    splits = split(source, **SHARES, generator=generator())
    for part in parts_of(splits):
        assert torch.bincount(part.labels).unique().tolist() == [3 if part is splits.victims else 4]
    genuine = splits.victims.images.float()
    apart = (genuine[splits.pairs.first] - genuine[splits.pairs.second]).abs().mean(dim=(1, 2, 3))
    assert apart.min() > 20
    assert len(splits.dropped) == 20 + 4
    assert [note[:30] for note in splits.notes] == ["20 images equal another image ", "4 images of victims look like "]


@pytest.mark.parametrize("synthetic", [True, False])
def test_rendered_faces_are_told_apart_by_their_pixels_only(synthetic):
    images = [image for i in range(8) for image in (photo(2 * i), photo(2 * i + 1), encoded_anew(photo(2 * i)))]
    labels = torch.arange(8).repeat_interleave(3)
    source = Source("x", FaceSet(torch.stack(images), labels, tuple("abcdefgh")), synthetic=synthetic)
    splits = split(source, provider=0.25, public=0.25, evaluator=0, victims=0.5, generator=generator())
    assert len(splits.victims) == (12 if synthetic else 8)


def test_official_pairs_of_one_image_are_left_out_and_said():
    images = torch.stack([photo(0), photo(1), photo(0), photo(2), photo(3), encoded_anew(photo(2))])
    victims = FaceSet(images, torch.tensor([0, 0, 0, 1, 1, 1]), ("v0", "v1"))
    columns = ([0, 2, 1, 3, 2], [1, 0, 2, 5, 4], [True, True, True, True, False], [0, 0, 1, 1, 1])
    pairs = PairProtocol(*map(torch.tensor, columns))
    splits = split(Source("x", faces([4] * 40), victims, pairs), **SHARES, generator=generator())
    assert torch.equal(splits.victims.images, images[[0, 1, 3, 4, 5]])
    ends = list(zip(splits.pairs.first.tolist(), splits.pairs.second.tolist(), strict=True))
    assert ends == [(0, 1), (1, 0), (2, 4), (0, 3)]
    assert (splits.pairs.same.tolist(), splits.pairs.fold.tolist()) == ([True, True, True, False], [0, 1, 1, 1])
    assert [entry.where for entry in splits.dropped] == ["v0"]
    assert splits.notes[0].startswith("1 of the 4 genuine pairs of the dataset's own list show one image twice")
    assert splits.notes[1].startswith("1 of the 3 genuine pairs of the dataset's own list look like one picture")
    images[4] = images[0]  # under another name
    splits = split(
        Source(
            "x",
            faces([4] * 40),
            FaceSet(images, victims.labels, victims.names),
            PairProtocol(torch.tensor([0, 0]), torch.tensor([1, 4]), torch.tensor([True, False]), torch.tensor([0, 1])),
        ),
        **SHARES,
        generator=generator(),
    )
    assert len(splits.pairs) == 2
    assert splits.notes[0].startswith("1 impostor pairs of the dataset's own list show one image under two names")
    only = PairProtocol(*(column[[1, 4]] for column in (pairs.first, pairs.second, pairs.same, pairs.fold)))
    with pytest.raises(DataError, match="all 1 genuine pairs of the dataset show one image twice"):
        split(Source("x", faces([4] * 40), victims, only), **SHARES, generator=generator())


SHARES = {"provider": 0.5, "public": 0.2, "evaluator": 0.1, "victims": 0.2}


def faces(counts: list[int], prefix: str = "p", seed: int = 0) -> FaceSet:
    """Every image differs and carries its identity in its first pixel."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.randint(0, 256, (len(labels), 3, 8, 8), generator=generator(seed)).to(torch.uint8)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    return FaceSet(images, labels, tuple(f"{prefix}{i}" for i in range(len(counts))))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def named(part: FaceSet) -> list[str]:
    return [part.names[i] for i in part.labels.tolist()]


def parts_of(splits: Splits) -> list[FaceSet]:
    return [p for p in (splits.provider, splits.public, splits.evaluator, splits.victims) if p is not None]


def test_shares_out_everything_once():
    source = Source("x", faces([5] * 100))
    splits = split(source, **SHARES, generator=generator())
    parts = parts_of(splits)
    assert [len(p.names) for p in parts] == [50, 20, 10, 20]
    for part in parts:
        assert torch.equal(part.labels.unique(), torch.arange(len(part.names)))
        assert [f"p{i}" for i in part.images[:, 0, 0, 0].tolist()] == named(part)
    for part, other in itertools.combinations(parts, 2):
        assert not part.used_names & other.used_names
    assert len(frozenset().union(*(p.used_names for p in parts))) == 100
    assert sum(map(len, parts)) == 500
    people = splits.victims.labels
    assert torch.equal(people[splits.pairs.first] == people[splits.pairs.second], splits.pairs.same)
    assert splits.pairs.fold.max() == 9


def test_rest_is_left_over():
    source = Source("x", faces([2] * 50))
    splits = split(source, provider=0.2, public=0.2, evaluator=0, victims=0.2, generator=generator())
    assert splits.evaluator is None
    assert [len(p.names) for p in parts_of(splits)] == [10, 10, 10]


def test_seed_decides():
    source = Source("x", faces([3] * 60))
    first, again, other = (split(source, **SHARES, generator=generator(s)) for s in (0, 0, 1))
    assert first.victims.names == again.victims.names
    assert torch.equal(first.pairs.first, again.pairs.first)
    assert first.victims.names != other.victims.names


def test_single_images_are_dealt_in_proportion():
    source = Source("x", faces([3] * 40 + [1] * 160))
    splits = split(source, provider=0.25, public=0.25, evaluator=0.25, victims=0.25, generator=generator())
    for part in parts_of(splits):
        assert len(part.names) == 50
        assert int((torch.bincount(part.labels) > 1).sum()) == 10


def own_victims(counts: list[int]) -> tuple[FaceSet, PairProtocol]:
    victims = faces(counts, "v", seed=9)
    pairs = PairProtocol(
        torch.tensor([0, 0]), torch.tensor([1, counts[0]]), torch.tensor([True, False]), torch.tensor([0, 1])
    )
    return victims, pairs


def test_own_victims_and_pairs_are_kept_and_their_share_is_passed_on():
    victims, pairs = own_victims([3, 2])
    source = Source("x", faces([4] * 80), victims, pairs)
    splits = split(source, **SHARES, generator=generator())
    assert splits.victims.names == victims.names
    assert torch.equal(splits.victims.images, victims.images)
    assert splits.pairs is pairs
    # .5 : .2 : .1 of everything
    assert [len(p.names) for p in (splits.provider, splits.public, splits.evaluator)] == [50, 20, 10]  # type: ignore[union-attr]
    assert split(source, **{**SHARES, "victims": 0.0, "provider": 0.7}, generator=generator()).dropped == ()


def test_own_victims_without_pairs_get_drawn_ones():
    victims = faces([3] * 8, "v", seed=9)
    splits = split(Source("x", faces([4] * 40), victims), **SHARES, generator=generator())
    assert torch.equal(victims.labels[splits.pairs.first] == victims.labels[splits.pairs.second], splits.pairs.same)


def test_victims_among_the_faces_are_dropped_and_listed():
    learners, (victims, pairs) = faces([4] * 40), own_victims([3, 2])
    images = learners.images.clone()
    images[int((learners.labels == 7).nonzero()[0])] = victims.images[3]  # by content
    names = ("v1", *learners.names[1:])  # by name
    source = Source("x", FaceSet(images, learners.labels, names), victims, pairs)
    splits = split(source, **SHARES, generator=generator())
    assert [(s.where, s.reason) for s in splits.dropped] == [
        ("v1", "a victim has this name"),
        ("p7", "shares an identical image with a victim"),
    ]
    learned = frozenset().union(*(p.used_names for p in parts_of(splits)[:-1]))
    assert learned == set(learners.names) - {"p0", "p7"}


def test_twins_never_stand_on_two_sides():
    learners = faces([4] * 60)
    images = learners.images.clone()
    images[4 * 8] = images[4 * 7]
    splits = split(Source("x", FaceSet(images, learners.labels, learners.names)), **SHARES, generator=generator())
    assert [s.where for s in splits.dropped] == ["p8"]
    assert sum(len(p.names) for p in parts_of(splits)) == 59


def test_one_pixel_is_a_difference():
    learners, victims = faces([2] * 4), faces([2] * 4, "v", seed=9)
    nearly = victims.images[0].clone()
    nearly[1, 3, 3] ^= 1
    images = learners.images.clone()
    images[0] = nearly
    images[7] = victims.images[5]
    kept, dropped = drop_victims(FaceSet(images, learners.labels, learners.names), victims)
    assert [s.where for s in dropped] == ["p3"]
    assert kept.used_names == {"p0", "p1", "p2"}


def test_overlap_is_an_error_wherever_it_comes_from():
    a, b, c, d = (faces([2] * n, name) for n, name in ((3, "a"), (3, "b"), (4, "c"), (3, "d")))
    pairs = own_victims([2, 2])[1]
    Splits(a, b, None, c, pairs)
    shared = FaceSet(b.images, b.labels, ("b0", "a2", "b2"))
    for parts, message in (
        ((a, shared, None, c), "provider and public share 1 identities: a2"),
        ((c, d, shared, a), "victims and evaluator share 1 identities: a2"),
        ((a, b, None, a), "provider and victims share 3 identities: a0, a1, a2"),
    ):
        with pytest.raises(DataError, match=message):
            Splits(*parts, pairs)
    unused = FaceSet(b.images, torch.zeros_like(b.labels), ("b0", "a2", "b2"))  # a name nobody answers to
    Splits(a, unused, None, c, pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provider": -0.1}, "share of provider must be between 0 and 1"),
        ({"public": float("nan")}, "share of public must be between"),
        ({"provider": 0}, "share of provider cannot be 0"),
        ({"victims": 0}, "share of victims cannot be 0"),
        ({"public": 0.5}, "add up to more than 1"),
    ],
)
def test_impossible_shares(change, message):
    with pytest.raises(UsageError, match=message):
        split(Source("x", faces([3] * 60)), **{**SHARES, **change}, generator=generator())


def test_too_few_identities_says_how_many_are_needed():
    with pytest.raises(DataError, match=r"^10 identities are too few .* at least (\d+) are needed") as caught:
        split(Source("x", faces([3] * 10)), **SHARES, generator=generator())
    least = int(str(caught.value).split("at least ")[1].split()[0])
    split(Source("x", faces([3] * least)), **SHARES, generator=generator())
    with pytest.raises(DataError, match=f"at least {least} are needed"):
        split(Source("x", faces([3] * (least - 1))), **SHARES, generator=generator())


def test_victims_without_second_images():
    with pytest.raises(DataError, match="too few to draw verification pairs"):
        split(Source("x", faces([1] * 60)), **SHARES, generator=generator())


# -- several data sets -------------------------------------------------------------------------------


def some_of(count, prefix, seed, images=2):
    """People of one data set, with pictures that no other one has."""
    some = faces([images] * count, prefix, seed=seed)
    return Source(prefix, some)


def roles(**changed):
    return {
        "victims": some_of(5, "v", 1),
        "train_data": some_of(12, "t", 2),
        "attack_data": some_of(4, "a", 3),
    } | changed


def test_each_part_has_all_of_its_own_data_set():
    splits = split(roles(), **SHARES, generator=generator())
    assert (splits.victims.identities, splits.public.identities) == (5, 4)
    assert splits.provider.identities + splits.evaluator.identities == 12
    assert splits.provider.identities / 12 == pytest.approx(SHARES["provider"] / 0.6, abs=0.1)
    assert splits.origins == {
        "victims": "victims", "provider": "train_data", "evaluator": "train_data", "public": "attack_data",
    }  # fmt: skip


def test_what_no_data_set_is_named_for_is_shared_out():
    main = some_of(40, "m", 4)
    splits = split({"dataset": main, "victims": some_of(5, "v", 1)}, **SHARES, generator=generator())
    learners = [splits.provider, splits.public, splits.evaluator]
    assert sum(part.identities for part in learners) == 40
    assert splits.public.identities == round(40 * SHARES["public"] / (1 - SHARES["victims"]))
    whole = split(main, **SHARES, generator=generator())
    assert whole.origins == {}
    only = split({"dataset": main}, **SHARES, generator=generator())
    assert torch.equal(only.victims.images, whole.victims.images)


def test_who_is_trained_on_depends_on_no_other_data_set():
    trained = [
        split(roles(**changed), **SHARES, generator=generator()).provider.names
        for changed in ({}, {"victims": some_of(9, "w", 5)}, {"attack_data": some_of(7, "b", 6)})
    ]
    assert trained[0] == trained[1] == trained[2]


def renamed(source, names):
    return Source(source.name, FaceSet(source.faces.images, source.faces.labels, tuple(names)))


def test_names_tell_across_data_sets_and_numbers_do_not():
    victims = renamed(some_of(5, "v", 1), ["lfw:Jo_Doe", "train:000001", "Ann", "person_3", "s7"])
    train = renamed(
        some_of(12, "t", 2),
        ["jo_doe", "000001", "Bob", "person_3", "s7", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida"],
    )
    splits = split(roles(victims=victims, train_data=train), **SHARES, generator=generator())
    assert splits.excluded == ("jo_doe",)
    assert splits.provider.used_names | splits.evaluator.used_names == set(train.faces.names) - {"jo_doe"}
    (told,) = (note for note in splits.notes if "number" in note)
    assert told.startswith(
        "3 people of train_data have the number of one of victims for a name: they are taken for oth"
    )


def test_a_shared_image_tells_across_data_sets():
    attack, train = some_of(4, "a", 3), some_of(12, "t", 2)
    images = attack.faces.images.clone()
    images[0], images[5] = train.faces.images[3], train.faces.images[15]
    attack = Source("a", FaceSet(images, attack.faces.labels, attack.faces.names))
    splits = split(roles(attack_data=attack), **SHARES, generator=generator())
    assert splits.public.used_names == {"a1", "a3"}
    assert splits.excluded == ()
    reasons = {entry.where: entry.reason for entry in splits.dropped}
    assert reasons == dict.fromkeys(("a0", "a2"), "shares an identical image with somebody who is trained on")


def test_names_of_two_data_sets_are_asserted_to_be_apart():
    a, b, c = (faces([2] * 3, name) for name in "abc")
    pairs = own_victims([2, 2])[1]
    both = FaceSet(b.images, b.labels, ("x:ANN", "7", "b2"))
    numbers = FaceSet(a.images, a.labels, ("Ann", "7", "a2"))
    origins = {"provider": "one", "public": "two", "victims": "three"}
    with pytest.raises(DataError, match="provider and public share 1 identities: ann"):
        Splits(numbers, both, None, c, pairs, origins=origins)
    Splits(a, FaceSet(b.images, b.labels, ("7", "8", "b2")), None, c, pairs, origins=origins)


def test_too_few_of_a_role_are_named():
    with pytest.raises(DataError, match=r"^3 identities of victims are too few .* at least 4 are needed, with two"):
        split(roles(victims=some_of(3, "v", 1)), **SHARES, generator=generator())
    with pytest.raises(DataError, match=r"^1 identities of attack_data .*: at least 2 are needed \(leave out"):
        split(roles(attack_data=some_of(1, "a", 9)), **SHARES, generator=generator())
