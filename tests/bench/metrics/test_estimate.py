"""An estimate that lacks something has to say why."""

from __future__ import annotations

from typing import Any

import pytest

from bench.metrics.estimate import Estimate


@pytest.mark.parametrize("fields", [(None, None, 3), (0.5, None, 3), (None, (0.0, 1.0), 3)])
def test_what_is_missing_needs_a_reason(fields: tuple[Any, Any, int]) -> None:
    with pytest.raises(ValueError, match="must say why"):
        Estimate(*fields)


def test_an_interval_needs_a_value() -> None:
    with pytest.raises(ValueError, match="an interval needs a value"):
        Estimate(None, (0.0, 1.0), 3, "no data")
