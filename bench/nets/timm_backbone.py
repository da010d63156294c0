"""Backbones of timm (PyTorch Image Models), an optional dependency: ``--backbone timm:NAME``."""

from __future__ import annotations

import difflib
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.errors import MissingError, UsageError, first_line
from bench.nets.iresnet import EmbeddingOutput


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingError("backbones timm:NAME need timm: pip install ppfr-bench[timm]") from error
    return timm


#: Channels of a sub-pixel stem at least: fewer would squeeze what a map holds in each place.
_LEAST_CHANNELS = 16


def subpixel_stem(channels: int, times: int) -> tuple[nn.Module, int]:
    """Maps (N, C, h, w) to (N, C', 2^times h, 2^times w): a 1x1 convolution and a pixel shuffle; and C'.

    C' is as many as hold all C maps, 16 at least (Shi et al., CVPR 2016, section 3.2).
    """
    side = 2**times
    outputs = max(_LEAST_CHANNELS, -(-channels // side**2))
    return nn.Sequential(nn.Conv2d(channels, outputs * side**2, 1), nn.PixelShuffle(side)), outputs


class TimmBackbone(nn.Module):
    """A timm network without its classifier, and ArcFace's output layer on its pooled features.

    Maps that are ``reduced`` times half as large as a face first pass :func:`subpixel_stem`.

    The weights are fresh: nothing is downloaded. A network that must know its input size (Vision Transformers and
    their kin) is built for ``input_size``.

    Raises:
        UsageError: the network does not take such an input.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int,
        input_size: tuple[int, int],
        embedding_size: int,
        dropout: float = 0.0,
        reduced: int = 0,
    ) -> None:
        super().__init__()
        timm = _timm()
        self.stem: nn.Module = nn.Identity()
        if reduced:
            self.stem, in_channels = subpixel_stem(in_channels, reduced)
            input_size = (input_size[0] * 2**reduced, input_size[1] * 2**reduced)
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        sizes = {"img_size": input_size} if config is not None and config.fixed_input_size else {}
        # Some networks keep tables (of relative positions, say) that no checkpoint holds, so that they cannot start on
        # the meta device and get their values later. Only there is the generator restored: the weights are thrown away.
        here = torch.empty(0).device  # torch 2.6 tells of a default device, but not of one that a context sets
        meta = here.type == "meta"
        try:
            with torch.device("cpu" if meta else here), torch.random.fork_rng([], enabled=meta):
                self.features = timm.create_model(
                    name, pretrained=False, in_chans=in_channels, num_classes=0, **sizes
                ).eval()
                with torch.no_grad():
                    pooled = self.features(torch.zeros(1, in_channels, *input_size))
            if pooled.ndim != 2:
                raise ValueError(f"its features have shape {tuple(pooled.shape)}, expected one row per image")
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            shape = (in_channels, *input_size)
            raise UsageError(
                f"backbone timm:{name} cannot take representations {shape}: {first_line(error)}"
            ) from error
        self.features.train()
        self.output = EmbeddingOutput((pooled.shape[1], 1, 1), embedding_size, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to float32 embeddings (N, D), not normalised."""
        embedding: Tensor = self.output(self.features(self.stem(x))[..., None, None])
        return embedding


def check_name(name: str) -> None:
    """Whether timm has such a network.

    Raises:
        MissingError: timm is not installed.
        UsageError: it has none; the message names the nearest.
    """
    timm = _timm()
    if not name:
        raise UsageError("backbone timm: which? Write timm:NAME, for example timm:resnet18")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, cast("list[str]", timm.list_models()), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(f'timm:{other}' for other in near)}?" if near else "see timm.list_models()"
        raise UsageError(f"timm has no network {name!r}: {hint}")
