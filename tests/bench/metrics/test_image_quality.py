"""Image quality against scikit-image; SSIM itself is tested in tests/bench/test_images.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bench.errors import DataError
from bench.metrics.image_quality import PSNR_CAP, ms_ssim, psnr, psnr_aligned, ssim, ssim_and_psnr

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def smooth_faces(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures: unlike noise, their windows have means and variances of their own."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def pairs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Degradations from harmless to total, and the originals."""
    original = smooth_faces(7, size)
    noise = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(1)) - 0.5
    strength = torch.tensor([0.0, 0.002, 0.05, 0.3, 1.0, 1.0, 1.0]).view(-1, 1, 1, 1)
    recovered = (original + strength * noise).clamp(0, 1)
    recovered[4] = 1 - original[4]
    recovered[5] = 0.5
    recovered[6] = noise[6] + 0.5
    return recovered, original


def reference_ssim(recovered: torch.Tensor, original: torch.Tensor, **options: float) -> float:
    """scikit-image with the settings of Wang et al. 2004."""
    return float(
        structural_similarity(
            original.double().numpy(),
            recovered.double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
            **options,
        )
    )


def halved(image: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 blocks; an odd last row or column is dropped."""
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    return torch.from_numpy(block_reduce(even.numpy(), (1, 2, 2), np.mean))


def reference_ms_ssim(recovered: torch.Tensor, original: torch.Tensor, weights: tuple[float, ...]) -> float:
    """Wang et al. 2003, eq. 7; a huge K1 turns SSIM into its contrast-structure factor."""
    value = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            recovered, original = halved(recovered), halved(original)
        last = scale == len(weights) - 1
        factor = reference_ssim(recovered, original, **({} if last else {"K1": 1e6}))
        value *= max(factor, 0.0) ** (weight / sum(weights))
    return value


@pytest.mark.parametrize("learnt", [False, True])
def test_psnr_equals_scikit_image_below_the_cap_also_beside_ssim(learnt: bool) -> None:
    recovered, original = pairs(64)
    similarity, beside = ssim_and_psnr(recovered.clone().requires_grad_(learnt), original)
    torch.testing.assert_close(similarity.detach(), ssim(recovered, original))
    for values in (psnr(recovered, original), beside.detach()):
        assert values[0] == PSNR_CAP  # identical
        for value, r, o in zip(values[1:], recovered[1:], original[1:], strict=True):
            assert float(value) == pytest.approx(peak_signal_noise_ratio(o.numpy(), r.numpy(), data_range=1), abs=1e-3)


def test_aligned_psnr_is_the_least_squares_fit_of_each_channel() -> None:
    recovered, original = pairs(32)
    for value, r, o in zip(psnr_aligned(recovered, original), recovered.double(), original.double(), strict=True):
        fitted = np.empty(o.shape)
        for channel in range(3):
            design = np.stack((r[channel].flatten().numpy(), np.ones(r[channel].numel())), 1)
            solution, *_ = np.linalg.lstsq(design, o[channel].flatten().numpy(), rcond=None)
            fitted[channel] = (design @ solution).reshape(o.shape[1:])
        mse = np.square(fitted - o.numpy()).mean()
        assert float(value) == pytest.approx(min(PSNR_CAP, -10 * np.log10(mse + 1e-30)), abs=1e-3)


def test_alignment_forgives_affine_changes_of_channels_but_not_of_pixels() -> None:
    original = smooth_faces(3, 48)
    gain = torch.tensor([0.5, -0.7, 0.1]).view(1, 3, 1, 1)
    assert (psnr_aligned(0.3 + gain * original, original) > 80).all()
    assert (psnr_aligned(original.square(), original) < 60).all()


def test_constant_recoveries_score_alike_after_alignment() -> None:
    original = smooth_faces(2, 32)
    black, grey = torch.zeros_like(original), torch.full_like(original, 0.5)
    around_mean = original - original.mean((2, 3), keepdim=True)
    expected = -10 * torch.log10(around_mean.square().mean((1, 2, 3)))
    torch.testing.assert_close(psnr_aligned(black, original), expected)
    torch.testing.assert_close(psnr_aligned(grey, original), expected)


WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@pytest.mark.parametrize(("size", "scales"), [(11, 1), (21, 1), (22, 2), (64, 3), (112, 4), (181, 5)])
def test_ms_ssim_equals_its_definition_at_as_many_scales_as_fit(size: int, scales: int) -> None:
    recovered, original = pairs(size)
    expected = [reference_ms_ssim(r, o, WEIGHTS[:scales]) for r, o in zip(recovered, original, strict=True)]
    assert 0 == min(expected) < 0.99 < max(expected)
    np.testing.assert_allclose(ms_ssim(recovered, original).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("metric", [ssim, psnr, psnr_aligned, ms_ssim])
def test_every_metric_takes_float_pairs_of_one_shape(metric: Metric) -> None:
    recovered, original = (t.to(torch.float16) for t in pairs(32))
    value = metric(recovered, original)
    assert value.dtype == torch.float32  # half precision is computed in single
    torch.testing.assert_close(value, metric(recovered.float(), original.float()))
    assert metric(recovered[:0], original[:0]).shape == (0,)
    with pytest.raises(DataError, match="share one shape"):
        metric(recovered, original[..., 1:])
    with pytest.raises(DataError, match="float"):
        metric(recovered, (original * 255).to(torch.uint8))


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_faces_smaller_than_the_window_are_refused(metric: Metric) -> None:
    with pytest.raises(DataError, match="at least 11 pixels"):
        metric(torch.rand(1, 3, 10, 16), torch.rand(1, 3, 10, 16))
