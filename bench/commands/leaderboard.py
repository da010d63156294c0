"""``bench leaderboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show_files
from bench.commands.flags import AsJson, EmbedFaces, EveryAttempt, Images
from bench.errors import UsageError


def leaderboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of run directories.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write to; DIR if not given.")] = None,
    images: Images = True,
    embed_faces: EmbedFaces = False,
    every: EveryAttempt = False,
    as_json: AsJson = False,
) -> None:
    """Rank defences by what leaks at worst, over all attacks; only comparable runs stand in one table."""
    from reports.report import write_leaderboard

    if embed_faces and not images:
        raise UsageError("--embed-faces and --no-images contradict each other: give one of them")
    written = write_leaderboard(directory, out_dir or directory, images=images, embed_faces=embed_faces, every=every)
    show_files(written.files, as_json, verdicts=written.verdicts)
