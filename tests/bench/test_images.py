from __future__ import annotations

import threading

import pytest
import torch
from skimage.metrics import structural_similarity

from bench.images import channels_last, ssim


def reference(first: torch.Tensor, second: torch.Tensor) -> float:
    """scikit-image over the valid positions, which is what it averages too."""
    return structural_similarity(
        first.permute(1, 2, 0).double().numpy(),
        second.permute(1, 2, 0).double().numpy(),
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("count", "size"), [(3, (11, 11)), (9, (24, 17)), (7, (112, 112))])
def test_equals_scikit_image(noise, count, size):
    """More images than a processor takes at once, oblong ones, recoveries from perfect to opposite."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(count, 3, *size, generator=generator)
    second = (first + noise * torch.randn(first.shape, generator=generator)).clamp(0, 1)
    second[0] = 1 - first[0]
    expected = [reference(a, b) for a, b in zip(first, second, strict=True)]
    assert expected[0] < 0
    for found in (ssim(first, second), ssim(first.clone().requires_grad_(), second).detach()):
        torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-6, rtol=0)


def test_crops_and_turned_pictures_are_compared_like_copies_of_them():
    faces = torch.rand(2, 9, 3, 20, 26, generator=torch.Generator().manual_seed(2))
    for first, second in (faces[..., 2:, 5:], faces.mT, faces[:, :, :1].expand_as(faces)):
        copies = ssim(first.contiguous(), second.contiguous())
        torch.testing.assert_close(ssim(first, second), copies, rtol=0, atol=0)


def test_bfloat16_is_computed_in_float32_under_autocast_too():
    first, second = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ssim(first, second), ssim(first.float(), second.float()))


def test_gradient_leads_to_the_target():
    target = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    guess = torch.full_like(target, 0.5).requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (1 - ssim(guess, target)).mean().backward()
        optimizer.step()
    assert ssim(guess, target).item() > 0.95


@pytest.mark.parametrize("size", [1, 2, 8, 10])
def test_faces_smaller_than_the_window_are_compared_with_a_smaller_one(size):
    faces = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(faces, faces), torch.ones(2))
    assert (ssim(faces, 1 - faces) < 0.9).all()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15))


def test_the_gradient_is_that_of_differences():
    """Twice, in float64: attacks train on it, and some through it."""
    drawn = torch.Generator().manual_seed(3)
    first, second = (torch.rand(1, 2, 13, 14, generator=drawn, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(ssim, (first.requires_grad_(), second.requires_grad_()))
    small = first[..., :6, :5].detach().requires_grad_()  # smaller than the window
    assert torch.autograd.gradgradcheck(lambda x: ssim(x, second[..., :6, :5].detach()), small)


@pytest.mark.parametrize("contrast", [1.0, 0.002])
def test_single_precision_is_enough_for_values_and_gradients_of_flat_bright_pictures_too(contrast):
    """Against double precision, which is computed in another way on a processor."""
    generator = torch.Generator().manual_seed(4)
    first, second = (1 - contrast * torch.rand(6, 3, 48, 40, generator=generator) for _ in range(2))
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        guess = first.to(dtype).requires_grad_()
        values.append(ssim(guess, second.to(dtype)))
        gradients.append(torch.autograd.grad(values[-1].sum(), guess)[0])
    for value in (values[0].detach(), ssim(first, second)):
        torch.testing.assert_close(value.double(), values[1].detach(), atol=3e-7, rtol=0)
    torch.testing.assert_close(gradients[0].double(), gradients[1], atol=1e-4 * float(gradients[1].abs().max()), rtol=0)


def test_faces_are_shared_among_threads_which_leave_no_trace(set_threads):
    """The same bits, of the pictures and of a product that is computed afterwards; who starts later has as many."""
    generator = torch.Generator().manual_seed(5)
    first, second = torch.rand(2, 70, 3, 64, 64, generator=generator)
    first[7, 1, 20, 30] = torch.nan  # stays with its face
    matrix, asked = torch.rand(300, 300, generator=generator), []
    set_threads(1)
    alone = ssim(first, second)
    set_threads(2)
    product = matrix @ matrix
    together = ssim(first, second)
    asked.append(torch.get_num_threads())
    later = threading.Thread(target=lambda: asked.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert asked == [2, 2]
    assert torch.equal(matrix @ matrix, product)
    assert together.isnan().nonzero().flatten().tolist() == [7]
    torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 27, 8, 5), (1, 4, 3, 3), (2, 1, 4, 4), (5, 7, 1, 1), (0, 3, 4, 4)])
def test_channels_last_changes_the_order_in_memory_and_no_value(shape, dtype):
    maps = torch.randn(shape).to(dtype)
    maps[maps > 2] = torch.nan
    for given in (maps, maps.flip(-1).transpose(2, 3)[..., ::2], maps.clone().requires_grad_()):
        reordered = channels_last(given)
        assert reordered.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(reordered, given, rtol=0, atol=0, equal_nan=True)
        assert reordered.requires_grad == given.requires_grad
