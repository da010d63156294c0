"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import nn

from bench.registry import Registry


class BackboneBuilder(Protocol):
    """Builds a network from (N, C, h, w) to float32 embeddings (N, D), not normalised."""

    def __call__(
        self, *, in_channels: int, input_size: tuple[int, int], embedding_size: int, dropout: float = 0.0
    ) -> nn.Module:
        """``in_channels`` C, ``input_size`` (h, w), ``embedding_size`` D, ``dropout`` before the last linear layer."""


def _iresnet(layers: Sequence[int]) -> Callable[[], BackboneBuilder]:
    def load() -> BackboneBuilder:
        from bench.recognition.iresnet import IResNet

        return partial(IResNet, layers)

    return load


def _tiny() -> BackboneBuilder:
    from bench.recognition.iresnet import TinyIResNet

    return TinyIResNet


def _mobilefacenet() -> BackboneBuilder:
    from bench.recognition.mobilefacenet import MobileFaceNet

    return MobileFaceNet


BACKBONES: Registry[BackboneBuilder] = Registry("backbone")
BACKBONES.add("ir-tiny", _tiny)
BACKBONES.add("ir-18", _iresnet((2, 2, 2, 2)))
BACKBONES.add("ir-34", _iresnet((3, 4, 6, 3)))
BACKBONES.add("ir-50", _iresnet((3, 4, 14, 3)))
BACKBONES.add("ir-100", _iresnet((3, 13, 30, 3)))
BACKBONES.add("mobilefacenet", _mobilefacenet)
