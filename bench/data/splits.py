"""Sharing out a dataset's identities: provider, public, evaluator and victims, nobody in two of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bench.data.base import Contents, Faces, Skipped, components
from bench.data.encoded import IdentityView
from bench.data.faces import FaceSet, PairProtocol, Source
from bench.data.loaders import MAIN, ROLES
from bench.data.pairs import draw_pairs
from bench.errors import DataError, UsageError
from bench.progress import Report, no_report

F = TypeVar("F", bound=Faces)

#: One entry per identity or image that was left out.
Dropped = tuple[Skipped, ...]

#: One to learn from, one to validate on.
_LEAST_IDENTITIES = 2


def whole_identities(faces: F, budget: float, generator: torch.Generator) -> F:
    """The faces of as many people as fit into a budget, everyone with all their images.

    People are taken in one random order as long as they fit, so that with generators of one state a smaller budget
    gives a part of what a larger one gives. Two people are taken whatever they cost.

    A budget up to 1 is a share of the faces, above 1 their number. The result is ``faces`` itself where all fit, else
    relabelled 0..K-1 with the images in the order of ``faces``.

    Raises:
        DataError: a budget that is not above 0.

    Example:
        >>> import torch
        >>> images, people = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) // 2
        >>> faces = FaceSet(images, people, ("a", "b", "c"))
        >>> len(whole_identities(faces, 5, torch.Generator().manual_seed(0)))
        4
    """
    if not budget > 0:
        raise DataError(f"a budget of faces must be above 0, got {budget}")
    labels = torch.as_tensor(faces.labels)
    people = torch.unique(labels)
    order = people[torch.randperm(len(people), generator=generator)]
    costs = torch.bincount(labels, minlength=faces.identities)[order].cumsum(0)
    limit = budget * len(faces) if budget <= 1 else budget
    # Of a share such as 0.1 of 30, the product may fall short of the whole number by its rounding.
    count = max(int((costs <= limit + 1e-6).sum()), min(_LEAST_IDENTITIES, len(people)))
    if count == len(people):
        return faces
    return faces.of_identities(order[:count].sort().values.numpy())


def telling_name(name: str) -> str | None:
    """What a name says of who somebody is, in whatever data set it stands; None where it is a mere number.

    Data sets put their own marks before a name (``lfw:Jo_Doe``), and number people each for themselves.

    Example:
        >>> telling_name("lfw:Jo_Doe"), telling_name("jo_doe"), telling_name("train:000012"), telling_name("person_7")
        ('jo_doe', 'jo_doe', None, None)
    """
    bare = name.rpartition(":")[2]
    return None if _NUMBERED.fullmatch(bare) else bare.casefold()


#: A number, or one behind a word for what is counted, such as ``person_0007`` and ``s12``.
_NUMBERED = re.compile(r"[^\W\d_]*[-_. ]?\d+")


def drop_victims(faces: F, victims: Faces, whom: str = "a victim", *, elsewhere: bool = False) -> tuple[F, Dropped]:
    """Leave out of ``faces`` every identity that is a victim, by name or by an identical image.

    Datasets name people in ways of their own, so equal names prove an overlap and different ones prove nothing;
    hence the second test. A photo that was cropped or encoded anew escapes both.

    Both have images of one size. ``whom`` is what the others are called; from ``elsewhere``, another data set, names
    prove an overlap only where they are no numbers (:func:`telling_name`).

    Returns the faces that remain, and one entry per identity left out.
    """

    def known(name: str) -> str | None:
        return telling_name(name) if elsewhere else name

    labels = np.asarray(faces.labels)
    reasons = dict.fromkeys(labels[_equal(faces, victims)].tolist(), f"shares an identical image with {whom}")
    named = {known(name) for name in victims.used_names} - {None}
    reasons |= {i: f"{whom} has this name" for i in np.unique(labels).tolist() if known(faces.name(i)) in named}
    return _without(faces, reasons)


def _equal(faces: Faces, others: Faces) -> NDArray[np.bool_]:
    """bool (N,): whether each image equals one of the others pixel for pixel."""
    if isinstance(others, FaceSet):
        return faces.among(others.images)
    return np.isin(faces.digests(), others.digests())


def drop_copies(faces: F) -> tuple[F, tuple[Skipped, ...]]:
    """Leave out every image that equals an earlier one of the same person pixel for pixel: ``x (1).jpg``.

    A pair of them is genuine behind any defence, and says nothing about it.

    Returns the faces that remain, and one entry per image left out.
    """
    kept = faces.firsts() == np.arange(len(faces))
    return _images(faces, kept, "an image of this person that equals another one pixel for pixel")


#: Two pictures of a person are one where their grey thumbnails, of as many pixels a side, differ by less than this
#: share of their contrast (root of the mean square). Measured: JPEG of quality 30, or half the size and back, makes at
#: most 0.10 of faces of 64 pixels; the two most similar photos of one person among 7,701 of LFW differ by 0.26.
THUMBNAIL, NEAR = 16, 0.1


def _thumbnails(images: Tensor) -> Tensor:
    """float32 (N, 2, 256): a small grey version of each image and of its mirror image."""
    small = torch.cat([adaptive_avg_pool2d(part.float().mean(dim=1), THUMBNAIL) for part in images.split(1024)])
    return torch.stack((small, small.flip(2)), dim=1).flatten(2)


def _look_alike(one: Tensor, others: Tensor) -> Tensor:
    """bool (M,): whether thumbnails (2, D) or (M, 2, D), mirrored or not, and ``others`` (M, 2, D) show one picture."""
    apart = (one - others[:, :1]).square().mean(dim=2).sqrt().amin(dim=1)
    return apart < NEAR * others[:, 0].std(dim=1)


def drop_near_copies(faces: FaceSet) -> tuple[FaceSet, tuple[Skipped, ...]]:
    """Leave out every image that looks like an earlier one of the same person: encoded or resized anew, or mirrored.

    Returns the faces that remain, and one entry per image left out.
    """
    small, kept = _thumbnails(faces.images), np.ones(len(faces), dtype=bool)
    for of_person in faces.labels.argsort(stable=True).split(faces.labels.unique(return_counts=True)[1].tolist()):
        rows = of_person.tolist()
        for place, row in enumerate(rows[1:], 1):
            earlier = [other for other in rows[:place] if kept[other]]
            kept[row] = not bool(_look_alike(small[row], small[earlier]).any())
    return _images(faces, kept, "an image of this person that looks like another one, encoded anew or mirrored")


def _images(faces: F, kept: NDArray[np.bool_], reason: str) -> tuple[F, tuple[Skipped, ...]]:
    """The images at ``kept`` (N,), and an entry for each of the others."""
    if kept.all():
        return faces, ()
    others = np.asarray(faces.labels)[~kept].tolist()
    return faces.where_true(kept), tuple(Skipped(faces.name(label), reason) for label in others)


def _official(victims: FaceSet, pairs: PairProtocol) -> tuple[FaceSet, PairProtocol, tuple[Skipped, ...], list[str]]:
    """A dataset's own victims, every image once, and its own pairs of two images; and what is to be said of them.

    Raises:
        DataError: every genuine pair shows one image twice.
    """
    first, genuine, notes = victims.firsts(), int(pairs.same.sum()), []
    kept = first == np.arange(len(first))
    place = np.cumsum(kept) - 1
    ends = [torch.from_numpy(place[first[end.numpy()]]) for end in (pairs.first, pairs.second)]
    two = ends[0] != ends[1]
    if not (kept.all() and two.all()):
        pairs = PairProtocol(*(column[two] for column in (*ends, pairs.same, pairs.fold)))
    victims, copies = _images(victims, kept, "an image of this victim that equals another one pixel for pixel")
    if once := genuine - int(pairs.same.sum()):
        if once == genuine:
            raise DataError(f"all {genuine} genuine pairs of the dataset show one image twice: no figure can be had")
        notes.append(
            f"{once} of the {genuine} genuine pairs of the dataset's own list show one image twice, which matches "
            "behind any defence: they are left out"
        )
    digests = Contents.of(victims.images).digests
    if twice := int((digests[pairs.first[~pairs.same]] == digests[pairs.second[~pairs.same]]).sum()):
        notes.append(
            f"{twice} impostor pairs of the dataset's own list show one image under two names: they are kept, and no "
            "recogniser can tell them apart"
        )
    small = _thumbnails(victims.images)
    if near := int(_look_alike(small[pairs.first[pairs.same]], small[pairs.second[pairs.same]]).sum()):
        notes.append(
            f"{near} of the {genuine - once} genuine pairs of the dataset's own list look like one picture, encoded "
            "anew or mirrored: they are kept, and flatter recognition"
        )
    return victims, pairs, copies, notes


def drop_twins(faces: F) -> tuple[F, tuple[Skipped, ...]]:
    """Leave out identities that share an identical image with another one: most likely one person under two labels.

    Large collections gathered from the web have such people, and a split that took the labels at their word would
    put one of them on either side. Of those that are linked, the one with the most images stays. Blank images
    link nobody.

    Returns the faces that remain, and one entry per identity left out.
    """
    labels = np.asarray(faces.labels)
    links = labels[faces.copies()]
    links = links[links[:, 0] != links[:, 1]]
    component = components(links[:, 0], links[:, 1], faces.identities)
    counts = np.bincount(labels, minlength=faces.identities)
    reasons = {}
    twins = np.unique(links)
    for group in np.unique(component[twins]):
        linked = twins[component[twins] == group]
        stays = int(linked[np.argmax(counts[linked])])
        for identity in linked.tolist():
            if identity != stays:
                reasons[identity] = f"shares an identical image with {faces.name(stays)} or with another twin of it"
    return _without(faces, reasons)


def _without(faces: F, reasons: dict[int, str]) -> tuple[F, tuple[Skipped, ...]]:
    if not reasons:
        return faces, ()
    kept = ~np.isin(np.asarray(faces.labels), sorted(reasons))
    return faces.where_true(kept), tuple(Skipped(faces.name(i), reason) for i, reason in sorted(reasons.items()))


#: Images of each part of a streamed dataset that are held in memory, unless told otherwise.
HOLD = 20_000

#: Identities each part needs: a margin head needs two classes, pairs in two folds need two each.
MINIMUM = {"provider": 2, "public": 2, "evaluator": 2, "victims": 4}


@dataclass(frozen=True, slots=True)
class Splits:
    """Identity-disjoint parts of a dataset, each labelled 0..K-1.

    ``provider`` trains the recogniser (and the defence), ``public`` is what the attacker learns from, ``evaluator``
    (None where none is asked for) trains the second recogniser, which judges identity leakage, and ``victims`` are
    verified, under ``pairs``, and attacked. ``dropped`` are identities that are somebody else as well: a victim, or
    another learner; or images that are there twice. Of a streamed dataset those who train recognisers are on disk;
    ``left_on_disk`` counts the images that the other parts have and memory does not. ``notes`` are sentences that a
    result warns of. ``origins`` names the data set of each part where there are several, and ``excluded`` the people
    who are not learnt from because they are victims of another one.
    """

    provider: FaceSet | IdentityView
    public: FaceSet
    evaluator: FaceSet | IdentityView | None
    victims: FaceSet
    pairs: PairProtocol
    dropped: tuple[Skipped, ...] = ()
    left_on_disk: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {name: part.used_names for name, part in self.parts.items()}
        for (part, a), (other, b) in itertools.combinations(names.items(), 2):
            shared = sorted(a & b)
            if self.origins.get(part) != self.origins.get(other):
                shared = sorted(filter(None, {*map(telling_name, a)} & {*map(telling_name, b)}))
            if shared:
                more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
                raise DataError(f"{part} and {other} share {len(shared)} identities: {', '.join(shared[:5])}{more}")

    @property
    def parts(self) -> dict[str, FaceSet | IdentityView]:
        """The parts that there are, by name."""
        parts = {"provider": self.provider, "public": self.public, "victims": self.victims, "evaluator": self.evaluator}
        return {name: part for name, part in parts.items() if part is not None}


def parts_of(roles: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Data set -> the parts that come from it, where these ``roles`` have one each; the rest come from the main one.

    In the order in which people are placed: who is in two data sets stays in the first, and leaves the others.
    """
    taken = {role: parts for role, parts in ROLES.items() if role in roles}
    rest = tuple(part for part in MINIMUM if not any(part in parts for parts in taken.values()))
    order = sorted([*taken, MAIN], key=lambda role: min((_PLACED.index(p) for p in taken.get(role, rest)), default=9))
    return {role: taken.get(role, rest) for role in order if taken.get(role, rest)}


