"""Vector figures of a report, one a file; each returns a :class:`reports.figures.svg.Drawing` or None."""
