"""A system that stores templates: faces are embedded, enrolled and matched, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.images import to_float
from bench.progress import Report, no_report
from bench.randomness import Streams
from defenses.template import TemplateDefense


@dataclass(frozen=True, slots=True)
class TemplateSystem:
    """A template defence at work on a device; what it draws comes from streams of the names that it is given.

    Tensors come and go on the processor.
    """

    defense: TemplateDefense
    streams: Streams
    device: torch.device
    batch_size: int

    @torch.no_grad()
    def embed(self, stream: str, images: Tensor, report: Report = no_report) -> Tensor:
        """Unprotected embeddings of images, uint8 (M, 3, H, W): unit rows, float32 (M, D)."""
        parts: list[Tensor] = []
        for number, part in enumerate(images.split(self.batch_size)):
            draws = self.streams.generator(f"{stream}/{number}")
            parts.append(self.defense.embed(to_float(part.to(self.device)), draws).cpu())
            report(sum(map(len, parts)), len(images))
        return torch.cat(parts)

    def enrol(self, stream: str, embeddings: Tensor, keys: Tensor | None) -> Tensor:
        """Templates (M, T) of embeddings (M, D) under keys int64 (M, k)."""

        def made(rows: Tensor, held: Tensor | None, draws: torch.Generator) -> Tensor:
            return self.defense.enrol(embeddings[rows].to(self.device), held, draws)

        return self._client_by_client(f"{stream}/enrol", len(embeddings), keys, made)

    def match(self, stream: str, stored: Tensor, fresh: Tensor, keys: Tensor | None) -> Tensor:
        """Scores, float64 (M,), of fresh embeddings (M, D) against stored templates (M, T), under the keys shown."""

        def made(rows: Tensor, held: Tensor | None, draws: torch.Generator) -> Tensor:
            return self.defense.match(stored[rows].to(self.device), fresh[rows].to(self.device), held, draws)

        return self._client_by_client(f"{stream}/match", len(fresh), keys, made).double()

    @torch.no_grad()
    def _client_by_client(
        self,
        stream: str,
        count: int,
        keys: Tensor | None,
        made: Callable[[Tensor, Tensor | None, torch.Generator], Tensor],
    ) -> Tensor:
        """What is made of so many rows, in batches in which those of a client stand together: keys are dear to expand.

        The order of the rows is kept.
        """
        order = torch.arange(count) if keys is None else torch.unique(keys, dim=0, return_inverse=True)[1].argsort()
        parts = [
            made(rows, None if keys is None else keys[rows], self.streams.generator(f"{stream}/{number}")).cpu()
            for number, rows in enumerate(order.split(self.batch_size))
        ]
        return torch.cat(parts)[order.argsort()]
