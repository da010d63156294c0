"""PartialFormer as a face backbone, whole or without one of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from bench.recognition.partialformer.block import Encoder
from bench.recognition.partialformer.options import BlockOptions
from bench.recognition.vit import TOKEN_MODIFIERS, TokenBackbone, TokenOptions, parse_modifiers, token_options

#: Block, depth, and patches a side. With N = 16 a layer is two thirds as large as a Transformer's of its width.
SIZES: Mapping[str, tuple[BlockOptions, int, int]] = {
    "tiny": (BlockOptions(width=128, scaled_heads=16, hidden_ratio=4), 6, 8),
    "small": (BlockOptions(width=384, scaled_heads=16, hidden_ratio=4), 12, 14),
}

#: Each takes one part of the block away, for ablations.
BLOCK_MODIFIERS: Mapping[str, Mapping[str, bool]] = {
    "no-small-nets": {"small_nets": False},
    "no-head-scaling": {"head_scaling": False},
    "no-residual-attention": {"residual_attention": False},
}


def _build(block: BlockOptions, depth: int, options: TokenOptions, **sizes: Any) -> TokenBackbone:
    return TokenBackbone(Encoder(block, depth), block.width, options, **sizes)


def partialformer(size: str, modifiers: str = "") -> partial[TokenBackbone]:
    """A builder of a PartialFormer for faces.

    Args:
        size: a name in :data:`SIZES`.
        modifiers: names in :data:`BLOCK_MODIFIERS` and :data:`bench.recognition.vit.TOKEN_MODIFIERS`, joined by ``+``.
            Without head scaling, the values and the gate have as many heads as queries and keys, which also makes
            them smaller.

    Raises:
        UsageError: an unknown modifier.
    """
    block, depth, grid = SIZES[size]
    chosen = parse_modifiers(f"partialformer-{size}", modifiers, {*BLOCK_MODIFIERS, *TOKEN_MODIFIERS})
    for modifier in chosen:
        block = replace(block, **BLOCK_MODIFIERS.get(modifier, {}))
    return partial(_build, block, depth, token_options(grid, chosen))
