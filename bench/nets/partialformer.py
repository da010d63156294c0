"""PartialFormer as a face backbone, whole or without one of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.nets.vit import TOKEN_MODIFIERS, TokenBackbone, TokenOptions, parse_modifiers, token_options


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """What a PartialFormer layer is built from.

    Attributes:
        width: d, channels of a token.
        heads: heads of queries and keys, each h = ``width / heads`` wide.
        scaled_heads: N, heads of values and gate after head scaling; ``heads`` without it.
        hidden_ratio: rho: a small network is h -> rho h -> h.
        dropout: on embeddings and on what each sub-layer adds, in training.
        small_nets: every head's output passes one small feed-forward network that all heads share.
        head_scaling: the logits of ``heads`` heads become those of ``scaled_heads``.
        residual_attention: one logit map, computed from the embeddings, is added to every self-attention's logits.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    width: int
    heads: int = 8
    scaled_heads: int
    hidden_ratio: int
    dropout: float = 0.0
    small_nets: bool = True
    head_scaling: bool = True
    residual_attention: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")

    @property
    def head_width(self) -> int:
        """h, channels of a head."""
        return self.width // self.heads

    @property
    def value_heads(self) -> int:
        """Heads of values and gate."""
        return self.scaled_heads if self.head_scaling else self.heads

    @property
    def value_width(self) -> int:
        """Channels of values and gate, all heads together."""
        return self.value_heads * self.head_width


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * h) to (B, heads, T, h)."""
    # A view, not ``unflatten``: ONNX export with a free batch size would keep the size it was traced with.
    split: Tensor = x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)
    return split


def scaled_logits(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """q k' / sqrt(h) of each head: (B, heads, T, S) from (B, T, heads * h) and (B, S, heads * h)."""
    q, k = split_heads(queries, heads), split_heads(keys, heads)
    logits: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return logits


def projection(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and a zero bias."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


#: Of queries, keys, values and gates: they leave together from one input, whose variance they are to share.
INPUT_GAIN = 0.5**0.5


class HeadScaling(nn.Module):
    """Logits of few heads to logits of many: H -> N, ReLU, N -> N, at every pair of positions alike."""

    def __init__(self, heads: int, scaled_heads: int) -> None:
        super().__init__()
        self.expand = nn.Linear(heads, scaled_heads)
        self.mix = nn.Linear(scaled_heads, scaled_heads)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, H, T, S) to (B, N, T, S)."""
        hidden = torch.relu(_across_heads(self.expand, logits.flatten(2)))
        return _across_heads(self.mix, hidden).view(logits.shape[0], -1, *logits.shape[2:])


def _across_heads(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over the heads of (B, H, P), to (B, N, P)."""
    # Heads stay where they are: moving them last and back would copy the largest tensor of the layer four times. And a
    # batch of products: ``linear.weight @ x`` folds the batch into one matrix first, another copy (2.7 times slower).
    return torch.baddbmm(linear.bias.unsqueeze(-1), linear.weight.expand(x.shape[0], -1, -1), x)


