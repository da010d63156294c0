"""How much of the identity comes back, judged by a recogniser that neither defence nor attack used.

Definitions (Mai et al., TPAMI 41(5), 2019, for Type I and II), for a recovered face ``r`` of the image ``x`` of person
``p``; ``e`` is the evaluator's L2-normalised embedding, ``t`` its operating threshold on plain faces, and ``g(p)`` one
plain image of ``p`` other than ``x``:

* ``cosine``  ``<e(r), e(x)>``.
* ``type1``   1 where ``<e(r), e(x)> >= t``: the recovery passes for the very image that was protected.
* ``type2``   1 where ``<e(r), e(g(p))> >= t``: it passes for the person, enrolled with another image.
* ``rank1``   1 where, among the plain images ``g(q)`` of all people in the gallery, ``g(p)`` is the nearest to ``r``.
  A tie of ``k`` counts ``1/k``, what guessing among them would get; a constant recovery thus earns chance, no more.
* ``rank5``, ``rank20``  likewise, 1 where ``g(p)`` is among the five, or twenty, nearest: the identification rate at
  rank k, which the literature on face recovery calls Success@k.
* ``knn_distance``  Euclidean distance from ``e(r)`` to the nearest ``e(y)`` over all plain images ``y`` of ``p`` other
  than ``x`` (:func:`knn_distance`).

The means of ``type1`` and ``type2`` over images are the true accept rates. Values stay per image, so that confidence
intervals can resample identities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.faces import FaceSet
from bench.errors import DataError

#: Ranks up to which the person must be found.
RANKS = (1, 5, 20)

#: One person in so many is not attacked.
_BYSTANDERS = 8

_CHUNK = 1024
_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class IdentityLeakage:
    """Identity leakage of each of N recovered faces, float32 (N,); higher is more of the identity.

    ``cosine`` lies in [-1, 1], the others in [0, 1]; all but ``type1`` of these are NaN where the person has no other
    image. ``type1_strict`` and ``type2_strict`` are acceptances at the stricter of two thresholds.
    """

    cosine: Tensor
    type1: Tensor
    type2: Tensor
    rank1: Tensor
    rank5: Tensor
    rank20: Tensor
    type1_strict: Tensor
    type2_strict: Tensor


@dataclass(frozen=True, slots=True)
class Probes:
    """Which images of the victims are attacked and which stay plain, as indices into the victims' faces.

    Attributes:
        attacked: int64 (V,), the images that are protected, intercepted and recovered.
        gallery: int64 (G,), one other plain image of every victim who has one.
    """

    attacked: Tensor
    gallery: Tensor


def select_probes(victims: FaceSet, count: int, generator: torch.Generator) -> Probes:
    """Draw at most ``count`` images to attack, as many people as possible before a second image of anyone.

    One victim in eight, and at least one of several, stays out of it: theirs are the requests of other people that an
    attacker may intercept.

    One image of each person, drawn uniformly, is the gallery. Only people with another image take part, so that type II
    acceptance and rank-1 are defined for every probe. Verification packs repeat images: a copy of the gallery image is
    no probe, or Type II would compare an image with itself.

    Raises:
        DataError: nobody has two different images.
    """
    labels, content = victims.labels, content_ids(victims.images)
    shuffled = torch.randperm(len(labels), generator=generator)
    drawn = shuffled[_occurrence(labels[shuffled]) == 0]
    drawn = drawn[labels[drawn].argsort()]
    person = torch.unique(labels, return_inverse=True)[1]
    candidates = (content != content[drawn][person]).nonzero().squeeze(1)
    gallery = drawn[person[candidates].bincount(minlength=len(drawn)) > 0]
    if not len(gallery):
        raise DataError("no victim has two different images: identity leakage cannot be measured; use a larger dataset")
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    turn = _occurrence(labels[candidates])
    candidates = candidates[turn.argsort(stable=True)]
    people = len(drawn)
    most = max(1, people - max(1, people // _BYSTANDERS))
    attackable = candidates[: len(gallery)]  # of each person one
    candidates = candidates[torch.isin(labels[candidates], labels[attackable[:most]])]
    return Probes(candidates[:count], gallery)


def _occurrence(labels: Tensor) -> Tensor:
    """For each position, how often its label stood before it: int64 (N,)."""
    order = labels.argsort(stable=True)
    ranked = labels[order]
    first = torch.searchsorted(ranked, ranked)
    occurrence = torch.empty_like(order)
    occurrence[order] = torch.arange(len(order)) - first
    return occurrence


def content_ids(images: Tensor, *, batch_size: int = 256) -> Tensor:
    """A number per image, int64 (N,) on the CPU, of uint8 (N, C, H, W).

    Equal for equal images, and else differs (but for a chance of 2^-56). Eight bytes a pixel value are held of
    ``batch_size`` images at once.

    Example:
        >>> import torch
        >>> images = torch.tensor([[[[1, 2]]], [[[2, 1]]], [[[1, 2]]]], dtype=torch.uint8)
        >>> ids = content_ids(images)
        >>> bool(ids[0] == ids[2]), bool(ids[0] == ids[1])
        (True, False)
    """
    if images.dtype != torch.uint8:
        raise DataError(f"images must be uint8, got {images.dtype}")
    if not len(images):
        return torch.empty(0, dtype=torch.int64)
    # Multilinear hash modulo 2^64 with fixed random coefficients (Lemire and Kaser 2014); int64 wraps around.
    seeded = torch.Generator().manual_seed(0)
    coefficients = torch.randint(-(2**63), 2**63 - 1, (images[0].numel(),), generator=seeded, dtype=torch.int64)
    coefficients = coefficients.to(images.device)
    return torch.cat(
        [(b.flatten(1).to(torch.int64) * coefficients).sum(1).cpu() for b in torch.split(images, batch_size)]
    )


def identity_leakage(
    recovered: Tensor,
    originals: Tensor,
    identities: Tensor,
    gallery: Tensor,
    gallery_identities: Tensor,
    threshold: float,
    strict: float = torch.inf,
) -> IdentityLeakage:
    """Identity leakage of recovered faces, as the module defines it.

    Args:
        recovered: float (N, D), evaluator embeddings of the recovered faces.
        originals: float (N, D), of the faces that were protected.
        identities: int64 (N,), whose they are.
        gallery: float (K, D), of one other plain image per person.
        gallery_identities: int64 (K,), all different.
        threshold: cosine from which the evaluator calls two plain faces one person.
        strict: a stricter one, which accepts fewer impostors; none by default.

    Raises:
        DataError: shapes differ, embeddings are not finite, a person is in the gallery twice, or nobody is.

    Example:
        >>> import torch
        >>> people = torch.eye(2)
        >>> leakage = identity_leakage(people, people, torch.tensor([0, 1]), people, torch.tensor([1, 0]), 0.5)
        >>> leakage.type1.mean(), leakage.type2.mean(), leakage.rank1.mean()
        (tensor(1.), tensor(0.), tensor(0.))
    """
    if not len(gallery):
        raise DataError("the gallery is empty: no victim has a second image to be recognised from")
    if len(torch.unique(gallery_identities)) != len(gallery_identities):
        raise DataError("the gallery must hold one image per person")
    _check("the originals", originals, recovered, identities, len(recovered))
    _check("the gallery", gallery, recovered, gallery_identities)
    probe, plain, enrolled = _unit(recovered, originals, gallery)
    identities, gallery_identities = identities.to(probe.device), gallery_identities.to(probe.device)

    by_person, order = gallery_identities.sort()
    position = torch.searchsorted(by_person, identities).clamp_max(len(by_person) - 1)
    present = by_person[position] == identities
    enrolment = order[position]

    cosine = (probe * plain).sum(1)
    parts = []
    # The N x K similarities are never held at once.
    for rows, targets in zip(torch.split(probe, _CHUNK), torch.split(enrolment, _CHUNK), strict=True):
        similarity = rows @ enrolled.T
        target = similarity.gather(1, targets[:, None])
        # Equal embeddings may differ in the last bits of a matrix product.
        nearer, tied = (similarity > target + _TIE).sum(1), ((similarity - target).abs() <= _TIE).sum(1)
        # Of the places up to the rank, those that nobody nearer takes fall to the tied ones by lot.
        ranks = [((rank - nearer) / tied).clamp(0.0, 1.0) for rank in RANKS]
        accepted = [(target.squeeze(1) >= least).to(torch.float32) for least in (threshold, strict)]
        parts.append(torch.stack([*accepted, *ranks]))
    type2, type2_strict, rank1, rank5, rank20 = torch.where(present, torch.cat(parts, 1), torch.nan)
    type1, type1_strict = ((cosine >= least).to(torch.float32) for least in (threshold, strict))
    return IdentityLeakage(cosine, type1, type2, rank1, rank5, rank20, type1_strict, type2_strict)


def knn_distance(recovered: Tensor, attacked: Tensor, plain: Tensor, identities: Tensor, content: Tensor) -> Tensor:
    """Distance from each recovered face to the nearest other plain image of its person.

    The feature distance to the nearest sample of the target (KNN distance) of model inversion, e.g. Chen et al.,
    Knowledge-Enriched Distributional Model Inversion Attacks, ICCV 2021, between unit embeddings: from 0 to 2, and
    smaller for more of the identity.

    Args:
        recovered: float (N, D), evaluator embeddings of the recovered faces.
        attacked: int64 (N,), which of the plain images each recovers.
        plain: float (M, D), evaluator embeddings of all plain images of the victims.
        identities: int64 (M,), whose they are.
        content: int64 (M,), equal where two images are equal (:func:`content_ids`): copies of the attacked image are
            no other images.

    Returns:
        float32 (N,) on the device of ``recovered``; NaN where the person has no other image.

    Raises:
        DataError: shapes differ, or embeddings are not finite.

    Example:
        >>> import torch
        >>> plain = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> recovered, people = torch.tensor([[1.0, 0.0]]), torch.tensor([7, 7, 7])
        >>> knn_distance(recovered, torch.tensor([0]), plain, people, torch.arange(3))
        tensor([1.4142])
    """
    _check("the plain faces", plain, recovered, identities)
    probe, others = _unit(recovered, plain)
    identities, content, attacked = (index.to(probe.device) for index in (identities, content, attacked))
    nearest = []
    for rows, index in zip(torch.split(probe, _CHUNK), torch.split(attacked, _CHUNK), strict=True):
        candidate = (identities == identities[index, None]) & (content != content[index, None])
        nearest.append((rows @ others.T).masked_fill_(~candidate, -torch.inf).amax(1))
    cosine = torch.cat(nearest) if nearest else probe.new_empty(0)
    # Unit vectors: |a - b|^2 = 2 - 2 <a, b>.
    return torch.where(cosine.isinf(), torch.nan, (2 - 2 * cosine).clamp_min(0).sqrt())


def _check(what: str, embeddings: Tensor, recovered: Tensor, identities: Tensor, count: int | None = None) -> None:
    count = len(embeddings) if count is None else count
    shapes = (tuple(embeddings.shape), tuple(identities.shape))
    if recovered.ndim != 2 or shapes != ((count, recovered.shape[1]), (count,)):
        raise DataError(
            f"{what} must be (N, D) with identities (N,), recovered faces (N, D), "
            f"got {shapes[0]}, {shapes[1]} and {tuple(recovered.shape)}"
        )


def _unit(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """All with rows of length 1, float32, on the device of the first."""
    unit = tuple(F.normalize(e.detach().to(embeddings[0].device, torch.float32), dim=1) for e in embeddings)
    if not all(torch.isfinite(e).all() for e in unit):
        raise DataError("the evaluator's embeddings hold NaN or infinity")
    return unit
