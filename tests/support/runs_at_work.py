"""Several commands one after another in each process of a launch, so that what all import is imported once.

``runs_at_work.py COMMANDS`` takes a list of lists of arguments of ``bench``, in JSON. Each process leaves their exit
codes in ``codes-RANK.json`` and ends with the last.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path


def speed_in_passing() -> None:
    """Let runs of this process time each operation by a call, instead of for seconds."""
    from bench.run import speed

    speed.measure = functools.partial(speed.measure, warmup=0, max_time=0.0, least=1)


def run_all(commands: list[list[str]]) -> list[int]:
    """The exit code of each command."""
    from bench import cli

    codes = []
    for arguments in commands:
        sys.argv = ["bench", *arguments]
        try:
            cli.main()
        except SystemExit as end:
            codes.append(int(end.code or 0))
    return codes


if __name__ == "__main__":
    speed_in_passing()
    codes = run_all(json.loads(sys.argv[1]))
    Path(f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))
    raise SystemExit(codes[-1])
