"""When a training has plateaued: one rule, for the honesty check and for stopping early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plateau:
    """Saturated: the last doubling of the training gained next to nothing on held-out identities.

    A loss recorded under a decaying learning rate always falls at the end, whether or not longer
    training would help. So the rule looks at the phase of constant learning rate alone, at averaged
    weights, and compares the loss at its end with the loss at half of the images: the decay neither
    counts as progress nor hides it. The gain is nothing when it is below ``relative`` of the earlier
    loss, or below ``absolute`` of what separates the floor (the mean face) from a perfect recovery: the
    second clause is what ends the training of an attack that is already next to perfect. A loss above that of the
    floor has not come to rest, however little it moves: answering the same every time would do better.

    Attributes:
        relative: share of the earlier loss.
        absolute: share of the floor's loss.
    """

    relative: float = 0.03
    absolute: float = 0.01

    def gain(self, curve: Sequence[tuple[int, float]]) -> float | None:
        """Fall of the loss over the last doubling of ``curve`` ((images, loss), ascending), or None.

        None while the curve holds no point at half of its last number of images (or less, down to a
        quarter: points further back would make progress look slower than it is).
        """
        if not curve:
            return None
        images, loss = curve[-1]
        earlier = [(n, value) for n, value in curve if images / 4 <= n <= images / 2]
        return earlier[-1][1] - loss if earlier else None

    def reached(self, curve: Sequence[tuple[int, float]], floor: float) -> bool:
        """Whether the last doubling of ``curve`` gained next to nothing; False where that is unknown."""
        gain = self.gain(curve)
        if gain is None or curve[-1][1] > (1 + self.relative) * floor:
            return False
        earlier = curve[-1][1] + gain
        return gain <= max(self.relative * earlier, self.absolute * floor)