_PLACED = ("victims", "provider", "evaluator", "public")


@dataclass(slots=True)
class _Placed:
    """What has been shared out so far."""

    parts: dict[str, FaceSet | IdentityView] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: list[Skipped] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_on_disk: dict[str, int] = field(default_factory=dict)


def split(
    source: Source | Mapping[str, Source],
    *,
    provider: float,
    public: float,
    evaluator: float,
    victims: float,
    generator: torch.Generator,
    hold: int = HOLD,
    report: Report = no_report,
) -> Splits:
    """Share out the identities of a dataset at random, or of several, of which each is for some parts alone.

    Shares are of identities. Those with several images and those with one are dealt in the same proportion. Where the
    dataset has victims of its own the victims' share is passed to the others, in proportion. Whoever would stand on
    both sides is dropped and listed (:func:`bench.data.splits.drop_victims` and ``drop_twins``). Of images that are
    there twice one stays (``drop_copies``, and of victims whose pairs are drawn ``drop_near_copies``).

    Several data sets come by the names of :data:`bench.data.loaders.ROLES`, and ``dataset`` where a part has none of
    its own. Who is a victim is dropped from all other sets, and who is trained on from that of the attacker, so that
    what is trained depends on no other set but for the victims in it. The parts of a set of theirs use all of it.

    Of a streamed dataset the same people fall into the same parts as where it is loaded as a whole. Those who train
    recognisers stay on disk; the public faces and the victims are loaded, as many as may be held.

    A streamed dataset has been scanned; ``hold`` is how many images of it each part in memory may have, of whole
    identities drawn at random. Of the shares only ``evaluator`` (and ``victims``, where the dataset has its own) may be
    0; together they are at most 1, and what is left over is not used. That the parts are disjoint is checked, always.

    Raises:
        UsageError: shares that cannot be.
        DataError: too few identities, with the least number that would do; or parts that share someone.
    """
    sources = {MAIN: source} if isinstance(source, Source) else dict(source)
    shares = {"provider": provider, "public": public, "evaluator": evaluator, "victims": victims}
    parts_from = parts_of([role for role in sources if role != MAIN])
    home = next(role for role, parts in parts_from.items() if "victims" in parts)
    official = sources[home].victims
    _check_shares(shares, own_victims=official is not None or home != MAIN)
    start, placed = generator.get_state(), _Placed()
    for role, names in parts_from.items():
        generator.set_state(start)  # what falls into a part depends on no other data set
        given = {name: shares[name] for name in names}
        if role == home and official is not None:
            placed.parts["victims"], placed.origins["victims"] = official, role
            given.pop("victims")
        placed.notes += sources[role].notes
        if given:
            _place(placed, role, sources[role], given, math.fsum(shares.values()) if role == MAIN else 1.0, generator)
            for name in ("public", "victims"):
                if name not in given:
                    continue
                part = placed.parts[name]
                if not isinstance(part, FaceSet):  # nothing is drawn where memory may hold all of it
                    held = part if len(part) <= hold else whole_identities(part, hold, generator)
                    if left := len(part) - len(held):
                        placed.left_on_disk[name] = left
                    placed.parts[name] = held.load(report)
        if role == home:
            pairs = _victims(placed, sources[role], generator)
    public_faces, victim_faces = placed.parts["public"], placed.parts["victims"]
    assert isinstance(public_faces, FaceSet)
    assert isinstance(victim_faces, FaceSet)
    return Splits(
        placed.parts["provider"],
        public_faces,
        placed.parts.get("evaluator"),
        victim_faces,
        pairs,
        tuple(placed.dropped),
        placed.left_on_disk,
        tuple(dict.fromkeys(placed.notes)),
        placed.origins if len(parts_from) > 1 else {},
        tuple(placed.excluded),
    )


