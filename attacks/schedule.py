"""Learning rate that rises, holds and decays; the hold can be cut short."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WarmHoldDecay:
    """Linear warm-up, a constant phase, linear decay to zero.

    Unlike a cosine it has a phase in which the learning rate says nothing about how long the training
    will be, so that losses at different lengths can be compared, and the decay can start early.

    Attributes:
        steps: in all.
        warmup: share of ``steps`` in the warm-up.
        decay: share of ``steps`` in the decay.
    """

    steps: int
    warmup: float
    decay: float

    @property
    def hold_end(self) -> int:
        """Step at which the decay starts unless it is brought forward."""
        return max(1, self.steps - int(self.steps * self.decay))

    def end(self, decay_start: int | None = None) -> int:
        """Number of steps in all when the decay starts at ``decay_start``: the shares are kept."""
        if decay_start is None or decay_start >= self.hold_end:
            return self.steps
        return decay_start + math.ceil(decay_start * self.decay / (1 - self.decay))

    def factor(self, step: int, decay_start: int | None = None) -> float:
        """Multiple of the full learning rate at ``step`` (0-based), in (0, 1]."""
        rise = min(1.0, (step + 1) / (self.warmup * self.steps + 1))
        start = self.hold_end if decay_start is None else decay_start
        fall = 1.0 if step < start else (self.end(start) - step) / (self.end(start) - start + 1)
        return min(rise, fall)

    def checks(self) -> list[int]:
        """Steps, ascending, at which to record the loss: the end of the hold, its halves, and between the last ones.

        Few, for validation costs time; each of the later ones has another at half of its steps.
        """
        shares = (1, 2**-0.5, 1 / 2, 8**-0.5, 1 / 4, 1 / 8, 1 / 16)
        points = {round(self.hold_end * share) for share in shares}
        return sorted(point for point in points if point >= 1)
