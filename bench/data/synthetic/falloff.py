"""Soft spots of compact support: what bumps, shadows and blushes are made of."""

from __future__ import annotations

from torch import Tensor


def falloff(squared: Tensor) -> Tensor:
    """(1 - q/8)^8 for q < 8, else 0: within .05 of exp(-q), in place.

    The exponential would leave denormal numbers over most of a face, which slow a processor down several
    times; this is also exactly zero away from the spot, so that a feature can be left out there.
    """
    return squared.mul_(-0.125).add_(1).clamp_(min=0).square_().square_().square_()


def bell(q: Tensor) -> Tensor:
    """Approximately exp(-q^2)."""
    return falloff(q * q)


def spot(qx: Tensor, qy: Tensor) -> Tensor:
    """Approximately exp(-qx^2 - qy^2)."""
    return falloff((qx * qx).addcmul_(qy, qy))
