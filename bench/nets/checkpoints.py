"""Recognisers in checkpoints: those of this suite, and ``state_dict`` files of the field's common training code.

Nothing of a checkpoint is executed: tensors, numbers and text are read, and all else is refused.

The layouts are those of insightface's ``arcface_torch`` (``backbones/iresnet.py``) and of TFace (``torchkit``:
``model_irse.py``, ``model_mobilefacenet.py``), on which PartialFace's and MinusFace's code builds: it replaces the
first convolution by one of as many channels as are sent. Their networks are the backbones of this suite under other
names, but for two things. TFace's shortcut of a unit that strides and keeps its channels picks every second place
(a maximum over one place), which is a 1x1 convolution by the identity; and the batch norms of its embeddings have
neither weight nor bias, which are then 1 and 0.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bench.errors import BenchError, DataError, MissingError, first_line
from bench.files import parse_json
from bench.nets.backbones import BACKBONES, IRESNETS
from bench.nets.encoder import Told
from bench.nets.recogniser import Recogniser, RecogniserSpec

#: Marks the header entry of this suite's files, and changes when the layout does.
FORMAT = "bench-recognition-1"

_CONVOLVED = MappingProxyType({"conv": "0", "bn": "1", "prelu": "2"})
_UNIT = MappingProxyType({"bn1": "0", "conv1": "1", "bn2": "2", "prelu": "3", "conv2": "4", "bn3": "5"})
#: MobileFaceNet's layers -> the number of the first of their bottlenecks, or convolutions, among ours.
_MOBILE = MappingProxyType(
    {"conv1": 0, "conv2_dw": 1, "conv_23": 2, "conv_3": 3, "conv_34": 7, "conv_4": 8, "conv_45": 14, "conv_5": 15}
    | {"conv_6_sep": 17}
)
_BOTTLENECK = MappingProxyType({"conv": "0", "conv_dw": "1", "project": "2"})

#: How a network's layers are called in a checkpoint, and here. ``{N}`` counts units from 0 over all stages.
NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "arcface_torch": {
            r"conv1": "stem.0",
            r"bn1": "stem.1",
            r"prelu": "stem.2",
            r"layer(?P<stage>[1-4])\.(?P<unit>\d+)\.(?P<of_unit>bn[1-3]|conv[12]|prelu)": "stages.{N}.residual.{}",
            r"layer(?P<stage>[1-4])\.(?P<unit>\d+)\.downsample\.(?P<layer>[01])": "stages.{N}.shortcut.{}",
            r"bn2": "output.norm",
            r"fc": "output.linear",
            r"features": "output.embedding_norm",
        },
        "TFace IR": {
            r"input_layer\.(?P<layer>[0-2])": "stem.{}",
            r"body\.(?P<unit>\d+)\.res_layer\.(?P<layer>[0-5])": "stages.{N}.residual.{}",
            r"body\.(?P<unit>\d+)\.shortcut_layer\.(?P<layer>[01])": "stages.{N}.shortcut.{}",
            r"output_layer\.0": "output.norm",
            r"output_layer\.3": "output.linear",
            r"output_layer\.4": "output.embedding_norm",
        },
        "TFace MobileFaceNet": {
            r"(?P<mobile>conv1|conv2_dw|conv_6_sep)\.(?P<convolved>conv|bn|prelu)": "features.{N}.{}",
            r"(?P<mobile>conv_\d+)(\.model\.(?P<unit>\d+))?\.(?P<bottleneck>conv|conv_dw|project)"
            r"\.(?P<convolved>conv|bn|prelu)": "features.{N}.residual.{}.{}",
            r"output_layer\.conv_6_dw\.(?P<convolved>conv|bn)": "global_depthwise.{}",
            r"output_layer\.linear": "linear",
            r"output_layer\.bn": "embedding_norm",
        },
    }
)
#: A layer that a checkpoint of each kind has, whatever stands before the names of all its layers.
_MARKS = MappingProxyType(
    {"arcface_torch": "layer1.0.prelu", "TFace IR": "input_layer.0", "TFace MobileFaceNet": "conv_6_sep.conv"}
)
#: Where training code puts the network's weights in what it saves; else they are all of it.
_HOLDERS = ("state_dict_backbone", "backbone", "state_dict", "model_state_dict", "model", "net")
#: MinusFace's recogniser is fed the picture as it is decoded, in [0, 1]; the others 2 x - 1.
_MINUSFACE = re.compile(r"(^|\.)recognizer\.$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A recogniser's network, and what its checkpoint says of it.

    Attributes:
        network: representations in NCHW to embeddings.
        told: what it says of the input.
        architecture: the backbone's name, and by whose names its layers were called.
        values: how many were learnt.
    """

    network: nn.Module
    told: Told
    architecture: str
    values: int


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON object in a file of this suite, on the CPU.

    Raises:
        MissingError: there is no such file.
        DataError: the file is damaged or not one of ours.
    """
    if not path.is_file():
        raise MissingError(f"no checkpoint at {path}")
    try:
        tensors, header = _read_safetensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, expected {FORMAT!r}")
        details = parse_json(header["details"])
        if not isinstance(details, dict):
            raise ValueError("its details are no JSON object")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"cannot read checkpoint {path}: {error}; delete it to start again") from error
    return tensors, details


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def load_recogniser(path: Path, device: torch.device | str = "cpu") -> tuple[Recogniser, dict[str, Any]]:
    """A recogniser of this suite in evaluation mode, and the details it was saved with.

    Raises:
        MissingError: there is no such file.
        DataError: the file is damaged, or its weights do not fit what it says it holds.
    """
    tensors, content = load_tensors(path)
    try:
        spec = RecogniserSpec.model_validate(content["spec"])
        details = dict(content["details"])
        with torch.device("meta"):
            recogniser = Recogniser(spec)
        recogniser.load_state_dict(tensors, assign=True)
    except (BenchError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} holds no usable recogniser: {error}; delete it to train again") from error
    recogniser = recogniser.to(device).to(memory_format=torch.channels_last)
    return recogniser.eval(), details


def read_checkpoint(path: Path, size: tuple[int, int] | None = None) -> Checkpoint:
    """The recogniser in a checkpoint: safetensors, of this suite or others, or what ``torch.save`` wrote.

    Args:
        path: the file.
        size: (H, W) of the network's input, where its last feature map is not square.

    Raises:
        ValueError: the file is damaged, holds what only code could make, or no recogniser of a known kind.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{" and head[:1] != b"\x80":  # the length of a header in JSON, and its start
            tensors, header = _read_safetensors(path)
            if header.get("format") == FORMAT:
                return _ours(path)
            return _foreign(path, tensors, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another program wrote it
            document = torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, BenchError):
        raise
    except pickle.UnpicklingError as error:
        if (asked := re.search(r"GLOBAL ([\w.]+)", str(error))) is not None:
            raise ValueError(
                f"{path} asks for {asked[1]}, and weights are all that is read of a pickle: save the network's "
                "state_dict(), or the network by torch.export.save"
            ) from error
        raise ValueError(f"{path} is damaged, or no checkpoint of weights") from error
    except Exception as error:  # torch.load raises as many kinds as there are ways to damage a file
        raise ValueError(f"{path} is damaged, or no checkpoint ({first_line(error)[:120]})") from error
    return _foreign(path, document, size)


def _ours(path: Path) -> Checkpoint:
    try:
        recogniser, _ = load_recogniser(path)
    except DataError as error:
        raise ValueError(str(error)) from error
    channels, high, wide = recogniser.spec.representation_shape
    told = Told(layout="NCHW", channels=channels, size=(high, wide), range="0..1", colours="RGB")
    return Checkpoint(recogniser, told, f"{recogniser.spec.backbone} (of this suite)", recogniser.parameter_count)


def _foreign(path: Path, document: Any, size: tuple[int, int] | None) -> Checkpoint:
    weights = _weights(document)
    found = [
        (kind, name.removesuffix(f"{mark}.weight"))
        for kind, mark in _MARKS.items()
        for name in weights
        if name == f"{mark}.weight" or name.endswith(f".{mark}.weight")
    ]
    if len(found) != 1:
        kinds = ", ".join(_MARKS)
        some = ", ".join(sorted(weights)[:3]) or "no tensors"
        what = "several networks" if found else f"no network of a known kind ({kinds}); it has {some}"
        raise ValueError(f"{path} holds {what}: save one network's state_dict(), or export it by torch.export.save")
    kind, prefix = found[0]
    theirs = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    try:
        network, architecture, inputs = _built(kind, theirs, size)
    except ValueError as error:
        raise ValueError(f"{path} is no {kind} network as they are known: {error}") from None
    stem = next(iter(network.parameters()))
    told = Told(
        layout="NCHW",
        channels=stem.shape[1],
        size=inputs,
        usual="0..1" if _MINUSFACE.search(prefix) else "-1..1",
    )
    known = dict(network.named_parameters())
    values = sum(value.numel() for name, value in renamed(kind, theirs).items() if name in known)
    return Checkpoint(network, told, f"{architecture} ({kind})", values)


def _weights(document: Any) -> dict[str, Tensor]:
    """The tensors by name, without what parallel training puts before the names."""
    for holder in _HOLDERS:
        inner = document.get(holder) if isinstance(document, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            document = inner
            break
    entries = document.items() if isinstance(document, Mapping) else ()
    return {str(name): value for name, value in entries if isinstance(value, Tensor)}


def renamed(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights by the names that they have here.

    Raises:
        ValueError: one of a layer that such a network does not have.
    """
    stages = [-1] * 5
    for name in weights:
        if (unit := re.match(r"layer([1-4])\.(\d+)\.", name)) is not None:
            stages[int(unit[1])] = max(stages[int(unit[1])], int(unit[2]))
    before = [0, *accumulate(last + 1 for last in stages[1:])]

    def ours(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        for theirs, here in NAMES[kind].items():
            if (match := re.fullmatch(theirs, layer)) is None:
                continue
            part = {key: value for key, value in match.groupdict().items() if value is not None}
            number = int(part.get("unit", 0))
            number += before[int(part["stage"]) - 1] if "stage" in part else _MOBILE.get(part.get("mobile", ""), 0)
            tables = {"of_unit": _UNIT, "bottleneck": _BOTTLENECK, "convolved": _CONVOLVED}
            filled = [tables[key][value] for key, value in part.items() if key in tables]
            filled += [part["layer"]] if "layer" in part else []
            return f"{here.replace('{N}', str(number)).format(*filled)}.{leaf}"
        raise ValueError(f"{name} belongs to no layer of it")

    return {ours(name): value for name, value in weights.items()}


def _built(
    kind: str, theirs: Mapping[str, Tensor], size: tuple[int, int] | None
) -> tuple[nn.Module, str, tuple[int, int]]:
    """The backbone with these weights, its name, and the size of its input."""
    weights = renamed(kind, theirs)
    if kind == "TFace MobileFaceNet":
        name, stem, last, embedding = "mobilefacenet", "features.0.0", "global_depthwise.0", "linear"
    else:
        stem, last, embedding = "stem.0", "output.linear", "output.linear"
        units = [value for key, value in weights.items() if re.fullmatch(r"stages\.\d+\.residual\.4\.weight", key)]
        widths = [unit.shape[0] for unit in units]
        depths = tuple(widths.count(64 * 2**stage) for stage in range(4))
        names = [known for known, layers in IRESNETS.items() if layers == depths and len(widths) == sum(depths)]
        if not names:
            known = ", ".join(f"{known} {layers}" for known, layers in IRESNETS.items())
            raise ValueError(f"its stages of 64, 128, 256 and 512 channels have {depths} units ({known} are)")
        (name,) = names
    for layer, dimensions in ((stem, 4), (last, 4 if last != embedding else 2), (embedding, 2)):
        if (weight := weights.get(f"{layer}.weight")) is None or weight.ndim != dimensions:
            raise ValueError(f"its {layer} (as it is called here) is missing or of another kind")
    side = weights[f"{last}.weight"].shape
    places = (int(side[2]), int(side[3])) if last != embedding else _square(int(side[1]) // 512, size)
    inputs = size or (16 * places[0], 16 * places[1])
    with torch.device("meta"):
        network = BACKBONES.get(name)(
            in_channels=weights[f"{stem}.weight"].shape[1],
            input_size=inputs,
            embedding_size=weights[f"{embedding}.weight"].shape[0],
        )
    expected = network.state_dict()
    for key, value in expected.items():
        if key not in weights:
            weights[key] = _filled(key, value)
        elif weights[key].shape != value.shape:
            raise ValueError(f"{key} (as it is called here) is {tuple(weights[key].shape)}, not {tuple(value.shape)}")
    if unknown := weights.keys() - expected.keys():
        raise ValueError(f"{min(unknown)} (as it is called here) belongs to no layer of it")
    floats = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    network.load_state_dict(floats, assign=True)
    return network.eval(), name, inputs


def _square(places: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the last feature map, of which the last layer knows the number of places alone."""
    if size is not None:
        return (size[0] + 15) // 16, (size[1] + 15) // 16
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"its last feature map has {places} places and is not square: give the size of its input")
    return math.isqrt(places), math.isqrt(places)


def _filled(key: str, like: Tensor) -> Tensor:
    """What a layer is that a checkpoint rightly leaves out: it computes nothing, and has no values there."""
    layer, _, leaf = key.rpartition(".")
    if leaf == "num_batches_tracked":
        return torch.zeros(like.shape, dtype=like.dtype)
    if layer.endswith("embedding_norm") and leaf in ("weight", "bias"):
        return torch.full(like.shape, float(leaf == "weight"))
    if re.fullmatch(r"stages\.\d+\.shortcut\.0", layer) and like.shape[0] == like.shape[1]:
        return torch.eye(like.shape[0])[..., None, None]
    if re.fullmatch(r"stages\.\d+\.shortcut\.1", layer):
        # Divided by the root of a variance of 1 and epsilon, 1e-5, which the weight takes back.
        values = {"weight": math.sqrt(1 + 1e-5), "running_var": 1.0}
        return torch.full(like.shape, values.get(leaf, 0.0))
    raise ValueError(f"it lacks {key} (as it is called here)")
