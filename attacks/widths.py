"""Channels of the levels of a network, as an option that the command line can give."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field


def _split(value: object) -> object:
    """``"16,32,64"``, as the command line passes it, to its parts."""
    return [part for part in value.replace(" ", "").split(",") if part] if isinstance(value, str) else value


Widths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=8192)], ...], BeforeValidator(_split), Field(min_length=1, max_length=8)
]
