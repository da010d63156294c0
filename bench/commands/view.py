"""``bench view``."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import out, show_line
from bench.commands.flags import AsJson
from bench.errors import MissingError, UsageError


def view(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of run directories.", envvar="BENCH_OUT")
    ] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show all runs of a folder on a page of this machine, those under way as they go on, until interrupted."""
    if not folder.is_dir():
        raise MissingError(f"{folder} is not there: name the folder that --out was")
    try:
        import uvicorn

        from reports.view import make_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise MissingError("bench view needs Starlette and uvicorn: pip install ppfr-bench[view]") from error

    host, token = "127.0.0.1", secrets.token_urlsafe(24)
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UsageError(f"--port {port} cannot be used ({error.strerror}): leave it out to take a free one") from None
    with listener:
        address = f"http://{host}:{listener.getsockname()[1]}/{token}/"
        show_line({"address": address}, as_json, f"{address}\nonly this machine can open it; Ctrl-C ends it")
        out.file.flush()
        if open_page:
            typer.launch(address)
        config = uvicorn.Config(
            make_app(folder, token), log_level="warning", access_log=False, server_header=False, lifespan="off"
        )
        with contextlib.suppress(KeyboardInterrupt):  # how it is ended
            uvicorn.Server(config).run(sockets=[listener])
