"""Runs that are killed, at random moments and in the middle of writing, or find no room, and end as if they had not.

From the command line, for more kills than a test has time for: ``python tests/support/killing.py --kills 20``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from tiny_runs import TINY, TINY_UNET, pipeline

from bench.errors import BenchError

#: What hangs on how fast or how often something was done.
TIMINGS = ("seconds", "cached", "throughput", "peak_memory")
CELL = {
    **TINY, "image_size": 24, "probes": 8, "bootstrap": 100,
    "dataset_options": {"identities": 32, "images_per_identity": 4},
    "defense": "partialface", "attack": "unet", "attack_options": {**TINY_UNET, "images": "64"},
}  # fmt: skip


def run(out: Path, **settings: Any) -> None:
    """The whole run, in this process; timing the provider, whose figures are none of ours, takes no time."""
    from tiny_runs import registered

    with registered():
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


def writes(then: Callable[[int], None]) -> None:
    """From now on call ``then(n)`` before and after each time that something is put in its place, n times so far."""
    count = 0

    def watched(put: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        def counted(path: Path, target: Any) -> Path:
            nonlocal count
            then(count)
            count += 1
            put(path, target)
            then(count)
            count += 1
            return Path(target)

        return counted

    Path.replace, Path.rename = watched(Path.replace), watched(Path.rename)  # type: ignore[method-assign]


def kill_at(write: int) -> Callable[[], None]:
    """Be killed before or after that write."""

    def before() -> None:
        writes(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == write else None)

    return before


def undisturbed(out: Path) -> tuple[float, int]:
    """Run, and say how many seconds and writes that took."""
    note = out.with_suffix(".writes")
    began = time.monotonic()
    code = end(start(out, lambda: writes(lambda n: note.write_bytes(bytes([n % 256, n // 256])))))
    assert code == 0, code
    low, high = note.read_bytes()
    return time.monotonic() - began, low + 256 * high


def outcome(out: Path) -> dict[str, Any]:
    """What a run found: its result without timings, and its tables as text that keeps every bit."""
    (directory,) = (file.parent for file in out.glob("*/manifest.json"))
    result = json.loads((directory / "metrics.json").read_text())
    tables = {file.name: pd.read_parquet(file).map(repr).to_csv() for file in sorted(directory.glob("*.parquet"))}
    return {name: value for name, value in result.items() if name not in TIMINGS} | tables


def left_over(out: Path) -> list[str]:
    """Files and folders that nobody will look for again."""
    return [str(path) for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


def disturbed(out: Path, kills: int, rng: random.Random, seconds: float, count: int) -> list[str]:
    """Kill a run so many times, by turns at a random moment and at a random write, and let it end; what was hit."""
    hit = []
    for number in range(kills):
        if number % 2:
            write = rng.randrange(count // 3)  # later tries have less to write
            code = end(start(out, kill_at(write)))
            hit.append(f"write {write} of {count}: {code}")
        else:
            child, wait = start(out), rng.uniform(0, seconds)
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            hit.append(f"{wait:.2f} of {seconds:.2f} s: {end(child)}")
    code = end(start(out))
    assert code == 0, (code, hit)
    return hit


def interrupted(out: Path, name: str, seconds: float, expected: dict[str, Any]) -> list[Any]:
    """Send a signal on the way: exit code, status written down, exit code of the next try, and whether all is well."""
    child = start(out)
    while not list(out.glob("*/events.jsonl")):
        time.sleep(0.01)
    time.sleep(seconds / 3)
    os.kill(child, signal.Signals[name])
    code = end(child)
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


def made(out: Path) -> list[str]:
    """The stages that the runs of a folder computed, as the logs of those that came last have them."""
    logs = (file.read_text().splitlines() for file in sorted(out.glob("*/events.jsonl")))
    events = (json.loads(line) for lines in logs for line in lines)
    return [f"{event['stage']}-{event['key']}" for event in events if event["event"] == "stage"]


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
        seconds, count = undisturbed(root / "whole")
        expected = outcome(root / "whole")
        for number in range(-(-asked.kills // asked.each)):
            out = root / f"killed-{number}"
            hit = disturbed(out, asked.each, rng, seconds, count)
            told["killed"].append({"hit": hit, "same": outcome(out) == expected, "left": left_over(out)})
        for signalled in ("SIGTERM",) if asked.json else ("SIGINT", "SIGTERM"):
            told["interrupted"][signalled] = interrupted(root / signalled, signalled, seconds, expected)
        out = root / "full"
        codes = filled(out, 3_000, 100_000, 4_000_000)  # not the log, not the faces, not a recogniser
        told["full"] = {"codes": codes, "same": outcome(out) == expected, "left": left_over(out)}
        out = root / "twice"
        codes = together(start(out), start(out))
        told["twice"] = {"codes": codes, "made": made(out), "same": outcome(out) == expected}
        out = root / "beside"
        other = {"attack": "linear", "attack_options": {}}
        told["beside"] = {"codes": together(start(out), start(out, **other)), "made": made(out)}
    print(json.dumps(told, indent=None if asked.json else 2))


if __name__ == "__main__":
    main()