def _place(
    placed: _Placed, role: str, source: Source, shares: dict[str, float], total: float, generator: torch.Generator
) -> None:
    """Share out the people of one data set who stand nowhere else; of shares that are 0 there is no part."""
    faces, copies = drop_copies(source.faces)
    faces, twins = drop_twins(faces)
    dropped = list(twins)
    if once := len(copies):
        placed.notes.append(f"{once} images equal another image of the same person pixel for pixel: left out")
    for part, others in placed.parts.items():
        elsewhere, whom = placed.origins[part] != role, _CALLED[part]
        numbered = elsewhere and not source.synthetic and _numbers(faces) & _numbers(others)
        faces, known = drop_victims(faces, others, whom, elsewhere=elsewhere)
        dropped += known
        if part == "victims" and "provider" in shares:
            placed.excluded += [entry.where for entry in known]
        if elsewhere and known:
            placed.notes.append(
                f"{len(known)} people of {role} are left out, for {_WHY[part]}: events.jsonl lists them"
            )
        if numbered:
            placed.notes.append(
                f"{len(numbered)} people of {role} have the number of one of {placed.origins[part]} for a name: they "
                "are taken for others unless they share an image; leave them out yourself if they are not"
            )
    placed.dropped += (*copies, *dropped)
    shares = {name: share * total / math.fsum(shares.values()) for name, share in shares.items() if share > 0}
    images_of = torch.bincount(torch.as_tensor(faces.labels), minlength=faces.identities)
    people = int((images_of > 0).sum())
    counts = _counts(people, shares)
    if not _enough(counts):
        least = next(k for k in itertools.count(people + 1) if _enough(_counts(k, shares)))
        wanted = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
        without = f" ({len(dropped)} were left out as doubles)" if dropped else ""
        of = "" if role == MAIN else f" of {role}"
        raise DataError(
            f"{people} identities{of}{without} are too few to share out as {wanted}: at least {least} are needed"
            + _WAY_OUT.get(role, "")
        )
    for name, identities in _deal(images_of, counts, generator).items():
        placed.parts[name], placed.origins[name] = faces.of_identities(identities.numpy()), role


