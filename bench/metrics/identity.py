"""How much of the identity comes back, judged by a recogniser that neither defence nor attack used.

Definitions (Mai et al., TPAMI 41(5), 2019, for Type I and II), for a recovered face ``r`` of the image ``x`` of person
``p``; ``e`` is the evaluator's L2-normalised embedding, ``t`` its operating threshold on plain faces, and ``g(p)`` one
plain image of ``p`` other than ``x``:

* ``cosine``  ``<e(r), e(x)>``.
* ``type1``   1 where ``<e(r), e(x)> >= t``: the recovery passes for the very image that was protected.
* ``type2``   1 where ``<e(r), e(g(p))> >= t``: it passes for the person, enrolled with another image.
* ``rank1``   1 where, among the plain images ``g(q)`` of all people in the gallery, ``g(p)`` is the nearest to ``r``.
  A tie of ``k`` counts ``1/k``, what guessing among them would get; a constant recovery thus earns chance, no more.
* ``rank5``   likewise, 1 where ``g(p)`` is among the five nearest.
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

#: How near the person must be found for ``rank5``.
_NEAR = 5

_CHUNK = 1024
_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class IdentityLeakage:
    """Identity leakage of each of N recovered faces, float32 (N,); higher is more of the identity.

    Attributes:
        cosine: in [-1, 1].
        type1: 0 or 1.
        type2: 0 or 1; NaN where the person has no other image.
        rank1: 0 to 1; NaN where the person has no other image.
        rank5: 0 to 1; NaN where the person has no other image.
        gallery_size: people in the gallery; chance level of ``rank1`` is one over it, of ``rank5`` five times that.
    """

    cosine: Tensor
    type1: Tensor
    type2: Tensor
    rank1: Tensor
    rank5: Tensor
    gallery_size: int


@dataclass(frozen=True, slots=True)
class Probes:
    """Which images of the victims are attacked and which stay plain, as indices into the victims' faces.

    Attributes:
        attacked: int64 (V,), the images that are protected, intercepted and recovered.
        gallery: int64 (G,), one other plain image of every victim who has one.
    """

    attacked: Tensor
    gallery: Tensor


def split_gallery(identities: Tensor, generator: torch.Generator, *, content: Tensor | None = None) -> Probes:
    """Draw one image of each person as the gallery and leave the rest, in their order, to be attacked.

    A person with a single image stays a probe, without a gallery image. Verification packs repeat images: a copy of the
    gallery image must not be a probe, or Type II would compare an image with itself.

    Args:
        identities: int64 (M,), the person of each image.
        generator: source of the draw.
        content: int64 (M,), equal where two images are equal (:func:`content_ids`); None if all differ.

    Raises:
        DataError: shapes differ or there are no images.

    Example:
        >>> import torch
        >>> split = split_gallery(torch.tensor([5, 5, 8]), torch.Generator().manual_seed(0))
        >>> len(split.gallery), len(split.attacked), 2 in split.attacked
        (1, 2, True)
    """
    identities = identities.cpu()
    content = torch.arange(len(identities)) if content is None else content.cpu()
    if identities.ndim != 1 or not len(identities) or content.shape != identities.shape:
        raise DataError(
            "identities and content must share one shape (M,), M > 0, "
            f"got {tuple(identities.shape)} and {tuple(content.shape)}"
        )
    # A random order, then a stable sort by person: the first of each run is a uniform draw.
    shuffled = torch.randperm(len(identities), generator=generator, device=generator.device).cpu()
    order = shuffled[identities[shuffled].argsort(stable=True)]
    ranked = identities[order]
    starts = torch.cat((torch.ones(1, dtype=torch.bool), ranked[1:] != ranked[:-1]))
    drawn = order[starts]
    person = torch.unique(identities, return_inverse=True)[1]
    copies = content == content[drawn][person]
    # Only a person who keeps a probe can give an image away.
    others = torch.zeros(len(drawn), dtype=torch.int64).scatter_add_(0, person, (~copies).to(torch.int64)) > 0
    probes = (~copies | ~others[person]).nonzero().squeeze(1)
    return Probes(probes, drawn[others])


def content_ids(images: Tensor, *, batch_size: int = 256) -> Tensor:
    """A number per image: equal for equal images, and else differs (but for a chance of 2^-56).

    Args:
        images: uint8 (N, 3, H, W).
        batch_size: images hashed at once (eight bytes a pixel value).

    Returns:
        int64 (N,) on the CPU.

    Example:
        >>> import torch
        >>> images = torch.tensor([[[[1, 2]]], [[[2, 1]]], [[[1, 2]]]], dtype=torch.uint8)
        >>> ids = content_ids(images)
        >>> bool(ids[0] == ids[2]), bool(ids[0] == ids[1])
        (True, False)
    """
    if images.dtype != torch.uint8:
        raise DataError(f"images must be uint8, got {images.dtype}")
    values = images[0].numel() if len(images) else 0
    # Multilinear hash modulo 2^64 with fixed random coefficients (Lemire and Kaser 2014); int64 wraps around.
    seeded = torch.Generator().manual_seed(0)
    coefficients = torch.randint(-(2**63), 2**63 - 1, (values,), generator=seeded, dtype=torch.int64)
    coefficients = coefficients.to(images.device)
    if not len(images):
        return torch.empty(0, dtype=torch.int64)
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
) -> IdentityLeakage:
    """Identity leakage of recovered faces, as the module defines it.

    Args:
        recovered: float (N, D), evaluator embeddings of the recovered faces.
        originals: float (N, D), of the faces that were protected.
        identities: int64 (N,), whose they are.
        gallery: float (K, D), of one other plain image per person.
        gallery_identities: int64 (K,), all different.
        threshold: cosine from which the evaluator calls two plain faces one person.

    Returns:
        Per-image values on the device of ``recovered``.

    Raises:
        DataError: shapes differ, embeddings are not finite, a person is in the gallery twice, or nobody is.

    Example:
        >>> import torch
        >>> people = torch.eye(2)
        >>> leakage = identity_leakage(people, people, torch.tensor([0, 1]), people, torch.tensor([1, 0]), 0.5)
        >>> leakage.type1.mean(), leakage.type2.mean(), leakage.rank1.mean()
        (tensor(1.), tensor(0.), tensor(0.))
    """
    if recovered.ndim != 2 or recovered.shape != originals.shape or identities.shape != recovered.shape[:1]:
        raise DataError(
            "embeddings of recovered and original faces must be (N, D) with identities (N,), got "
            f"{tuple(recovered.shape)}, {tuple(originals.shape)} and {tuple(identities.shape)}"
        )
    if gallery.ndim != 2 or gallery.shape[1] != recovered.shape[1] or gallery_identities.shape != gallery.shape[:1]:
        raise DataError(
            f"the gallery must be (K, {recovered.shape[1]}) with identities (K,), got "
            f"{tuple(gallery.shape)} and {tuple(gallery_identities.shape)}"
        )
    if not len(gallery):
        raise DataError("the gallery is empty: no victim has a second image to be recognised from")
    if len(torch.unique(gallery_identities)) != len(gallery_identities):
        raise DataError("the gallery must hold one image per person")
    device = recovered.device
    probe, plain, enrolled = (
        F.normalize(e.detach().to(device, torch.float32), dim=1) for e in (recovered, originals, gallery)
    )
    if not all(torch.isfinite(e).all() for e in (probe, plain, enrolled)):
        raise DataError("the evaluator's embeddings hold NaN or infinity")
    identities, gallery_identities = identities.to(device), gallery_identities.to(device)

    by_person, order = gallery_identities.sort()
    position = torch.searchsorted(by_person, identities).clamp_max(len(by_person) - 1)
    present = by_person[position] == identities
    enrolment = order[position]

    cosine = (probe * plain).sum(1)
    nan = torch.full_like(cosine, torch.nan)
    type2: list[Tensor] = []
    rank1: list[Tensor] = []
    rank5: list[Tensor] = []
    # The N x K similarities are never held at once.
    for rows, targets in zip(torch.split(probe, _CHUNK), torch.split(enrolment, _CHUNK), strict=True):
        similarity = rows @ enrolled.T
        target = similarity.gather(1, targets[:, None])
        # Equal embeddings may differ in the last bits of a matrix product.
        nearer, tied = (similarity > target + _TIE).sum(1), ((similarity - target).abs() <= _TIE).sum(1)
        type2.append((target.squeeze(1) >= threshold).to(torch.float32))
        # Of the places up to the rank, those that nobody nearer takes fall to the tied ones by lot.
        for ranks, rank in ((rank1, 1), (rank5, _NEAR)):
            ranks.append(((rank - nearer) / tied).clamp(0.0, 1.0))
    return IdentityLeakage(
        cosine=cosine,
        type1=(cosine >= threshold).to(torch.float32),
        type2=torch.where(present, torch.cat(type2), nan),
        rank1=torch.where(present, torch.cat(rank1), nan),
        rank5=torch.where(present, torch.cat(rank5), nan),
        gallery_size=len(gallery),
    )


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
    if recovered.ndim != 2 or attacked.shape != recovered.shape[:1]:
        raise DataError(f"recovered must be (N, D) and attacked (N,), got {recovered.shape} and {attacked.shape}")
    if (
        plain.ndim != 2
        or plain.shape[1] != recovered.shape[1]
        or not identities.shape == content.shape == plain.shape[:1]
    ):
        raise DataError(
            f"plain must be (M, {recovered.shape[1]}) with identities and content (M,), got {tuple(plain.shape)}, "
            f"{tuple(identities.shape)} and {tuple(content.shape)}"
        )
    device = recovered.device
    probe, others = (F.normalize(e.detach().to(device, torch.float32), dim=1) for e in (recovered, plain))
    if not (torch.isfinite(probe).all() and torch.isfinite(others).all()):
        raise DataError("the evaluator's embeddings hold NaN or infinity")
    identities, content, attacked = identities.to(device), content.to(device), attacked.to(device)
    nearest = []
    for rows, index in zip(torch.split(probe, _CHUNK), torch.split(attacked, _CHUNK), strict=True):
        candidate = (identities == identities[index, None]) & (content != content[index, None])
        nearest.append((rows @ others.T).masked_fill_(~candidate, -torch.inf).amax(1))
    cosine = torch.cat(nearest) if nearest else probe.new_empty(0)
    # Unit vectors: |a - b|^2 = 2 - 2 <a, b>.
    return torch.where(cosine.isinf(), torch.nan, (2 - 2 * cosine).clamp_min(0).sqrt())


def select_probes(victims: FaceSet, count: int, generator: torch.Generator) -> Probes:
    """Draw at most ``count`` images to attack, as many people as possible before a second image of anyone.

    Only people with another image take part, so that type II acceptance and rank-1 are defined for every probe.

    Raises:
        DataError: nobody has two different images.
    """
    split = split_gallery(victims.labels, generator, content=content_ids(victims.images))
    if not len(split.gallery):
        raise DataError("no victim has two different images: identity leakage cannot be measured; use a larger dataset")
    enrolled = torch.zeros(len(victims.names), dtype=torch.bool)
    enrolled[victims.labels[split.gallery]] = True
    candidates = split.attacked[enrolled[victims.labels[split.attacked]]]
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    turn = _occurrence(victims.labels[candidates])
    return Probes(candidates[turn.argsort(stable=True)][:count], split.gallery)


def _occurrence(labels: Tensor) -> Tensor:
    """For each position, how often its label stood before it: int64 (N,)."""
    order = labels.argsort(stable=True)
    ranked = labels[order]
    first = torch.searchsorted(ranked, ranked)
    occurrence = torch.empty_like(order)
    occurrence[order] = torch.arange(len(order)) - first
    return occurrence
