"""Tables and text as Markdown in which nothing of a run can act as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reports.cells import Setting
from reports.findings import findings
from reports.provenance import provenance, warnings
from reports.summary import failures, recovery_table, subject, summary
from reports.table import Entry, Row, Table

#: What Markdown reads as markup anywhere in a line; a backslash before it keeps it literal.
_SPECIAL = re.compile(r"([\\`*_{}\[\]#~$!])")
#: What HTML, or a table before Markdown is read, would take; and addresses that some dialects make links of.
_REFERENCES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "://": "&#58;//", "www.": "www&#46;"}
_REFERRED = re.compile("|".join(re.escape(one) for one in _REFERENCES), re.IGNORECASE)


def escape(text: str) -> str:
    """``text`` on one line, every character of it literal.

    Example:
        >>> escape("a|b <i> x_1")
        'a&#124;b &lt;i&gt; x\\\\_1'
    """
    literal = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return _REFERRED.sub(lambda match: _REFERENCES[match[0].lower()], literal)


def report_markdown(settings: Sequence[Setting], speed: Table | None = None) -> str:
    """The report without its figures."""
    parts = ["# What leaks, and what it costs"]
    failed = [f"- **failed:** {escape(f'{label}: {reason}')}" for label, reason in failures(settings)]
    noted = [f"- {escape(text)} ({escape('; '.join(labels))})" for text, labels in warnings(settings).items()]
    if failed or noted:
        parts += ["## Before you quote a figure", "\n".join(failed + noted)]
    for number, setting in enumerate(settings, start=1):
        parts += [f"## {escape(subject(setting))}", "\n".join(f"- {escape(str(one))}" for one in findings(setting))]
        tables = (summary(setting, number), recovery_table(setting, number))
        parts += [table_markdown(table) for table in tables if table is not None]
    if speed is not None:
        parts += ["## Speed", table_markdown(speed)]
    parts += ["## Provenance", table_markdown(provenance(settings))]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    """A pipe table under its caption; notes and intervals stand beside the values."""
    head = "| " + " | ".join(escape(column.heading) for column in table.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    rows = [_row(row) for row in (*table.rows, *table.foot)]
    return "\n".join([f"*{escape(table.caption)}*", "", head, rule, *rows])


def _row(row: Row) -> str:
    return "| " + " | ".join(_entry(entry) for entry in row.entries) + " |"


def _entry(entry: Entry) -> str:
    value = escape(entry.text)
    parts = [f"**{value}**" if entry.best else value]
    if entry.interval:
        parts.append(entry.interval)  # digits between brackets
    if entry.note:
        parts.append(f"({escape(entry.note)})")
    return " ".join(parts)
