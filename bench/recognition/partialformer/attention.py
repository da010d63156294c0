"""Attention whose logits pass a small network across heads, and the logit map that all layers share.

Source: Zheng et al., Findings of ACL 2024 (head scaling, residual-like attention); where the paper leaves it open,
as in the authors' released configuration for WMT14 En-De.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.recognition.partialformer.options import BlockOptions


def causal(length: int, device: torch.device | None = None) -> Tensor:
    """Bool (T, T): position t sees positions up to t."""
    mask: Tensor = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask


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
