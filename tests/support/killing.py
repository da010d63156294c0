"""Runs that are killed, at work and in the middle of writing, or find no room, and end as if they had not.

From the command line, for more kills than a test has time for: ``python tests/support/killing.py --kills 20``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from runs_at_work import speed_in_passing
from tiny_runs import TINY, TINY_UNET, pipeline

from bench.errors import BenchError

#: What hangs on how fast or how often something was done.
TIMINGS = ("seconds", "cached", "throughput", "peak_memory")
CELL = {
    **TINY, "image_size": 24, "probes": 8, "bootstrap": 100,
    "dataset_options": {"identities": 32, "images_per_identity": 4}, "training": {**TINY["training"], "epochs": 2},
    "defense": "partialface", "attack": "unet", "attack_options": {**TINY_UNET, "images": "64"},
}  # fmt: skip


def run(out: Path, **settings: Any) -> None:
    """The whole run, in this process; timing the provider, whose figures are none of ours, takes no time."""
    speed_in_passing()
    pipeline(out, **{**CELL, **settings}).run()


def start(out: Path, before: Callable[[], None] = lambda: None, **settings: Any) -> int:
    """The run in a child of this process, as ``bench`` ends: its exit code; the child's number."""
    if child := os.fork():
        return child
    code = 1
    try:
        before()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run(out, **settings)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except (BenchError, OSError):  # told in one line
        code = 3
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """The child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Write:
    """Something that a run puts in its place: its path, how often before in this process, and processor time so far."""

    path: str
    before: int
    seconds: float


def writes(out: Path, then: Callable[[Write, Path, bool], None]) -> None:
    """From now on call ``then(write, file, done)`` before and after each time that something is put in its place."""
    began, counted = time.process_time(), Counter[str]()

    def watched(put: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        def told(path: Path, target: Any) -> Path:
            name = str(Path(target).relative_to(out))
            write = Write(name, counted[name], time.process_time() - began)
            counted[name] += 1
            then(write, path, False)
            put(path, target)
            then(write, Path(target), True)
            return Path(target)

        return told

    Path.replace, Path.rename = watched(Path.replace), watched(Path.rename)  # type: ignore[method-assign]


def undisturbed(out: Path) -> list[Write]:
    """Run, and say what was written."""
    note = out.with_suffix(".writes")

    def before() -> None:
        file = note.open("w")
        writes(out, lambda write, _, done: None if done else print(json.dumps(astuple(write)), file=file, flush=True))

    code = end(start(out, before))
    assert code == 0, code
    return [Write(*json.loads(line)) for line in note.read_text().splitlines()]


#: Where a kill hits: before a file is put in its place, while half of it is there, after that, or between two writes.
WAYS = ("half", "between", "before", "after")


def at(out: Path, write: Write, way: str, wait: float, sent: int = signal.SIGKILL) -> Callable[[], None]:
    """Be hit by a signal at that write, in one of :data:`WAYS`; ``wait``: seconds of the processor's work after it."""

    def then(now: Write, file: Path, done: bool) -> None:
        if (now.path, now.before) != (write.path, write.before) or done is not (way in ("after", "between")):
            return
        if way == "between":
            # Of the clock's signal, which nobody handles, a process dies as of SIGKILL, wherever it is.
            if sent != signal.SIGKILL:
                signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), sent))
            signal.setitimer(signal.ITIMER_PROF, wait)
            return
        if way == "half" and file.is_file():
            os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), sent)

    return lambda: writes(out, then)


def outcome(out: Path) -> dict[str, Any]:
    """What the run of :data:`CELL` found: its result without timings, and its tables as text that keeps every bit."""
    (directory,) = (file.parent for file in out.glob(f"{CELL['defense']}-{CELL['attack']}-*/manifest.json"))
    result = json.loads((directory / "metrics.json").read_text())
    tables = {file.name: pd.read_parquet(file).map(repr).to_csv() for file in sorted(directory.glob("*.parquet"))}
    return {name: value for name, value in result.items() if name not in TIMINGS} | tables


