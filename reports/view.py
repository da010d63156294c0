"""``bench view``: a local page over all runs of a folder, those under way included.

An ASGI application that reads, and writes nothing. It answers whoever knows the token, which is the first part of every
address, and only under the names of this machine: a page of elsewhere that had its own name resolved to the loopback
address (DNS rebinding) is refused. A run is looked up among those that the folder holds, so that no address leads out
of it. The pages are those of ``bench report`` and load nothing.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from bench.errors import BenchError, MissingError
from bench.gate.compare import Difference, compare
from bench.gate.formats import interval, number
from bench.measures import MISSING
from bench.run.archive import Run, find_runs, last_event, load_run
from reports.cells import Cell, settings
from reports.figures import training_figures
from reports.provenance import provenance
from reports.report import render_page, report_page
from reports.summary import LEAKS
from reports.table import Column, Entry, Row, Table, measured

#: Names of this machine that a browser may have asked for.
HOSTS = ("127.0.0.1", "localhost")
#: Files of a run that change while it is under way.
_CHANGING = ("manifest.json", "metrics.json", "events.jsonl", "samples/samples.json")
#: What reading or drawing a damaged run may raise.
_DAMAGE = (BenchError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError)
#: Without an event for so long, a run is said to be silent.
_SILENCE = timedelta(minutes=10)

_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Doing:
    """What a run under way said last: its task, how far it is, its figures, and when that was, in words."""

    name: str
    task: str
    done: float | None
    total: float | None
    figures: str
    heard: str


class Shelf:
    """The runs of a folder without their raw values, each read again only when a file of it has changed.

    Attributes:
        folder: holds them, or is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[tuple[int, ...], Run | str]] = {}

    def stamps(self) -> dict[str, tuple[int, ...]]:
        """Name of each run -> times and sizes of its files."""
        try:
            found = find_runs([self.folder])
        except MissingError:
            return {}
        return {directory.name or directory.resolve().name: _stamp(directory) for directory in found}

    def runs(self) -> dict[str, Run | str]:
        """Each run by its name, or what is wrong with it in one line."""
        stamps = self.stamps()
        for name in self._read.keys() - stamps.keys():
            del self._read[name]
        for name, stamp in stamps.items():
            if name not in self._read or self._read[name][0] != stamp:
                self._read[name] = stamp, self._load(name)
        return {name: self._read[name][1] for name in stamps}

    def _load(self, name: str) -> Run | str:
        root = self.folder.resolve()
        directory = root if root.name == name and (root / "manifest.json").is_file() else root / name
        if directory != root and directory.resolve().parent != root:
            return f"{name} leads out of {self.folder}: it is not shown"
        try:
            run = load_run(directory, tables=False)
            if run.manifest.status == "started":
                last_event(directory)
            [setting] = settings([run])
            provenance([setting])
            for cell in setting.cells:
                _entries(cell, "")
        except _DAMAGE as error:
            return " ".join(str(error).split()) or type(error).__name__
        return run


def _stamp(directory: Path) -> tuple[int, ...]:
    stamp: list[int] = []
    for name in _CHANGING:
        try:
            state = (directory / name).stat()
            stamp += (state.st_mtime_ns, state.st_size)
        except OSError:
            stamp += (0, 0)
    return tuple(stamp)


def make_app(folder: Path, token: str) -> Starlette:
    """The application.

    Args:
        folder: holds run directories, or is one.
        token: the first part of every address that is answered.
    """
    shelf, lock = Shelf(folder), threading.Lock()

    async def guard(request: Request, answer: RequestResponseEndpoint) -> Response:
        given = request.url.path.split("/")[1]
        if secrets.compare_digest(given.encode(), token.encode()):
            response = await answer(request)
        else:
            response = PlainTextResponse("403: take the whole address that bench view printed\n", 403)
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    def page(make: Callable[[Request], str]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            # A page changes with the files, and with what was asked for; of runs under way also as time goes by.
            state = (shelf.stamps(), str(request.url.query), datetime.now(UTC).strftime("%H:%M"))
            mark = f'"{hashlib.sha256(repr(state).encode()).hexdigest()}"'
            if request.headers.get("if-none-match") == mark:
                return Response(status_code=304, headers={"ETag": mark})
            try:
                with lock:  # matplotlib has one style for all threads
                    return HTMLResponse(make(request), headers={"ETag": mark})
            except _Unknown as error:
                return HTMLResponse(_line("Not here", str(error)), 404)
            except _DAMAGE as error:
                return HTMLResponse(_line("This cannot be shown", f"{type(error).__name__}: {error}"), 500)

        return answer

    routes = [
        Route(f"/{token}/", page(lambda _: _overview(shelf)), name="overview"),
        Route(f"/{token}/run/{{name}}", page(lambda request: _one(shelf, request)), name="run"),
        Route(f"/{token}/compare", page(lambda request: _two(shelf, request)), name="compare"),
    ]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
        Middleware(BaseHTTPMiddleware, dispatch=guard),
    ]
    return Starlette(routes=routes, middleware=middleware)


