"""Checkpoints of a fit: tensors as safetensors, the rest as JSON, written beside and renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FILE = "fit.safetensors"


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``meta`` (JSON values) to one file in ``folder``, replacing the last one.

    The JSON travels in the header of the safetensors file, so that both are renamed into place as one
    and a killed run leaves either the old checkpoint or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{_FILE}.partial"
    # Scalars and views are cloned: safetensors stores each tensor contiguous and unshared.
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(stored, beside, metadata={"fit": json.dumps(meta)})
    beside.replace(folder / _FILE)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`save` wrote to ``folder`` (tensors on the CPU), or None where there is nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {})["fit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}): delete it to start the fit again") from error
    return tensors, meta


def flatten_optimizer(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``optimizer.state_dict()``, named ``<parameter>/<entry>``."""
    return {
        f"{parameter}/{entry}": torch.as_tensor(value)
        for parameter, entries in state["state"].items()
        for entry, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`flatten_optimizer`: put the tensors back (learning rates are left as they are)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, entry = name.split("/")
        like = parameters[int(number)]
        if tensor.shape == like.shape:
            # The strides of the parameter too (channels last): other strides take another kernel, which
            # rounds differently, and a resumed fit would no longer equal an unbroken one.
            tensor = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        entries.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