class GlobalLogits(nn.Module):
    """The map of residual-like attention: q k' / sqrt(h) of the normalised embeddings, N heads of its own."""

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.heads = options.value_heads
        self.norm = nn.LayerNorm(options.width)
        self.query = projection(options.width, options.value_width, INPUT_GAIN)
        self.key = projection(options.width, options.value_width, INPUT_GAIN)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, T, d) to logits (B, N, T, T)."""
        x = self.norm(embeddings)
        return scaled_logits(self.query(x), self.key(x), self.heads)


class PartialAttention(nn.Module):
    """Multi-head attention with head scaling; heads come back apart, for the small networks.

    ``scaled_dot_product_attention`` cannot express it: between q k' and the softmax lies a network across heads.
    """

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.heads, self.value_heads = options.heads, options.value_heads
        self.query = projection(options.width, options.width, INPUT_GAIN)
        self.key = projection(options.width, options.width, INPUT_GAIN)
        self.value = projection(options.width, options.value_width, INPUT_GAIN)
        self.scaling = HeadScaling(options.heads, options.value_heads) if options.head_scaling else nn.Identity()

    def forward(
        self, x: Tensor, source: Tensor, visible: Tensor | None = None, global_logits: Tensor | None = None
    ) -> Tensor:
        """What each head gathers.

        Args:
            x: (B, T, d), where queries come from.
            source: (B, S, d), where keys and values come from.
            visible: bool, broadcastable to (B, 1, T, S): which positions of ``source`` each position may see. One
                that may see none attends to all of them alike.
            global_logits: (B, N, T, S), added after head scaling.

        Returns:
            (B, N, T, h).
        """
        logits: Tensor = self.scaling(scaled_logits(self.query(x), self.key(source), self.heads))
        if global_logits is not None:
            logits = logits + global_logits
        if visible is not None:
            # The lowest finite number instead of -inf: a row of nothing but padding must not become NaN.
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        return logits.softmax(-1) @ split_heads(self.value(source), self.value_heads)


class SmallNet(nn.Module):
    """h -> rho h, ReLU, -> h with a residual: one network for all heads and positions."""

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        width = options.head_width
        self.expand = nn.Linear(width, options.hidden_ratio * width)
        self.reduce = nn.Linear(options.hidden_ratio * width, width)

    def forward(self, heads: Tensor) -> Tensor:
        """(..., h) to (..., h)."""
        output: Tensor = heads + self.reduce(torch.relu(self.expand(heads)))
        return output


class PartialSublayer(nn.Module):
    """x + Out(ReLU(U LN(x)) * heads), heads being small_net(attention(LN(x), source)) side by side.

    It stands for both sub-layers of a Transformer's layer: an encoder layer is one of these. At the published size
    (d = 360, N = 30, rho = 4) that is 1,739,325 parameters: queries and keys 259,920, values, gate and output
    1,461,060, the small network 16,425, head scaling 1,200, layer norm 720.
    """

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(options.width)
        self.attention = PartialAttention(options)
        self.small_net = SmallNet(options) if options.small_nets else nn.Identity()
        self.gate = projection(options.width, options.value_width, INPUT_GAIN)
        self.output = projection(options.value_width, options.width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        visible: Tensor | None = None,
        global_logits: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, T, d) to tokens (B, T, d).

        Args:
            x: the tokens.
            source: (B, S, d), normalised already, for cross-attention; None for self-attention.
            visible: bool, broadcastable to (B, 1, T, S): which positions of the source each token may see.
            global_logits: (B, N, T, S) of residual-like attention.
        """
        normed = self.norm(x)
        heads = self.small_net(self.attention(normed, normed if source is None else source, visible, global_logits))
        gated = torch.relu(self.gate(normed)) * heads.transpose(1, 2).flatten(2)
        output: Tensor = x + self.dropout(self.output(gated))
        return output


class Encoder(nn.Module):
    """Encoder layers on any sequence of tokens, and the logit map they share; a final layer norm."""

    def __init__(self, options: BlockOptions, depth: int) -> None:
        super().__init__()
        self.global_logits = GlobalLogits(options) if options.residual_attention else None
        self.layers = nn.ModuleList(PartialSublayer(options) for _ in range(depth))
        self.norm = nn.LayerNorm(options.width)

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embedded tokens (B, T, d) to (B, T, d).

        Args:
            tokens: the embeddings.
            visible: bool, broadcastable to (B, 1, T, T): such as (B, 1, 1, T) for padding.
        """
        logits = None if self.global_logits is None else self.global_logits(tokens)
        for layer in self.layers:
            tokens = layer(tokens, visible=visible, global_logits=logits)
        output: Tensor = self.norm(tokens)
        return output


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
        modifiers: names in :data:`BLOCK_MODIFIERS` and :data:`bench.nets.vit.TOKEN_MODIFIERS`, joined by ``+``.
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