#: How the parts are called where somebody is in two of them, and why a person of another data set is then left out.
_CALLED = {
    "victims": "a victim",
    "provider": "somebody who is trained on",
    "evaluator": "somebody who is trained on",
    "public": "somebody whom the attacker has",
}
_WHY = {part: f"{who} shares an image or a name with them" for part, who in _CALLED.items()}

#: What to do about too few people.
_WAY_OUT = {
    MAIN: " (people of your own can be the victims alone, 4 of two images do: --victims folder:PATH, with others to "
    "learn from at --dataset, which is synthetic unless you name one)",
    "train_data": " (leave out --train-data, and the recogniser is trained on a share of --dataset)",
    "attack_data": " (leave out --attack-data, and the attacker has a share of --dataset)",
    "victims": ", with two images or more each (add people, or take the victims of another data set: --victims)",
}


def _numbers(faces: Faces) -> set[str]:
    """The names of people that are mere numbers, without what stands before them."""
    return {name.rpartition(":")[2] for name in faces.used_names if telling_name(name) is None}


def _victims(placed: _Placed, source: Source, generator: torch.Generator) -> PairProtocol:
    """The pairs of the victims, who are left without copies of their images."""
    victims = placed.parts["victims"]
    assert isinstance(victims, FaceSet)
    if source.victims is not None:
        victims = victims.of_identities(np.unique(victims.labels))  # same order, hence same pairs
    if source.pairs is not None:
        victims, pairs, copies, said = _official(victims, source.pairs)
        placed.notes += said
    else:
        victims, copies = (victims, ()) if source.synthetic else drop_near_copies(drop_copies(victims)[0])
        if copies:
            placed.notes.append(f"{len(copies)} images of victims look like another image of the same person: left out")
        pairs = draw_pairs(victims.labels, generator)
    placed.parts["victims"] = victims
    placed.dropped += copies
    return pairs


