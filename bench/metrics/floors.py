"""Trivial recoveries: what an attack has to beat before its number means anything.

``mean_face``, ``grey`` and ``noise`` have not seen the intercepted representations at all. ``nearest`` is the least an
attacker can do with them: protect the public faces too and answer with the public face whose representation lies
nearest. It needs no training and no victim's face, returns a sharp picture of *somebody else*, and so tells apart a
recovery of this face from a recovery of some face. (The public face nearest to the victim's *original* would be no
floor: whoever could find it already has the face.)

Recoveries are float32 (N, 3, H, W) in [0, 1]; public faces (M, 3, H, W), M > 0, uint8 or float in [0, 1], anything else
is a DataError.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.errors import DataError
from bench.images import to_float

#: Names of the floors, in the order in which tables show them.
FLOORS = ("mean_face", "grey", "noise", "nearest")

_CHUNK = 256


def mean_face(public: Tensor, count: int) -> Tensor:
    """The mean of the public faces, ``count`` times: an expanded view on their device.

    Example:
        >>> import torch
        >>> mean_face(torch.tensor([0.0, 0.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4), 5)[4, 0, 0, 0]
        tensor(0.2500)
    """
    _check_public(public)
    total = torch.zeros(public.shape[1:], dtype=torch.float64)
    for chunk in torch.split(public, _CHUNK):
        total += _as_float(chunk).sum(0).cpu()
    return (total / len(public)).to(public.device, torch.float32).expand(count, -1, -1, -1)


def grey(count: int, size: int) -> Tensor:
    """Mid-grey images, all 0.5: an expanded view."""
    return torch.full((), 0.5).expand(count, 3, size, size)


def noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Uniform noise in [0, 1), on the generator's device."""
    return torch.rand(count, 3, size, size, generator=generator, device=generator.device)


def nearest(observed: Tensor, public: Tensor, protect: Callable[[Tensor], Tensor], *, batch_size: int = 64) -> Tensor:
    """For each interception, the public face whose representation is nearest to it (Euclidean distance).

    Args:
        observed: (N, ...), intercepted representations.
        public: the attacker's faces.
        protect: float faces (n, 3, H, W) in [0, 1] to representations (n, ...), as the attacker can compute them: with
            what the rung of knowledge grants, drawing fresh states if the defence is random.
        batch_size: public faces and interceptions compared at once: nothing larger is made.

    Raises:
        DataError: ``protect`` returns other shapes than were observed.

    Example:
        >>> import torch
        >>> public = torch.tensor([0.0, 0.4, 0.8]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
        >>> observed = torch.tensor([0.7, 0.1]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
        >>> nearest(observed, public, lambda faces: faces)[:, 0, 0, 0]
        tensor([0.8000, 0.0000])
    """
    _check_public(public)
    best = torch.full((len(observed),), torch.inf, device=observed.device)
    nearest_face = torch.zeros(len(observed), dtype=torch.int64, device=observed.device)
    for start in range(0, len(public), batch_size):
        keys = protect(_as_float(public[start : start + batch_size]))
        if keys.shape[1:] != observed.shape[1:]:
            raise DataError(
                f"public representations are {tuple(keys.shape[1:])}, intercepted ones {tuple(observed.shape[1:])}"
            )
        keys = keys.flatten(1).to(observed.device, torch.float32)
        # |q - k|^2 = |q|^2 - 2 q.k + |k|^2, of which |q|^2 does not change the order.
        norms = keys.square().sum(1)
        for rows in torch.split(torch.arange(len(observed), device=observed.device), batch_size):
            queries = observed[rows].flatten(1).to(torch.float32)
            distance, position = (norms - 2 * queries @ keys.T).min(1)
            closer = distance < best[rows]
            best[rows] = torch.where(closer, distance, best[rows])
            nearest_face[rows] = torch.where(closer, position + start, nearest_face[rows])
    return _as_float(public[nearest_face.to(public.device)])


def _as_float(faces: Tensor) -> Tensor:
    return to_float(faces) if faces.dtype == torch.uint8 else faces.to(torch.float32)


def _check_public(public: Tensor) -> None:
    if public.ndim != 4 or public.shape[1] != 3 or not len(public):
        raise DataError(f"public faces must be (M, 3, H, W), M > 0, got {tuple(public.shape)}")
    if public.dtype != torch.uint8 and not public.is_floating_point():
        raise DataError(f"public faces must be uint8 or float in [0, 1], got {public.dtype}")
