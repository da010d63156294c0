"""``bench runs``: the run store, run by run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show, table
from bench.commands.flags import AsJson


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What --out was.", envvar="BENCH_OUT")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, the newest first."""
    from bench.run.archive import find_runs, read_manifest

    rows = []
    for directory in find_runs([folder]):
        manifest = read_manifest(directory)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        rows.append(
            {
                "run": directory.name,
                "status": manifest.status,
                "preset": manifest.config.get("preset"),
                "updated": manifest.updated,
                "megabytes": round(size / 1e6, 1),
            }
        )
    rows.sort(key=lambda row: str(row["updated"]), reverse=True)
    show(rows, as_json, lambda: table((row.values() for row in rows), *rows[0]))