def _check_shares(shares: dict[str, float], *, own_victims: bool) -> None:
    for name, share in shares.items():
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise UsageError(f"the share of {name} must be between 0 and 1, got {share}")
        if share == 0 and not (name == "evaluator" or (name == "victims" and own_victims)):
            raise UsageError(f"the share of {name} cannot be 0")
    if math.fsum(shares.values()) > 1 + 1e-6:
        listed = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise UsageError(f"the shares add up to more than 1: {listed}")


def _counts(people: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers nearest to the shares (largest remainder)."""
    exact = {name: people * share for name, share in shares.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    rest = min(people, round(math.fsum(exact.values()))) - sum(counts.values())
    by_remainder = sorted(shares, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: max(0, rest)]:
        counts[name] += 1
    return counts


def _enough(counts: dict[str, int]) -> bool:
    return all(count >= MINIMUM[name] for name, count in counts.items())


def _deal(images_of: Tensor, counts: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Identities of each part, int64, in ascending order."""
    order = torch.randperm(len(images_of), generator=generator)
    order = torch.cat([order[images_of[order] > 1], order[images_of[order] == 1]])
    unused = len(order) - sum(counts.values())
    slots = {**counts, "": unused}
    # Evenly interleaved slots: any stretch of them, so also the identities with one image, has every part's share.
    place = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1) for n in slots.values()])
    owner = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(list(slots.values())))
    owner = owner[torch.argsort(place, stable=True)]
    return {name: order[owner == i].sort().values for i, name in enumerate(slots) if name}
