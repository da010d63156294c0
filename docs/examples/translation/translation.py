"""The PartialFormer translation model: shared embeddings, encoder, decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bench.nets.partialformer import BlockOptions, Encoder, GlobalLogits, PartialSublayer

#: Ids that every vocabulary begins with.
PADDING, BEGIN, END = 0, 1, 2


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of positions, (length, width) in [-1, 1] (Vaswani et al., NeurIPS 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(length, device=device).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width]


def causal(length: int, device: torch.device | None = None) -> Tensor:
    """Bool (T, T): position t sees positions up to t."""
    mask: Tensor = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask


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


class TranslationModel(nn.Module):
    """An encoder-decoder over one vocabulary, whose embedding is shared by source, target and output.

    Args:
        vocabulary: words, :data:`PADDING`, :data:`BEGIN` and :data:`END` included.
        encoder: sizes of the encoder's layers.
        decoder: sizes of the decoder's layers, of the same width.
        depths: encoder and decoder layers.

    Raises:
        ValueError: encoder and decoder differ in width.
    """

    def __init__(self, vocabulary: int, encoder: BlockOptions, decoder: BlockOptions, depths: tuple[int, int]) -> None:
        super().__init__()
        if encoder.width != decoder.width:
            raise ValueError(f"encoder and decoder must be equally wide, got {encoder.width} and {decoder.width}")
        self.embedding = nn.Embedding(vocabulary, encoder.width, padding_idx=PADDING)
        nn.init.normal_(self.embedding.weight, std=encoder.width**-0.5)
        with torch.no_grad():
            self.embedding.weight[PADDING] = 0
        self.dropout = nn.Dropout(encoder.dropout)
        self.encoder = Encoder(encoder, depths[0])
        self.decoder = Decoder(decoder, depths[1])

    def embed(self, words: Tensor) -> Tensor:
        """Words, int64 (B, T), to embeddings with their positions, (B, T, d)."""
        width = self.embedding.embedding_dim
        x = self.embedding(words) * math.sqrt(width) + sinusoids(words.shape[1], width, words.device)
        embedded: Tensor = self.dropout(x)
        return embedded

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Source words, int64 (B, S), to their encoding (B, S, d) and which are no padding, bool (B, 1, 1, S)."""
        visible = (source != PADDING)[:, None, None]
        return self.encoder(self.embed(source), visible), visible

    def decode(self, target: Tensor, memory: Tensor, memory_visible: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of the word after each of ``target``, int64 (B, T), given :meth:`encode`'s."""
        logits: Tensor = self.decoder(self.embed(target), memory, memory_visible) @ self.embedding.weight.T
        return logits

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of the word after each of ``target`` (B, T), given ``source`` (B, S)."""
        return self.decode(target, *self.encode(source))


def published(vocabulary: int = 34_000, *, residual_attention: bool = True) -> TranslationModel:
    """The published configuration for WMT14 En-De: 24 encoder and 6 decoder layers, d = 360."""
    encoder = BlockOptions(
        width=360, scaled_heads=30, hidden_ratio=4, dropout=0.1, residual_attention=residual_attention
    )
    decoder = BlockOptions(
        width=360, scaled_heads=16, hidden_ratio=2, dropout=0.1, residual_attention=residual_attention
    )
    return TranslationModel(vocabulary, encoder, decoder, (24, 6))
