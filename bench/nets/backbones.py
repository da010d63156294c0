"""The backbones by name.

Some defences send maps that are smaller than the face. A network that halved them as often as a face would look at a
few places only, so it is told how much smaller they are and starts where it would have reduced a face to their size:

* IResNets, ``ir-tiny`` and MobileFaceNets leave out as many of their first halvings (the layers stay, with stride 1);
* Transformers cut them into patches of any whole size, as many as of a face, one value each at least;
* timm's networks, whose layers are theirs, get a learned sub-pixel stem that brings the maps near to a face's size.

A name may carry what it is to be changed by, after a colon: ``partialformer-tiny:no-small-nets``, ``timm:resnet18``. So
everything that names a backbone (flags, configurations, caches, checkpoints) carries variants too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol

from torch import nn

from bench.registry import Registry, target

#: ArcFace's IResNets: residual units of each of the four stages.
IRESNETS: Mapping[str, tuple[int, int, int, int]] = MappingProxyType(
    {"ir-18": (2, 2, 2, 2), "ir-34": (3, 4, 6, 3), "ir-50": (3, 4, 14, 3), "ir-100": (3, 13, 30, 3)}
)


class BackboneBuilder(Protocol):
    """Builds a network from (N, C, h, w) to float32 embeddings (N, D), not normalised."""

    def __call__(
        self,
        *,
        in_channels: int,
        input_size: tuple[int, int],
        embedding_size: int,
        dropout: float = 0.0,
        reduced: int = 0,
    ) -> nn.Module:
        """``in_channels`` C, ``input_size`` (h, w), ``embedding_size`` D, ``dropout`` before the last linear layer.

        Maps are ``reduced`` times half as large as a face, to the nearest whole number.
        """


def _iresnet(layers: Sequence[int]) -> Callable[[], BackboneBuilder]:
    return lambda: partial(target("bench.nets.iresnet:iresnet")(), layers)


def _transformer(family: str, size: str) -> Callable[..., BackboneBuilder]:
    def load(modifiers: str = "") -> BackboneBuilder:
        builder: BackboneBuilder = target(f"bench.nets.{family}:{family}")()(size, modifiers)
        return builder

    return load


def _timm(name: str) -> BackboneBuilder:
    from bench.nets.timm_backbone import TimmBackbone, check_name

    check_name(name)
    return partial(TimmBackbone, name)


class Backbones(Registry[BackboneBuilder]):
    """A registry in which some names stand for a family, whose members are called ``FAMILY:VARIANT``."""

    def __init__(self) -> None:
        super().__init__("backbone")
        self._families: dict[str, Callable[[str], BackboneBuilder]] = {}

    def add_family(self, name: str, loader: Callable[[str], BackboneBuilder]) -> None:
        """Register a family; ``loader`` turns what stands after the colon into a builder, or raises UsageError."""
        self._families[name] = loader

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).partition(":")[0] in self._families

    def get(self, name: str) -> BackboneBuilder:
        """The builder of the backbone called ``name``.

        Raises:
            UsageError: there is none; the message lists what exists and the nearest match.
            MissingError: it needs a package that is not installed.
        """
        family, colon, variant = name.partition(":")
        if family in self._families and (colon or not super().__contains__(name)):
            return self._families[family](variant)
        return super().get(name)


BACKBONES = Backbones()
BACKBONES.add("ir-tiny", target("bench.nets.iresnet:tiny_iresnet"))
for _name, _layers in IRESNETS.items():
    BACKBONES.add(_name, _iresnet(_layers))
BACKBONES.add("mobilefacenet", target("bench.nets.mobilefacenet:MobileFaceNet"))
BACKBONES.add("mobilefacenet-tiny", lambda: partial(target("bench.nets.mobilefacenet:MobileFaceNet")(), tiny=True))
for _family, _sizes in (("partialformer", ("tiny", "small")), ("vit", ("tiny", "tiny-equal", "small", "small-equal"))):
    for _size in _sizes:
        BACKBONES.add(f"{_family}-{_size}", _transformer(_family, _size))
        BACKBONES.add_family(f"{_family}-{_size}", _transformer(_family, _size))
BACKBONES.add_family("timm", _timm)
