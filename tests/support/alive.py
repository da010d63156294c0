"""How many images are in memory at once."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Alive:
    """Counts the images of watched batches until they are let go.

    Attributes:
        now, most: images alive, and the most there ever were.
        seen: images of all batches.
    """

    def __init__(self) -> None:
        self.now = self.most = self.seen = 0
        self._lock = threading.Lock()

    def watch(self, batch: Any) -> Any:
        """Count a batch, and give it back."""
        count = len(batch.images)
        with self._lock:
            self.now, self.seen = self.now + count, self.seen + count
            self.most = max(self.most, self.now)
        weakref.finalize(batch.images, self._gone, count)
        return batch

    def _gone(self, count: int) -> None:
        with self._lock:
            self.now -= count
