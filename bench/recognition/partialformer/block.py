"""The PartialFormer sub-layer (attention, small networks, gate), and encoder and decoder made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.recognition.partialformer.attention import INPUT_GAIN, GlobalLogits, PartialAttention, causal, projection
from bench.recognition.partialformer.options import BlockOptions


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


class DecoderLayer(nn.Module):
    """A self-attention and a cross-attention sub-layer, each with a small network, gate and norm of its own.

    Queries and gate of the cross-attention come from the target, keys and values from the encoder. At the published
    size (d = 360, N = 16, rho = 2) each sub-layer has 1,048,691 parameters (queries and keys 259,920, values, gate and
    output 779,400, the small network 8,235, head scaling 416, norm 720), the layer 2,097,382.
    """

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.itself = PartialSublayer(options)
        self.cross = PartialSublayer(options)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        visible: Tensor | None = None,
        memory_visible: Tensor | None = None,
        global_logits: Tensor | None = None,
    ) -> Tensor:
        """Target tokens (B, T, d) and encoded source (B, S, d) to (B, T, d)."""
        x = self.itself(x, visible=visible, global_logits=global_logits)
        output: Tensor = self.cross(x, memory, memory_visible)
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
            visible: bool, broadcastable to (B, 1, T, T): for padding (B, 1, 1, T), for a language model ``causal(T)``.
        """
        logits = None if self.global_logits is None else self.global_logits(tokens)
        for layer in self.layers:
            tokens = layer(tokens, visible=visible, global_logits=logits)
        output: Tensor = self.norm(tokens)
        return output


class Decoder(nn.Module):
    """Decoder layers, the logit map that their self-attentions share, and a final layer norm.

    Every position sees itself and those before it.
    """

    def __init__(self, options: BlockOptions, depth: int) -> None:
        super().__init__()
        self.global_logits = GlobalLogits(options) if options.residual_attention else None
        self.layers = nn.ModuleList(DecoderLayer(options) for _ in range(depth))
        self.norm = nn.LayerNorm(options.width)

    def forward(self, tokens: Tensor, memory: Tensor, memory_visible: Tensor | None = None) -> Tensor:
        """Embedded target (B, T, d) and encoded source (B, S, d) to (B, T, d).

        Args:
            tokens: embeddings of the target so far.
            memory: the encoder's output.
            memory_visible: bool, broadcastable to (B, 1, T, S): False for padding of the source.
        """
        visible = causal(tokens.shape[1], tokens.device)
        logits = None if self.global_logits is None else self.global_logits(tokens)
        for layer in self.layers:
            tokens = layer(tokens, memory, visible, memory_visible, logits)
        output: Tensor = self.norm(tokens)
        return output
