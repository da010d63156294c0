"""Faces as sequences of tokens: what Transformer backbones share, and the plain Vision Transformer.

Source: Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021 (patches, positions, class token,
pre-norm layers).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import UsageError
from bench.nets.iresnet import EmbeddingOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """How a representation becomes tokens, and tokens an embedding.

    Attributes:
        grid: most patches along a side.
        channels: each channel is a token (its whole map), instead of each patch.
        pool: what the embedding is read off: ``places``, a sum of the tokens in which every channel of every place has
            a learned weight, as in MobileFaceNet's global depthwise convolution; their ``mean``; or an added
            ``class-token``. Faces are aligned: knowing places, a small training learns much faster.
    """

    grid: int
    channels: bool = False
    pool: Literal["places", "mean", "class-token"] = "places"


def patch_size(input_size: tuple[int, int], grid: int, reduced: int = 0) -> int:
    """The smallest power of two that cuts ``input_size`` into at most ``grid`` patches a side.

    Of maps that are smaller than a face (``reduced``), whose sides may be any number, the smallest whole number.
    """
    if reduced:
        return -(-max(input_size) // grid)
    patch = 1
    while -(-max(input_size) // patch) > grid:
        patch *= 2
    return patch


class Tokens(nn.Module):
    """A representation (N, C, h, w) to embedded tokens (N, T, d).

    Patches are cut and embedded by one strided convolution over all channels; sizes that they do not divide are padded
    with zeros at the bottom and the right. Channel tokens are the flattened maps through one linear layer.
    """

    def __init__(
        self, options: TokenOptions, width: int, in_channels: int, input_size: tuple[int, int], reduced: int = 0
    ) -> None:
        super().__init__()
        height, breadth = input_size
        self.channels = options.channels
        patch = patch_size(input_size, options.grid, reduced)
        self.padding = (0, -breadth % patch, 0, -height % patch)
        if options.channels:
            self.embed: nn.Module = nn.Linear(height * breadth, width)
            count = in_channels
        else:
            self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
            count = -(-height // patch) * -(-breadth // patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if options.pool == "class-token" else None
        self.count = count if self.class_token is None else count + 1
        self.positions = nn.Parameter(torch.empty(1, self.count, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, T, d); a class token comes first."""
        if self.channels:
            tokens = self.embed(x.flatten(2))
        else:
            if any(self.padding):
                x = F.pad(x, self.padding)
            tokens = self.embed(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens), 1)
        # Contiguous, once: convolutions leave tokens in whatever order their memory format has.
        embedded: Tensor = (tokens + self.positions).contiguous()
        return embedded


class TokenBackbone(nn.Module):
    """Tokens, an encoder, (N, T, d) to (N, T, d) with a layer norm at its end, and a face embedding."""

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        options: TokenOptions,
        *,
        in_channels: int,
        input_size: tuple[int, int],
        embedding_size: int,
        dropout: float = 0.0,
        reduced: int = 0,
    ) -> None:
        super().__init__()
        self.tokens = Tokens(options, width, in_channels, input_size, reduced)
        self.encoder = encoder
        self.pool = options.pool
        count = self.tokens.count
        self.weights = nn.Parameter(torch.randn(count, width) * count**-0.5) if options.pool == "places" else None
        self.output = EmbeddingOutput((width, 1, 1), embedding_size, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to float32 embeddings (N, D), not normalised."""
        tokens = self.encoder(self.tokens(x))
        if self.weights is not None:
            pooled = (tokens * self.weights).sum(1)
        else:
            pooled = tokens.mean(1) if self.pool == "mean" else tokens[:, 0]
        embedding: Tensor = self.output(pooled[..., None, None])
        return embedding


class PlainLayer(nn.Module):
    """A Transformer's encoder layer, pre-norm: self-attention, then a feed-forward network of 4 d with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, d) to (N, T, d)."""
        packed = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        gathered = F.scaled_dot_product_attention(query, key, value)
        x = x + self.attention_output(gathered.transpose(1, 2).flatten(2))
        output: Tensor = x + self.feed_forward(x)
        return output


#: (width, heads, depth, patches a side). ``-equal`` has the parameters of the PartialFormer of that size (within 3 %
#: with 512 dimensions), the others its width and depth.
SIZES: Mapping[str, tuple[int, int, int, int]] = {
    "tiny": (128, 8, 6, 8),
    "tiny-equal": (112, 8, 6, 8),
    "small": (384, 8, 12, 14),
    "small-equal": (320, 8, 12, 14),
}

#: What ``NAME:MODIFIER+MODIFIER`` may change about tokens.
TOKEN_MODIFIERS: Mapping[str, Mapping[str, Any]] = {
    "channels": {"channels": True},
    "mean": {"pool": "mean"},
    "class-token": {"pool": "class-token"},
}


def parse_modifiers(name: str, modifiers: str, known: Collection[str]) -> tuple[str, ...]:
    """``"a+b"`` to ``("a", "b")``.

    Raises:
        UsageError: an unknown modifier, one given twice, or two that exclude each other.
    """
    parts = tuple(modifiers.split("+")) if modifiers else ()
    for part in parts:
        if part not in known:
            raise UsageError(f"backbone {name}: unknown modifier {part!r}; available: {', '.join(sorted(known))}")
        if parts.count(part) > 1:
            raise UsageError(f"backbone {name}: {part!r} is given twice")
    if {"class-token", "mean"} <= set(parts):
        raise UsageError(f"backbone {name}: class-token and mean exclude each other")
    return parts


def token_options(grid: int, modifiers: Collection[str]) -> TokenOptions:
    """Token options of a grid, changed by those of ``modifiers`` that concern tokens."""
    options = TokenOptions(grid=grid)
    for modifier in modifiers:
        options = replace(options, **TOKEN_MODIFIERS.get(modifier, {}))
    return options


def _build(width: int, heads: int, depth: int, options: TokenOptions, **sizes: Any) -> TokenBackbone:
    encoder = nn.Sequential(*(PlainLayer(width, heads) for _ in range(depth)), nn.LayerNorm(width))
    return TokenBackbone(encoder, width, options, **sizes)


def vit(size: str, modifiers: str = "") -> partial[TokenBackbone]:
    """A builder of a plain Vision Transformer for faces.

    Args:
        size: a name in :data:`SIZES`.
        modifiers: names in :data:`TOKEN_MODIFIERS`, joined by ``+``.

    Raises:
        UsageError: an unknown modifier.
    """
    width, heads, depth, grid = SIZES[size]
    chosen = parse_modifiers(f"vit-{size}", modifiers, TOKEN_MODIFIERS)
    return partial(_build, width, heads, depth, token_options(grid, chosen))
