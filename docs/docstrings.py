"""Rewrites docstrings for the reference, where this project's style is not what Griffe's Google style expects."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<path>[^`]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
#: Several names that share one description, which may go on in deeper lines.
_SHARED = re.compile(r"^(?P<indent> {4,})(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)$", re.MULTILINE)


def plain(text: str) -> str:
    """A docstring without Sphinx roles, with ``Examples`` as a section and one entry for every name."""
    text = _ROLE.sub(lambda role: f"`{role['path'].rpartition('.')[2] if role['short'] else role['path']}`", text)
    text = _EXAMPLE.sub(r"\1Examples:", text)
    return _SHARED.sub(
        lambda entry: "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", ")),
        text,
    )


class ProjectStyle(Extension):
    """Rewrites docstrings as they are loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
