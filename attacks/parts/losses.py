"""What model inversion minimises: losses on the similarity to a target, and a prior on images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Poincare: how far the label lies inside the unit ball (the published value), and the least room to its rim.
_INSIDE = 1e-4
_RIM = 1e-5


def cosine(embeddings: Tensor, targets: Tensor) -> Tensor:
    """One minus the cosine of each pair.

    Args:
        embeddings: float (N, D), of any norm.
        targets: float (N, D), of any norm.

    Returns:
        float (N,) in [0, 2].

    >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([1.])
    """
    return 1 - functional.cosine_similarity(embeddings, targets, dim=1)


def class_logits(embeddings: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """Logits of the target class, in column 0, and of other classes: those of a margin head, without margin and scale.

    Args:
        embeddings: float (N, D), of any norm.
        targets: float (N, D), the centre of each row's own class, of any norm.
        others: float (C, D), unit rows, centres of classes that are none of the targets.

    Returns:
        float (N, 1 + C), cosines.
    """
    unit = functional.normalize(embeddings, dim=1)
    own = (unit * functional.normalize(targets, dim=1)).sum(dim=1, keepdim=True)
    return torch.cat((own, unit @ others.T), dim=1)


def negative_logit(logits: Tensor) -> Tensor:
    """Minus the target's logit (LOMMA: Nguyen et al., CVPR 2023), without the regulariser.

    Args:
        logits: float (N, 1 + C), the target in column 0.

    Returns:
        float (N,).
    """
    return -logits[:, 0]


def max_margin(logits: Tensor) -> Tensor:
    """Largest other logit minus the target's (PLG-MI: Yuan et al., AAAI 2023).

    Unlike cross-entropy its gradient does not vanish once the target leads.

    Args:
        logits: float (N, 1 + C) with C >= 1, the target in column 0.

    Returns:
        float (N,).

    >>> max_margin(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([-1.])
    """
    return logits[:, 1:].amax(dim=1) - logits[:, 0]


def poincare(logits: Tensor) -> Tensor:
    """Hyperbolic distance of the logits, brought to L1 norm 1, to the target's corner.

    Of PPA (Struppek et al., ICML 2022).

    Args:
        logits: float (N, 1 + C), the target in column 0.

    Returns:
        float (N,), at least 0.
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
    """How unlike those of public faces the features are: mean square of their standard scores.

    LOMMA asks the penultimate features to stay near a draw from the normal distribution of those of
    public faces; here they are compared with that distribution itself, which needs no draw.

    Args:
        features: float (N, D), not normalised.
        mean: float (D,), of the features of public faces.
        std: float (D,), positive.

    Returns:
        float (N,), about 1 for features of public faces.
    """
    return ((features - mean) / std).square().mean(dim=1)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, horizontal plus vertical (Rudin et al. 1992, anisotropic).

    Args:
        images: float (N, C, H, W) with H, W >= 2.

    Returns:
        float (N,), at least 0.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor([1.])
    """
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return across + down
