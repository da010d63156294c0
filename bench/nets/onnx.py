"""Published face recognisers in ONNX files, run by onnxruntime: what they are fed is read from the graph."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.files import sha256
from bench.nets.encoder import PICTURE, FaceEncoder, Told
from bench.nets.options import AS_READ, RANGES, InputForm

#: What a graph may do to its input before it normalises it: neither moves nor scales a value.
_PASSED = frozenset({"Cast", "Gather", "Identity", "Slice", "Transpose"})
_AFFINE = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})
#: Types of values that a network has learnt (TensorProto.DataType of ONNX): float, float16, double, bfloat16, and
#: uint8 and int8, in which some are stored.
_LEARNT = (1, 10, 11, 16, 2, 3)
#: A range is the one that a graph normalises if it comes out this wide at least, and no value larger than this.
_WIDTH, _LARGEST = 0.3, 4.0

#: Bytes that a file system allows in the name of a file.
_LONGEST_NAME = 255


def file_digest(path: Path) -> str:
    """SHA-256 of all bytes that a file stands for, in hexadecimal.

    An ONNX file may keep its weights in other files (``external_data``, as recent exporters write ``model.onnx`` and
    ``model.onnx.data``): then it is the SHA-256 of a list of all of them with their digests. Of any other file it is
    that of the file.

    Raises:
        ValueError: a file of weights that it names is not there.
    """
    first, *others = files_of(path)
    if not others:
        return sha256(first)
    lines = (f"{file.relative_to(path.parent)}\0{sha256(file)}\n" for file in (first, *others))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, and those beside it where its weights lie if it is an ONNX model that keeps them elsewhere.

    Raises:
        ValueError: one that it names is not there.
    """
    graph = None if path.suffix != ".onnx" else _model(path)
    if graph is None:
        return (path,)
    places = {
        entry.value
        for tensor in _tensors(graph.graph)
        if tensor.data_location == tensor.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for place in places:
        # A file from elsewhere may name any other on this machine; what is no text comes as bytes.
        if (
            not isinstance(place, str)
            or "\0" in place
            or len(place) > _LONGEST_NAME
            or PurePath(place).is_absolute()
            or ".." in PurePath(place).parts
        ):
            raise ValueError(f"{path} keeps weights in {place[:100]!r}: only files beside it are read")
    files = [path.parent / place for place in sorted(places)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path} keeps weights in {file.name}, which is not beside it: put both in one folder")
    return (path, *files)


def _model(path: Path) -> Any | None:
    """The model without weights from other files; None where the file is none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError:
        return None


def _tensors(graph: Any) -> Iterator[Any]:
    """All constants of a graph and of the graphs within it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.initializer:
                yield from _tensors(inner)


@dataclass(frozen=True, slots=True)
class _Normalisation:
    """What a graph does to its input first: in words, and as y = ``scale`` x + ``shift``, by channel or as one."""

    text: str
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    def suits(self, low: float, high: float) -> bool:
        """Whether inputs from ``low`` to ``high`` come out as a network's first layer is fed."""
        ends = np.stack([self.scale * low + self.shift, self.scale * high + self.shift])
        return bool(np.ptp(ends, axis=0).min() >= _WIDTH and np.abs(ends).max() <= _LARGEST)


def _normalisation(model: Any, path: Path) -> _Normalisation | None:
    """The normalisation at the entry of a graph, one operation after the other; None where there is none."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")
    }

    def array(name: str) -> NDArray[np.float64]:
        return np.asarray(numpy_helper.to_array(constants[name], str(path.parent)), dtype=np.float64).reshape(-1)

    at = next(entry.name for entry in graph.input if entry.name not in constants)
    scale, shift, told = np.ones(1), np.zeros(1), list[str]()
    while True:
        takers = [node for node in graph.node if at in node.input]
        if len(takers) != 1:
            break
        (node,) = takers
        at = node.output[0]
        if node.op_type in _PASSED and node.input[0] not in constants:
            continue
        others = [name for name in node.input if name in constants]
        if node.op_type not in _AFFINE or len(others) != len(node.input) - 1:
            break
        values = [array(name) for name in others]
        if any(value.size not in (1, 3) for value in values):
            break
        if node.op_type == "BatchNormalization":
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            gain, offset, mean, variance = values
            factor = gain / np.sqrt(variance + epsilon)
            scale, shift, words = scale * factor, (shift - mean) * factor + offset, "BatchNormalization"
        else:
            (value,) = values
            turned = node.input[0] in constants  # value - x, value / x
            if turned and node.op_type == "Div":
                break
            words = f"{node.op_type} {', '.join(dict.fromkeys(f'{v:.6g}' for v in value))}"
            if node.op_type in ("Add", "Sub"):
                sign = -1.0 if node.op_type == "Sub" else 1.0
                scale, shift = (-scale, value - shift) if turned and sign < 0 else (scale, shift + sign * value)
            else:
                factor = value if node.op_type == "Mul" else 1 / value
                scale, shift = scale * factor, shift * factor
        told.append(words)
    return _Normalisation(", ".join(told), scale, shift) if told else None


#: Entries of an ONNX file's metadata (docs/MetadataProps.md of ONNX) that say what a picture's values are.
_SAID = {
    "Image.NominalPixelRange": {"nominalrange_0_255": "0..255", "normalized_0_1": "0..1", "normalized_1_1": "-1..1"},
    "Image.BitmapPixelFormat": {"rgb8": "RGB", "bgr8": "BGR"},
}


def _told(model: Any, path: Path, shape: list[int | None], given: str | None) -> Told:
    """What a graph whose input has this shape, and its metadata, say of the input.

    Axes are told apart by their denotations (docs/DimensionDenotation.md of ONNX), else by where three channels are,
    else by the layout that is ``given``.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    entry = next(entry for entry in model.graph.input if entry.name not in constants)
    denoted = [axis.denotation for axis in entry.type.tensor_type.shape.dim]
    if "DATA_CHANNEL" in denoted:
        last = denoted[3] == "DATA_CHANNEL"
    elif (shape[1] == PICTURE) == (shape[3] == PICTURE):
        last = given == "NHWC"
    else:
        last = shape[3] == PICTURE
    high, wide = shape[1:3] if last else shape[2:]
    said = {entry.key: entry.value.lower() for entry in model.metadata_props}
    span, colours = (values.get(said.get(key, "")) for key, values in _SAID.items())
    normalisation = _normalisation(model, path)
    suiting = tuple(
        name
        for name, (scale, shift) in RANGES.items()
        if normalisation is None or normalisation.suits(shift, scale + shift)
    )
    return Told(
        layout="NHWC" if last else "NCHW",
        channels=shape[3] if last else shape[1],
        size=(high, wide),
        batch=shape[0],
        range=span,
        colours=colours,
        suiting=suiting or tuple(RANGES),
        normalisation="" if normalisation is None else normalisation.text,
    )


class OnnxEncoder(FaceEncoder):
    """A face recogniser in an ONNX file: one float input, (N, C, H, W) or (N, H, W, C), and one output (N, D).

    It has no gradients. What it is fed is read off its metadata, or off a normalisation at the entry of the graph where
    that is clear.

    Args:
        path: the file; weights that it keeps in others are looked for beside it.
        device: runs on CUDA where this says so and onnxruntime can, else on the processor, with as many threads as
            torch uses.
        given: what its input is, by who brings it.
        pictures: refuse a network of other than three channels.

    Attributes:
        providers: the onnxruntime execution providers in use.

    Raises:
        ValueError: there is no such file, it is no ONNX model of that form, or the network fails on a face.
        UsageError: ``given`` contradicts the file.
    """

    format = "onnx"

    def __init__(self, path: Path, device: torch.device, given: InputForm = AS_READ, *, pictures: bool = True) -> None:
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"{path} does not exist: name the ONNX file of a face recogniser")
        super().__init__(path, files_of(path), file_digest(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle workers would spin between batches and take the cores from torch, which works in turns with them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what fails is raised as well
        wanted = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        try:
            # By its path, or weights beside it would be looked for in the working directory. Without a second try of
            # the same, which onnxruntime would announce on stdout.
            again = int(len(wanted) > 1)
            with contextlib.redirect_stdout(sys.stderr):
                self._session = onnxruntime.InferenceSession(
                    str(path), options, providers=wanted, enable_fallback=again
                )
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            why = re.sub(r"^.*?failed: ?", "", " ".join(str(error).split()))[:120]
            raise ValueError(f"{path} is no ONNX model that onnxruntime can load ({why})") from error
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        # A size that is free has a name, or none.
        shapes = [[size if isinstance(size, int) and size > 0 else None for size in end.shape] for end in ends]
        if (
            [len(shape) for shape in shapes] != [4, 2]
            or (pictures and not {PICTURE, None} & {shapes[0][1], shapes[0][3]})
            or ends[0].type != "tensor(float)"
        ):
            raise ValueError(
                f"{path} must map (N, 3, H, W) or (N, H, W, 3) to embeddings (N, D) in float32, but has inputs and "
                f"outputs {[(end.type, shape) for end, shape in zip(ends, shapes, strict=True)]}"
            )
        self._input = ends[0].name
        model = _model(path)
        assert model is not None  # onnxruntime has read it
        self.values = sum(math.prod(tensor.dims) for tensor in _tensors(model.graph) if tensor.data_type in _LEARNT)
        self.take(_told(model, path, shapes[0], given.layout), given)

    @torch.no_grad()
    def forward(self, faces: Tensor) -> Tensor:
        """As :meth:`FaceEncoder.forward`, without gradients."""
        return super().forward(faces)

    def run(self, pixels: Tensor) -> Tensor:
        """By onnxruntime, on the processor's copy of the pixels."""
        (embeddings,) = self._session.run(None, {self._input: pixels.cpu().contiguous().numpy()})
        return torch.from_numpy(embeddings)

    def explained(self, error: Exception) -> str:
        """The node that failed, of the many lines that onnxruntime writes."""
        node = re.search(r"running (\w+) node", str(error))
        return f"{f', in its {node[1]} node' if node else ''}: it is no face recogniser, or a broken export"

    def __deepcopy__(self, memo: object) -> OnnxEncoder:
        """Itself: nothing can change it, and its session cannot be copied."""
        return self