def left_over(out: Path) -> list[str]:
    """Files and folders that nobody will look for again."""
    return [str(path) for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


def disturbed(out: Path, written: list[Write], kills: int, turn: int, rng: random.Random) -> list[dict[str, Any]]:
    """Kill a run so many times, ever later on its way to the end, then let it end; what each kill hit, and how.

    ``written`` is what an undisturbed run writes. Of as many parts of that way as there are kills, one is hit in each:
    what lies before it is not done again, and what lies behind is still to come. Ways take turns.
    """
    hit = []
    for number in range(kills):
        way = WAYS[(turn + number) % len(WAYS)]
        first, last = (len(written) * index // kills for index in (number, number + 1))
        pairs = itertools.pairwise(written[first : last + 1])
        steps = [(write, after.seconds - write.seconds) for write, after in pairs]
        # A checkpoint is written again and again, and how often still, hangs on where the try began.
        steps = [(write, gap) for write, gap in steps if not (write.before and write.path.startswith("cache"))]
        if way == "half":  # checkpoints and results before the small change of stages
            steps = [step for step in steps if "/resume/" in step[0].path or step[0].path[:5] != "cache"] or steps
        if way == "between":
            steps = sorted(steps, key=lambda step: step[1])[-3:]  # a kill needs time to hit
        write, gap = rng.choice(steps)
        wait = rng.uniform(0.1, 0.6) * gap
        code = end(start(out, at(out, write, way, wait)))
        hit.append({"way": way, "at": write.path, "code": code, "wait": round(wait, 3) if way == "between" else 0.0})
    code = end(start(out))
    assert code == 0, (code, hit)
    return hit


def interrupted(out: Path, name: str, write: Write, expected: dict[str, Any]) -> list[Any]:
    """Send a signal on the way: exit code, status written down, exit code of the next try, and whether all is well."""
    code = end(start(out, at(out, write, "between", 0.01, signal.Signals[name])))
    (result,) = (json.loads(file.read_text()) for file in out.glob("*/metrics.json"))
    again = end(start(out))
    return [code, result["status"], again, outcome(out) == expected and not left_over(out)]


def room_for(size: int) -> Callable[[], None]:
    """Have files end at so many bytes, as on a disk that is full."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of the end
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def filled(out: Path, *sizes: int) -> list[int]:
    """Exit codes of a run on disks that have room for files of so many bytes, the last of all with enough."""
    return [*(end(start(out, room_for(size))) for size in sizes), end(start(out))]


def together(*children: int) -> list[int]:
    """Their exit codes."""
    return [end(child) for child in children]


def outlived(out: Path, write: Write) -> list[int]:
    """Exit codes of a run that is killed on its way, and of one beside it that has waited and goes on."""
    first = start(out, at(out, write, "between", 0.01))
    while not list(out.glob("*/events.jsonl")):
        time.sleep(0.01)
    return together(first, start(out))


def made(out: Path) -> list[str]:
    """The stages that the runs of a folder computed, as the logs of those that came last have them."""
    logs = (file.read_text().splitlines() for file in sorted(out.glob("*/events.jsonl")))
    events = (json.loads(line) for lines in logs for line in lines)
    return [f"{event['stage']}-{event['key']}" for event in events if event["event"] == "stage"]


def _longest(written: list[Write]) -> Write:
    """The write in the second half of a run after which the processor is at work longest."""
    late = itertools.pairwise(written[len(written) // 2 :])
    return max(late, key=lambda pair: pair[1].seconds - pair[0].seconds)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--each", type=int, default=4, help="kills of one run before it may end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    told: dict[str, Any] = {"killed": [], "interrupted": {}}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pipeline(root / "whole", **CELL).plan()  # reads the code that keys are made of, which every child would
        for module in ("lightning_fabric", "torch._dynamo", "scipy.sparse.csgraph", "pyarrow.parquet"):
            importlib.import_module(module)  # likewise
        written = undisturbed(root / "whole")
        expected, middle = outcome(root / "whole"), _longest(written)
        for number in range(-(-asked.kills // asked.each)):
            out = root / f"killed-{number}"
            hit = disturbed(out, written, min(asked.each, asked.kills - number * asked.each), number, rng)
            told["killed"].append({"hit": hit, "same": outcome(out) == expected, "left": left_over(out)})
        for signalled in ("SIGTERM",) if asked.json else ("SIGINT", "SIGTERM"):
            told["interrupted"][signalled] = interrupted(root / signalled, signalled, middle, expected)
        out = root / "full"
        codes = filled(out, 3_000, 100_000, 4_000_000)  # not the log, not the faces, not a recogniser
        told["full"] = {"codes": codes, "same": outcome(out) == expected, "left": left_over(out)}
        out = root / "twice"
        codes = together(start(out), start(out))
        told["twice"] = {"codes": codes, "made": made(out), "same": outcome(out) == expected, "left": left_over(out)}
        out = root / "outlived"
        codes = outlived(out, middle)
        told["outlived"] = {"codes": codes, "same": outcome(out) == expected, "left": left_over(out)}
        out = root / "beside"
        other = {"attack": "linear", "attack_options": {}}
        codes = together(start(out), start(out, **other))
        told["beside"] = {"codes": codes, "made": made(out), "same": outcome(out) == expected, "left": left_over(out)}
    print(json.dumps(told, indent=None if asked.json else 2))


if __name__ == "__main__":
    main()
