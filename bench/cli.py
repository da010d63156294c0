"""The command line: the commands of :mod:`bench.commands`, and how every failure ends.

Commands import torch and what needs it when they are called: ``--help`` is instant.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from bench import __version__
from bench.commands.baseline import baseline
from bench.commands.compare import compare
from bench.commands.console import Command, err, print_json
from bench.commands.data import data
from bench.commands.doctor import doctor
from bench.commands.explain import explain
from bench.commands.export import export
from bench.commands.gate import gate
from bench.commands.leaderboard import leaderboard
from bench.commands.list import list_
from bench.commands.new import new
from bench.commands.observe import observe
from bench.commands.protect import protect
from bench.commands.recogniser import recogniser
from bench.commands.report import report
from bench.commands.rm import rm
from bench.commands.run import run
from bench.commands.runs import runs
from bench.commands.score import score
from bench.commands.show import show
from bench.commands.speed import speed
from bench.commands.sweep import sweep
from bench.commands.table import table
from bench.commands.view import view
from bench.errors import BenchError, UsageError, in_words, memory_is_full, one_line

app = typer.Typer(
    name="bench",
    help="Privacy attack-and-defence benchmark for face recognition.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    *(run, sweep, list_, runs, show, view, rm, protect, report, leaderboard, table, compare, baseline, gate, export),
    *(explain, observe, score, new, speed, doctor),
)
for command in COMMANDS:
    app.command(command.__name__.rstrip("_"), cls=Command)(command)
app.add_typer(data)
app.add_typer(recogniser)

INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        typer.echo(f"bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


#: The command-line library's usage error; newer versions of typer carry click inside, older ones depend on it.
_CommandLineError: type[Any] = typer.BadParameter.__bases__[0]


def _fail(message: str, code: int) -> NoReturn:
    """One line on stderr, with ``--json`` also the one document on stdout, and the exit code.

    Of several processes the first one speaks; another one only of what went wrong in itself.
    """
    line = one_line(message)
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    speaker = "bench" if rank == "0" else f"bench (process {rank})"
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends the others when one has failed: no more to say
    if rank == "0" or code not in (UsageError.exit_code, INTERRUPTED):
        err.print(f"{speaker}: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if rank == "0" and "--json" in sys.argv:
        print_json({"status": "error", "error": line, "exit_code": code})
    raise SystemExit(code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``bench`` and ``ppfr-bench``: every failure is one clear line and its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    # In the end Python looks for garbage among all that torch and its like have made: half a second, and of a run one.
    atexit.register(gc.freeze)
    try:
        code = app(standalone_mode=False)
    except _CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            raise SystemExit(UsageError.exit_code) from None
        _fail(error.format_message(), UsageError.exit_code)
    except BenchError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader went away (bench list ... | head): nothing left to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        _fail(in_words(error), BenchError.exit_code)
    except SystemExit as error:  # of a plug-in or library: nothing of the suite ends the process within a command
        _fail(in_words(error), BenchError.exit_code)
    except Exception as error:
        if os.environ.get("BENCH_DEBUG"):
            raise
        told = in_words(error)
        if not memory_is_full(error):
            told = f"internal error: {told} (BENCH_DEBUG=1 shows the traceback; please report it)"
        _fail(told, BenchError.exit_code)
    if code == INTERRUPTED:  # the command-line library turns some interrupts into this code itself
        _fail("interrupted; the same command goes on where it stopped", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
