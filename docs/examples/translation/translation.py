"""The PartialFormer translation model: shared embeddings, encoder, decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bench.nets.partialformer import BlockOptions, Decoder, Encoder

#: Ids that every vocabulary begins with.
PADDING, BEGIN, END = 0, 1, 2


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of positions, (length, width) in [-1, 1] (Vaswani et al., NeurIPS 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(length, device=device).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width]


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
