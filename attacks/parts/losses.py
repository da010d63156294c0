"""What attacks minimise: losses on faces, on the similarity to a target, and a prior on images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.images import ssim

#: Poincare: how far the label lies inside the unit ball (the published value), and the least room to its rim.
_INSIDE = 1e-4
_RIM = 1e-5


def reconstruction(faces: Tensor, true: Tensor, ssim_weight: float) -> Tensor:
    """L1 + ``ssim_weight`` (1 - SSIM), a scalar, of faces (N, 3, H, W)."""
    loss = functional.l1_loss(faces, true)
    return loss + ssim_weight * (1 - ssim(faces, true)).mean() if ssim_weight else loss


def cosine(embeddings: Tensor, targets: Tensor) -> Tensor:
    """One minus the cosine of each pair of (N, D) of any norm: float (N,) in [0, 2].

    >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([1.])
    """
    return 1 - functional.cosine_similarity(embeddings, targets, dim=1)


def class_logits(embeddings: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """Logits of a margin head, without margin and scale.

    Args:
        embeddings: float (N, D), of any norm.
        targets: float (N, D), the centre of each row's class, of any norm.
        others: float (C, D), unit rows, centres of classes that are none of the targets.

    Returns:
        float (N, 1 + C), cosines: to the target in column 0, to the others behind it.
    """
    unit = functional.normalize(embeddings, dim=1)
    target = (unit * functional.normalize(targets, dim=1)).sum(dim=1, keepdim=True)
    return torch.cat((target, unit @ others.T), dim=1)


def negative_logit(logits: Tensor) -> Tensor:
    """Minus the target's logit, (N,), of :func:`class_logits` (LOMMA: Nguyen et al., CVPR 2023), unregularised."""
    return -logits[:, 0]


def max_margin(logits: Tensor) -> Tensor:
    """Largest other logit minus the target's, (N,), of :func:`class_logits` (PLG-MI: Yuan et al., AAAI 2023).

    Unlike cross-entropy its gradient does not vanish once the target leads.

    >>> max_margin(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([-1.])
    """
    return logits[:, 1:].amax(dim=1) - logits[:, 0]


def poincare(logits: Tensor) -> Tensor:
    """Hyperbolic distance, (N,), of :func:`class_logits`, brought to L1 norm 1, to the target's corner.

    Of PPA (Struppek et al., ICML 2022).
    """
    point = logits / logits.norm(p=1, dim=1, keepdim=True).clamp(min=_RIM)
    corner = torch.zeros_like(point)
    corner[:, 0] = 1 - _INSIDE
    apart = (point - corner).square().sum(dim=1)
    # An all but one-hot point touches the rim, where the distance is infinite.
    room = (1 - point.square().sum(dim=1)).clamp(min=_RIM) * (1 - corner.square().sum(dim=1))
    # arccosh(1 + x) has an infinite slope at x = 0.
    return torch.acosh(1 + (2 * apart / room).clamp(min=_RIM))


def feature_distance(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean square of the standard scores of features (N, D): (N,), about 1 for features of public faces.

    LOMMA asks the penultimate features to stay near a draw from the normal distribution of those of
    public faces; here they are compared with that distribution itself, mean and std (D,), which needs no draw.
    """
    return ((features - mean) / std).square().mean(dim=1)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, horizontal plus vertical, of (N, C, H, W): (N,).

    Rudin et al. 1992, anisotropic.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor([1.])
    """
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return across + down
