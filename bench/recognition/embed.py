"""Embeddings of protected faces, as a verification protocol wants them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.faces import FaceSet
from bench.images import to_float
from bench.memory import in_halves
from bench.nets.recogniser import Recogniser
from bench.progress import Report, no_report
from defenses.base import Defense

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes as long to import as torch


@torch.inference_mode()
def embed_faces(
    recogniser: Recogniser,
    defense: Defense,
    faces: FaceSet,
    *,
    generators: Callable[[int], torch.Generator],
    batch_size: int = 256,
    keys: Tensor | None = None,
    flip: bool = True,
    fabric: Fabric | None = None,
    report: Report = no_report,
) -> Tensor:
    """Unit embeddings of faces seen through a defence.

    Each face is one query: the defence draws one state for it. With ``flip``, the face and its mirror image are both
    protected under that state and their embeddings are added before normalising (the usual protocol; two states a query
    would tell the recogniser, and an eavesdropper, more than the defence means to send).

    Args:
        recogniser: on any device, to which ``defense`` is moved; its mode is restored afterwards.
        defense: of the faces' size.
        faces: N.
        generators: gives the CPU generator from which state and noise of the face with that number are drawn.
        batch_size: faces at a time; fewer where an accelerator's memory is full.
        keys: int64 (N, k), of the faces' clients; None to draw them.
        flip: add the embedding of the mirror image.
        fabric: computes in its precision; None for float32.
        report: called as ``report(done, total)`` after each batch, counting faces.

    Returns:
        float32 (N, D) on the CPU, rows of norm 1.
    """
    device = recogniser.device
    defense = defense.to(device)
    was_training = recogniser.training
    recogniser.eval()
    try:

        def embed(rows: slice) -> Tensor:
            images = to_float(faces.images[rows].to(device))
            # Made here, so that what did not fit is protected under the same draws again.
            draws = [generators(number) for number in range(rows.start, rows.stop)]
            # The defence computes in float32 whatever the recogniser does: it is the client's.
            protected = defense.protect_each(images, draws, keys=None if keys is None else keys[rows])
            embedding = _embed(recogniser, protected.representation, fabric)
            if flip:
                mirrored = defense.protect_each(images.flip(-1), draws, state=protected.state, keys=protected.keys)
                embedding = embedding + _embed(recogniser, mirrored.representation, fabric)
            return F.normalize(embedding).cpu()

        parts, done = [], 0
        # Not every defence protects no faces.
        for part in in_halves(embed, len(faces), batch_size, "embedding faces") if len(faces) else ():
            parts.append(part)
            done += len(part)
            report(done, len(faces))
        return torch.cat(parts) if parts else torch.empty(0, recogniser.spec.embedding_size)
    finally:
        recogniser.train(was_training)


def _embed(recogniser: Recogniser, representation: Tensor, fabric: Fabric | None) -> Tensor:
    """float32 embeddings (N, D), not normalised, in the precision of ``fabric``."""
    with nullcontext() if fabric is None else fabric.autocast():
        embedding: Tensor = recogniser(representation)
    return embedding.float()
