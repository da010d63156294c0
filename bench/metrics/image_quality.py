"""How much of the picture comes back: SSIM, PSNR and MS-SSIM per image, batched on any device.

Every function takes recovered and original faces, float (N, C, H, W) in [0, 1], and returns one value per image, (N,),
so that confidence intervals can resample identities; higher is more of the face. Half precision is computed in float32.
Other shapes, integer images and, for the SSIMs, sides below the window's 11 pixels raise DataError.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.errors import DataError
from bench.images import WINDOW, squared_error, ssim_and_error, ssim_terms

#: PSNR in dB given to images that differ by less than float32 can hold (MSE <= 1e-10), so that means stay finite.
PSNR_CAP = 100.0

#: Exponents of the five scales, Wang, Simoncelli and Bovik 2003 (Asilomar), section 3.2.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ssim(recovered: Tensor, original: Tensor) -> Tensor:
    """Structural similarity in [-1, 1] (:func:`bench.images.ssim`)."""
    return ssim_terms(*checked_faces(recovered, original, WINDOW))[0]


def psnr(recovered: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, all channels pooled, capped at :data:`PSNR_CAP`.

    Example:
        >>> import torch
        >>> psnr(torch.full((1, 3, 4, 4), 0.6), torch.full((1, 3, 4, 4), 0.5))
        tensor([20.0000])
    """
    return _decibel(squared_error(*checked_faces(recovered, original)))


def ssim_and_psnr(recovered: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ssim` and :func:`psnr`, which cost less together: both begin with the difference.

    Example:
        >>> import torch
        >>> ssim_and_psnr(torch.full((1, 3, 16, 16), 0.6), torch.full((1, 3, 16, 16), 0.5))
        (tensor([0.9836]), tensor([20.0000]))
    """
    similarity, error = ssim_and_error(*checked_faces(recovered, original, WINDOW))
    return similarity, _decibel(error)


def psnr_aligned(recovered: Tensor, original: Tensor) -> Tensor:
    """PSNR (dB, capped) after the least-squares fit ``a * recovered + b`` to the original, per image and channel.

    A recovery that is right up to brightness and contrast of a channel shows the face all the same; plain PSNR hides
    that. The slope may be negative (a negative shows the face too) and nothing is clipped, so the value never falls
    below :func:`psnr`. A constant recovered channel has no contrast to scale: it is fitted by the original's mean,
    which makes every constant image score alike.

    Example:
        >>> import torch
        >>> original = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> psnr_aligned(0.2 + 0.5 * original, original)
        tensor([100.])
    """
    recovered, original = checked_faces(recovered, original)
    r, o = recovered.flatten(2), original.flatten(2)
    r = r - r.mean(2, keepdim=True)
    o = o - o.mean(2, keepdim=True)
    variance = r.square().mean(2, keepdim=True)
    # Below 1e-12 (a standard deviation of 1/4000 of a grey level) float32 holds rounding, not contrast.
    slope = torch.where(variance > 1e-12, (r * o).mean(2, keepdim=True) / variance.clamp_min(1e-12), 0.0)
    return _decibel((slope * r - o).square().flatten(1).mean(1))


def ms_ssim(recovered: Tensor, original: Tensor) -> Tensor:
    """Multi-scale structural similarity in [0, 1] (Wang, Simoncelli and Bovik 2003, eq. 7).

    Contrast-structure of every scale and luminance of the coarsest, each averaged over pixels and channels, negative
    values set to zero, multiplied under the published exponents. The published five scales need 176 pixels a side.
    Smaller faces use as many as still hold a whole window (64 px: 3, 112 px: 4) with the exponents renormalised to sum
    to one, so values compare between recoveries of one size, not across sizes.

    Example:
        >>> import torch
        >>> faces = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> ms_ssim(faces, faces)
        tensor([1.])
    """
    recovered, original = checked_faces(recovered, original, WINDOW)
    scales = min(len(MS_SSIM_WEIGHTS), 1 + int(math.log2(min(recovered.shape[-2:]) // WINDOW)))
    weights = torch.tensor(MS_SSIM_WEIGHTS[:scales], dtype=recovered.dtype, device=recovered.device)
    weights = weights / weights.sum()
    factors = []
    for scale in range(scales):
        if scale:
            recovered, original = F.avg_pool2d(recovered, 2), F.avg_pool2d(original, 2)
        similarity, contrast_structure = ssim_terms(recovered, original)
        factors.append(similarity if scale == scales - 1 else contrast_structure)
    return (torch.stack(factors, 1).clamp_min(0) ** weights).prod(1)


def checked_faces(recovered: Tensor, original: Tensor, smallest: int = 1) -> tuple[Tensor, Tensor]:
    """Both, at least float32.

    Raises:
        DataError: other shapes, integer images, or a side below ``smallest`` pixels.
    """
    if recovered.ndim != 4 or recovered.shape != original.shape:
        raise DataError(
            "recovered and original faces must share one shape (N, C, H, W), "
            f"got {tuple(recovered.shape)} and {tuple(original.shape)}"
        )
    if not (recovered.is_floating_point() and original.is_floating_point()):
        raise DataError(f"faces must be float in [0, 1], got {recovered.dtype} and {original.dtype}")
    if min(recovered.shape[-2:]) < smallest:
        raise DataError(f"faces must be at least {smallest} pixels a side, got {tuple(recovered.shape[-2:])}")
    dtype = torch.promote_types(torch.promote_types(recovered.dtype, original.dtype), torch.float32)
    return recovered.to(dtype), original.to(dtype)


def _decibel(mse: Tensor) -> Tensor:
    return -10 * torch.log10(mse.clamp_min(10 ** (-PSNR_CAP / 10)))
