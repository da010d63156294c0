"""What ``--budget AXIS=VALUES`` asks for: the attacker's budgets, smallest first, at which leakage is measured.

Imports nothing heavy: the configuration is read before torch is.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

#: The axes that every attack has: public faces, and interceptions per victim image.
DATA = "data"
INTERCEPTIONS = "k"

#: A single value V stands for these parts of it, each twice the one before.
_PARTS = (1 / 8, 1 / 4, 1 / 2, 1)

#: Budgets nearer than this factor are no doubling: that they hardly differ says nothing about saturation.
DOUBLING = 1.5


@dataclass(frozen=True, slots=True)
class Budget:
    """An axis and at least two rising values on it; the last is the run's own.

    Attributes:
        axis: ``data``, ``k``, or one that the attack names.
        values: for ``data`` all shares in (0, 1] of the public faces, or all whole numbers of them above 1; for every
            other axis whole numbers above 0.
    """

    axis: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"k=1,2,4"``, or ``"k=8"`` for an eighth, a quarter, half and all of it (whole numbers where those are due).

        Raises:
            ValueError: anything else.
        """
        axis, equals, listed = (part.strip() for part in text.partition("="))
        if not equals or not axis or not listed:
            raise ValueError(f"write AXIS=VALUES, such as {DATA}=0.25,0.5,1 or {INTERCEPTIONS}=1,2,4,8")
        try:
            values = [float(value) for value in listed.split(",")]
        except ValueError:
            raise ValueError(f"{listed!r} is not a list of numbers") from None
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError("budgets are above 0")
        shares = axis == DATA and all(value <= 1 for value in values)
        if len(values) == 1:
            values = [values[0] * part for part in _PARTS]
            if not shares:
                values = [float(math.floor(value)) for value in values]
                values = sorted({value for value in values if value >= 1})
        if not shares and not all(value.is_integer() and value >= 1 for value in values):
            also = ", or all shares up to 1" if axis == DATA else ""
            raise ValueError(f"budgets of {axis} are whole numbers{also}, got {listed}")
        if axis == DATA and not shares and min(values) <= 1:
            raise ValueError(f"budgets of {DATA} are all shares up to 1 or all numbers of faces, got {listed}")
        if len(values) < 2 or any(after <= before for before, after in itertools.pairwise(values)):
            raise ValueError(f"at least two budgets are needed, each above the one before, got {listed}")
        return cls(axis, tuple(values))