class _Unknown(Exception):
    """There is no such run."""


def _line(title: str, line: str) -> str:
    return render_page("view.html.j2", scripts=_SCRIPTS, title=title, lead=line, **_NOTHING)


_SCRIPTS = ("report.js", "view.js")
_NOTHING: dict[str, Any] = {"damaged": {}, "doing": [], "table": None, "names": [], "home": "../"}


# -- all runs --------------------------------------------------------------------------------------

_COLUMNS = (
    Column.of_text("run"),
    *map(Column.of_text, ("defence", "attack", "knowledge", "status")),
    Column.of_text("data"),
    *map(Column.of_figure, ("accuracy", *LEAKS)),
    Column.of_text("updated"),
)
#: Those that the rows can be filtered by.
_FILTERS = ("defence", "attack", "knowledge", "status")


def _overview(shelf: Shelf) -> str:
    runs = shelf.runs()
    known = {name: run for name, run in runs.items() if isinstance(run, Run)}
    damaged = {name: fault for name, fault in runs.items() if isinstance(fault, str)}
    rows: list[Row] = []
    grouped = settings(list(known.values()))
    names = {run.directory: name for name, run in known.items()}
    for setting in grouped:
        for cell in setting.cells:
            entries = _entries(cell, setting.title)
            name = names[cell.run.directory]
            entries["run"] = Entry(name, link=f"run/{quote(name, safe='')}")
            rows.append(Row(entries, "failed" if cell.result is None and not _under_way(cell.run) else "measured"))
    rows.sort(key=lambda row: row.entries["updated"].text, reverse=True)
    synthetic = " Synthetic faces are for trying the suite." if any(run.synthetic for run in known.values()) else ""
    caption = f"Every attack of every run, the newest first.{synthetic} Runs of other data do not compare."
    table = Table("all", caption, _COLUMNS, tuple(rows)).without_empty_columns() if rows else None
    doing = [_doing(name, run) for name, run in known.items() if _under_way(run)]
    counts = f"{len(known)} runs" + (f", {len(damaged)} damaged" if damaged else "")
    context = {"damaged": damaged, "doing": doing, "table": table, "names": sorted(known), "home": "./"}
    filters = {key: list(dict.fromkeys(row.entries[key].text for row in rows)) for key in _FILTERS}
    title = f"Runs in {shelf.folder.name or shelf.folder.resolve().name}"
    return render_page("view.html.j2", scripts=_SCRIPTS, title=title, lead=counts, filters=filters, **context)


def _entries(cell: Cell, data: str) -> dict[str, Entry]:
    """A row of the table of all runs."""
    run, result = cell.run, cell.result
    utility = run.result.utility
    status = run.manifest.status if _under_way(run) else "error" if result is None else run.result.status
    texts = {
        "defence": cell.defense,
        "attack": cell.attack,
        "knowledge": cell.knowledge,
        "status": status,
        "data": f"{data} (synthetic)" if run.synthetic and "synthetic" not in data else data,
        "updated": run.manifest.updated or run.manifest.started or MISSING,
    }
    entries = {key: Entry(text) for key, text in texts.items()}
    note = cell.verdict if result is not None else "" if _under_way(run) else str(_why(cell))
    entries["status"] = replace(entries["status"], note=note)
    entries["accuracy"] = measured("accuracy", None if utility is None else utility.accuracy)
    for name in LEAKS if result is not None else ():
        entries[name] = measured(name, result.figure(name) if result else None)
    return entries


def _why(cell: Cell) -> str | None:
    return cell.run.result.failed.get(cell.name, cell.run.result.error)


def _under_way(run: Run) -> bool:
    """Whether it has started and not ended: it is running, or it was killed."""
    return run.manifest.status == "started"


