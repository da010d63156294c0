"""From a translation model to sentences: greedy decoding and beam search.

Both run the decoder on the whole prefix at every step. That costs a second factor of the length, which is nothing on
sentences of some dozen words, and keeps the model free of caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .translation import BEGIN, END, PADDING, TranslationModel


@torch.no_grad()
def greedy(model: TranslationModel, source: Tensor, max_length: int) -> Tensor:
    """The most likely next word at every step.

    Args:
        model: in evaluation mode.
        source: int64 (B, S), padded with :data:`PADDING`.
        max_length: words at most, :data:`END` included.

    Returns:
        int64 (B, L), L <= ``max_length``: words up to and with :data:`END`, then :data:`PADDING`.
    """
    memory, visible = model.encode(source)
    target = source.new_full((len(source), 1), BEGIN)
    finished = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    for _ in range(max_length):
        word = _log_probabilities(model, target, memory, visible).argmax(-1)
        word = word.masked_fill(finished, PADDING)
        target = torch.cat((target, word.unsqueeze(1)), 1)
        finished |= word == END
        if finished.all():
            break
    return target[:, 1:]


@torch.no_grad()
def beam_search(
    model: TranslationModel, source: Tensor, max_length: int, *, beams: int = 4, length_penalty: float = 0.6
) -> Tensor:
    """The sentence of the highest log-probability over ((5 + length) / 6) ** ``length_penalty``.

    The penalty is that of Wu et al., *Google's Neural Machine Translation System*, 2016, equation 14. Finished
    sentences stay in the beam and compete with those that go on.

    Args:
        model: in evaluation mode.
        source: int64 (B, S), padded with :data:`PADDING`.
        max_length: words at most, :data:`END` included.
        beams: sentences kept for each source.
        length_penalty: 0 ranks by log-probability alone; more favours longer sentences.

    Returns:
        int64 (B, L), as :func:`greedy`.

    Raises:
        ValueError: fewer than one beam.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    count = len(source)
    memory, visible = (x.repeat_interleave(beams, 0) for x in model.encode(source))
    target = source.new_full((count, beams, 1), BEGIN)
    # All beams start alike: only the first may be extended, or the beam would hold copies.
    scores = torch.full((count, beams), -torch.inf, device=source.device)
    scores[:, 0] = 0
    lengths = torch.zeros_like(target[..., 0])
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    for _ in range(max_length):
        step = _log_probabilities(model, target.flatten(0, 1), memory, visible).unflatten(0, (count, beams))
        only_padding = torch.full_like(step[0, 0], -torch.inf)
        only_padding[PADDING] = 0
        step = torch.where(finished.unsqueeze(-1), only_padding, step)
        grown = lengths + ~finished
        totals = scores.unsqueeze(-1) + step
        ranks = totals / ((5 + grown.unsqueeze(-1)) / 6) ** length_penalty
        best = ranks.flatten(1).topk(beams).indices
        parent, word = best // step.shape[-1], best % step.shape[-1]
        scores = totals.flatten(1).gather(1, best)
        lengths = grown.gather(1, parent)
        kept = target.gather(1, parent.unsqueeze(-1).expand_as(target))
        target = torch.cat((kept, word.unsqueeze(-1)), -1)
        finished = finished.gather(1, parent) | (word == END)
        if finished.all():
            break
    return target[:, 0, 1:]  # topk sorts: the first is the best


def _log_probabilities(model: TranslationModel, target: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
    """Of the word after ``target`` (B, T): float32 (B, vocabulary). Padding and a second beginning are no words."""
    logits = model.decode(target, memory, visible)[:, -1].float()
    logits[:, [PADDING, BEGIN]] = -torch.inf
    return logits.log_softmax(-1)
