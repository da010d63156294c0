"""Recognisers and unfinished trainings on disk: tensors as safetensors, all else as JSON in the same file's header.

One file each, written beside and renamed: a killed process leaves the old file or the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench.errors import BenchError, DataError, MissingError
from bench.recognition.recogniser import Recogniser, RecogniserSpec

#: Marks the header entry, and changes when the layout does.
FORMAT = "bench-recognition-1"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], details: Mapping[str, Any]) -> None:
    """Write tensors and a JSON object to one safetensors file, beside and renamed.

    Raises:
        BenchError: the file cannot be written.
    """
    # A channels_last weight is stored in logical order: loading copies it into whatever layout the module has.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(plain, metadata={"format": FORMAT, "details": json.dumps(details)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as beside:
            try:
                beside.write(content)
                beside.flush()
                os.fsync(beside.fileno())
                Path(beside.name).replace(path)
            except BaseException:
                Path(beside.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise BenchError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --out"
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`save_tensors`, on the CPU.

    Raises:
        MissingError: there is no such file.
        DataError: the file is damaged or not one of ours.
    """
    if not path.is_file():
        raise MissingError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, expected {FORMAT!r}")
        details = json.loads(header["details"])
        if not isinstance(details, dict):
            raise ValueError("its details are no JSON object")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"cannot read checkpoint {path}: {error}; delete it to start again") from error
    return tensors, details


def save_recogniser(recogniser: Recogniser, path: Path, details: Mapping[str, Any] | None = None) -> None:
    """Write a recogniser's weights and what it was built from.

    Args:
        details: a JSON object to keep along (losses, options, ...).

    Raises:
        BenchError: the file cannot be written.
    """
    save_tensors(path, recogniser.state_dict(), {"spec": recogniser.spec.to_json(), "details": dict(details or {})})


def load_recogniser(path: Path, device: torch.device | str = "cpu") -> tuple[Recogniser, dict[str, Any]]:
    """A recogniser in evaluation mode, and the details it was saved with.

    Raises:
        MissingError: there is no such file.
        DataError: the file is damaged, or its weights do not fit what it says it holds.
    """
    tensors, content = load_tensors(path)
    try:
        spec = RecogniserSpec.from_json(content["spec"])
        details = dict(content["details"])
        with torch.device("meta"):
            recogniser = Recogniser(spec)
        recogniser.load_state_dict(tensors, assign=True)
    except (BenchError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} holds no usable recogniser: {error}; delete it to train again") from error
    recogniser = recogniser.to(device).to(memory_format=torch.channels_last)
    return recogniser.eval(), details
