"""Class centres of an unfinished training on disk, in blocks that any number of processes can read back.

A block is one safetensors file of some rows of weight and momentum, named after them. Each process writes the blocks
that start in its part and reads the rows of its part, whoever wrote them; nobody holds more than a block beside its own
centres.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bench.errors import BenchError, DataError
from bench.files import replacing
from bench.recognition.partial_fc import PartialFC

#: Rows of a file: 2^16 centres of 512 values and their momentum are a quarter of a gigabyte.
BLOCK_ROWS = 2**16

_NAME = re.compile(r"rows-(\d+)-(\d+)\.safetensors")


def save_centres(head: PartialFC, folder: Path) -> None:
    """Write this process's centres and momentum; all processes write into the same folder.

    Raises:
        BenchError: a file cannot be written.
    """
    owned = head.owned
    try:
        for first in range(owned.start, owned.stop, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, owned.stop)
            rows = slice(first - owned.start, stop - owned.start)
            block = {
                "weight": head.weight[rows].cpu().contiguous(),
                "momentum": head.momentum[rows].cpu().contiguous(),
            }
            with replacing(folder / f"rows-{first:010d}-{stop:010d}.safetensors") as temporary:
                save_file(block, temporary)
    except (OSError, SafetensorError) as error:
        raise BenchError(
            f"cannot write centres to {folder}: {error}; free some space or choose another --out"
        ) from error


@torch.no_grad()
def load_centres(head: PartialFC, folder: Path) -> None:
    """Read this process's centres and momentum, however many processes wrote them.

    Raises:
        DataError: a file is damaged, or some rows are in none.
    """
    owned, filled = head.owned, 0
    for file in sorted(folder.glob("rows-*.safetensors")):
        match = _NAME.fullmatch(file.name)
        if match is None:
            continue
        first, stop = max(int(match[1]), owned.start), min(int(match[2]), owned.stop)
        if first >= stop:
            continue
        try:
            with safe_open(file, framework="pt") as content:
                for name, target in (("weight", head.weight), ("momentum", head.momentum)):
                    rows = content.get_slice(name)[first - int(match[1]) : stop - int(match[1])]
                    target[first - owned.start : stop - owned.start] = rows.to(target.device)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise DataError(f"cannot read centres {file}: {error}; delete {folder.parent} to start again") from error
        filled += stop - first
    if filled != len(owned):
        raise DataError(
            f"{folder} holds {filled} of the {len(owned)} centres {owned.start} to {owned.stop - 1}: it is incomplete "
            f"or not on a disk that all processes share; delete {folder.parent} to start again"
        )


def drop_centres(folder: Path, *, but: str) -> None:
    """Delete the centres of other epochs beside the folder called ``but``."""
    for old in folder.glob("centres-*"):
        if old.name != but:
            shutil.rmtree(old, ignore_errors=True)
