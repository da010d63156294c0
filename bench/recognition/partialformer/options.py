"""The sizes of a PartialFormer block, and which of its three parts are in use."""

from __future__ import annotations

from dataclasses import dataclass


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
        ValueError: sizes below 1, a width that the heads do not divide, or a dropout outside [0, 1).
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
        if min(self.width, self.heads, self.scaled_heads, self.hidden_ratio) < 1:
            raise ValueError(f"width, heads, scaled_heads and hidden_ratio must be at least 1, got {self}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

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