def _doing(name: str, run: Run) -> Doing:
    event = last_event(run.directory)
    done, total = (event.get(key) for key in ("done", "total"))
    counted = isinstance(done, int | float) and isinstance(total, int | float) and total > 0
    figures = {
        key: value
        for key, value in event.items()
        if key not in ("time", "event", "task", "done", "total") and isinstance(value, int | float)
    }
    return Doing(
        name=name,
        task=str(event.get("task") or event.get("stage") or event.get("event") or "it has said nothing yet"),
        done=float(done) if counted and isinstance(done, int | float) else None,
        total=float(total) if counted and isinstance(total, int | float) else None,
        figures=", ".join(f"{key} {value:.4g}" for key, value in figures.items()),
        heard=_heard(event.get("time")),
    )


def _heard(said: Any) -> str:
    """When something was said, in this machine's time; that a run is silent where that was long ago."""
    try:
        when = datetime.fromisoformat(str(said)).astimezone()
    except ValueError:
        return "nobody knows when it was heard of last"
    if abs(datetime.now(UTC) - when) < _SILENCE:  # clocks are set back
        return f"last heard of at {when:%H:%M:%S}"
    return f"silent since {when:%Y-%m-%d %H:%M}: killed, or at work on something that says nothing"


# -- one run, and two ------------------------------------------------------------------------------


def _known(shelf: Shelf, name: str | None) -> Run:
    found = shelf.runs().get(name or "")
    if found is None:
        raise _Unknown(f"{shelf.folder} holds no run {name!r}")
    if isinstance(found, str):
        raise MissingError(found)
    return load_run(found.directory)


def _one(shelf: Shelf, request: Request) -> str:
    name = request.path_params["name"]
    run = _known(shelf, name)
    return _report(shelf, [run], request, title=name, doing=[_doing(name, run)] if _under_way(run) else [], home="../")


def _two(shelf: Shelf, request: Request) -> str:
    names = request.query_params.get("a", ""), request.query_params.get("b", "")
    first, second = (_known(shelf, name) for name in names)
    found: dict[str, Any] = {}
    try:
        found["tables"] = difference_tables(compare(first, second), names)
    except BenchError as error:
        found["note"] = str(error)
    runs = [first] if first is second else [first, second]
    return _report(shelf, runs, request, title=f"{names[0]} beside {names[1]}", home="./", **found)


def _report(shelf: Shelf, runs: Sequence[Run], request: Request, **more: Any) -> str:
    """The report of some runs, with faces only where they were asked for."""
    faces = "faces" in request.query_params
    context = {"doing": [], "tables": (), "note": "", "live": [], "names": sorted(shelf.stamps())} | more
    grouped = settings(runs)
    if context["doing"]:
        context["live"] = training_figures(grouped[0], 0)
    context["faces_link"] = "" if faces else str(request.url.include_query_params(faces="yes").query)
    return report_page(
        grouped, images=faces, embed_faces=faces, template="view-report.html.j2", scripts=_SCRIPTS, **context
    )


def difference_tables(difference: Difference, names: tuple[str, str]) -> tuple[Table, ...]:
    """What two runs were asked for that differs, and every figure of both with its change, as tables."""
    asked = tuple(
        Column(key, heading, numeric=False) for key, heading in zip("skab", ("setting", "kind", *names), strict=True)
    )
    differing = [
        Row({"s": Entry(s.name), "k": Entry(s.kind), "a": Entry(s.first or MISSING), "b": Entry(s.second or MISSING)})
        for s in difference.settings
    ]
    figures = [
        Row(
            {
                "figure": Entry(change.figure),
                "a": Entry(number(change.first), change.first),
                "b": Entry(number(change.second), change.second),
                "change": Entry(number(change.change, "+.3g"), change.change, interval(change.ci95)),
                "victims": Entry(change.victims or MISSING),
            }
        )
        for change in difference.figures
    ]
    shape = (
        Column.of_text("figure"),
        *(Column(key, heading) for key, heading in zip("ab", names, strict=True)),
        Column("change", "change", "The second minus the first, with its 95 % interval over people."),
        Column.of_text("victims", "Whether both are of the same people, so that the interval is paired."),
    )
    tables = (
        Table("differing", "Settings and machines that differ.", asked, tuple(differing)),
        Table(
            "changes", "Every figure that both or one of the runs have; rates are shares of 1.", shape, tuple(figures)
        ),
    )
    return tuple(table for table in tables if table.rows)
