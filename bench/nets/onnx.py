"""Published face recognisers in ONNX files, run by onnxruntime: what they are fed is read from the graph, or tried."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bench.files import sha256
from bench.images import to_float
from bench.nets.recogniser import Recogniser, RecogniserSpec

#: Input range -> scale and shift of faces in [0, 1]. The first is what the field publishes.
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"(255x-127.5)/128": (255 / 128, -127.5 / 128), "0..255": (255.0, 0.0), "0..1": (1.0, 0.0)}
)
#: Order of the channels. The first is what the field publishes.
COLOURS = ("RGB", "BGR")
#: A graph that leaves its sizes open gets faces of so many pixels, those of the field's template.
_SIDE = 112

#: What a graph may do to its input before it normalises it: neither moves nor scales a value.
_PASSED = frozenset({"Cast", "Gather", "Identity", "Slice", "Transpose"})
_AFFINE = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})
#: A range is the one that a graph normalises if it comes out this wide at least, and no value larger than this.
_WIDTH, _LARGEST = 0.3, 4.0

#: Another input range or order of colours must separate faces better than what the field publishes by this factor.
_MARGIN = 1.02
#: How far embeddings of one face alone and beside another may differ, of the largest value.
_ALIKE = 1e-3


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


def _normalisation(path: Path) -> _Normalisation | None:
    """The normalisation at the entry of a graph, one operation after the other; None where there is none."""
    from onnx import numpy_helper

    model = _model(path)
    if model is None:
        return None
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


class OnnxEncoder(nn.Module):
    """A published face recogniser from an ONNX file: faces to embeddings, nothing to train.

    One float input, (N, 3, H, W) or (N, H, W, 3), and one output (N, D). Faces of another size are resized; free sizes
    mean 112 x 112. What the values of the input are, :data:`RANGES` and :data:`COLOURS`, no file says: it is read off
    a normalisation at the entry of the graph where that is clear, else taken for what the field publishes,
    RGB as (255 x - 127.5) / 128 of faces x in [0, 1], until :meth:`probe` has tried all on faces of known people.
    The network is tried on a face, and on two at once, when it is opened: one that cannot take several gets them one by
    one. The weights stay in the file: what ``state_dict()`` carries is its digest, by which another file is found out,
    and the form of the input.

    Args:
        path: the file; weights that it keeps in others are looked for beside it.
        device: runs on CUDA where this says so and onnxruntime can, else on the processor, with as many threads as
            torch uses.

    Attributes:
        files: the file and those that hold its weights.
        layout: ``NCHW`` or ``NHWC``.
        input_size: (H, W) that the network takes.
        batch_size: faces per run where the file or the graph fixes it, else None.
        normalisation: the operations at the entry of the graph that scale its input, in words; empty if there are none.
        embedding_size: D.
        digest: uint8 (32,) buffer, :func:`file_digest`.
        form: int64 (2,) buffer, the input range and the order of colours as places in their lists.
        providers: the onnxruntime execution providers in use.

    Raises:
        ValueError: there is no such file, it is no ONNX model of that form, or the network fails on a face.
    """

    digest: Tensor
    form: Tensor

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"{path} does not exist: name the ONNX file of a face recogniser")
        self.path, self.files = path, files_of(path)
        self._loaded = torch.frombuffer(bytearray.fromhex(file_digest(path)), dtype=torch.uint8)
        self.register_buffer("digest", self._loaded.clone())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle workers would spin between batches and take the cores from torch, which works in turns with them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what fails is raised as well
        wanted = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        try:
            # By its path, or weights beside it would be looked for in the working directory.
            self._session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            why = re.sub(r"^.*?failed: ?", "", " ".join(str(error).split()))[:120]
            raise ValueError(f"{path} is no ONNX model that onnxruntime can load ({why})") from error
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        # A size that is free has a name, or none.
        shapes = [[size if isinstance(size, int) and size > 0 else None for size in end.shape] for end in ends]
        if (
            [len(shape) for shape in shapes] != [4, 2]
            or not {3, None} & {shapes[0][1], shapes[0][3]}
            or ends[0].type != "tensor(float)"
        ):
            raise ValueError(
                f"{path} must map (N, 3, H, W) or (N, H, W, 3) to embeddings (N, D) in float32, but has inputs and "
                f"outputs {[(end.type, shape) for end, shape in zip(ends, shapes, strict=True)]}"
            )
        self._input = ends[0].name
        self.layout = "NCHW" if shapes[0][1] == 3 or shapes[0][3] != 3 else "NHWC"
        height, width = shapes[0][2:] if self.layout == "NCHW" else shapes[0][1:3]
        self.input_size: tuple[int, int] = (height or _SIDE, width or _SIDE)
        self.batch_size: int | None = shapes[0][0]
        normalisation = _normalisation(path)
        self.normalisation = "" if normalisation is None else normalisation.text
        self._ranges = [
            number
            for number, (scale, shift) in enumerate(RANGES.values())
            if normalisation is None or normalisation.suits(shift, scale + shift)
        ] or list(range(len(RANGES)))
        self.register_buffer("form", torch.tensor([self._ranges[0], 0]))
        self.embedding_size = self._try()

    @property
    def sha256(self) -> str:
        """:func:`file_digest` of the file."""
        return bytes(self._loaded.tolist()).hex()

    @property
    def input_range(self) -> str:
        """What the network is fed, one of :data:`RANGES`."""
        return list(RANGES)[int(self.form[0])]

    @property
    def colours(self) -> str:
        """The order of its channels, one of :data:`COLOURS`."""
        return COLOURS[int(self.form[1])]

    def _try(self) -> int:
        """Embed a face, and two; those of a network that fails on two, or mixes them up, are run one by one.

        Returns:
            The size of the embeddings.
        """
        side = torch.linspace(0, 1, self.input_size[0])[:, None], torch.linspace(1, 0.2, self.input_size[1])
        picture = (side[0] * side[1]).expand(1, 3, -1, -1)
        faces = torch.cat((picture, 1 - picture.flip(2)))
        alone = torch.cat([self(face[None]) for face in faces])
        if self.batch_size is None:
            try:
                together = self(faces)
            except ValueError:
                together = None
            if together is None or (together - alone).abs().max() > _ALIKE * alone.abs().max():
                self.batch_size = 1
        return alone.shape[1]

    @torch.no_grad()
    def forward(self, faces: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces (N, 3, H, W) in [0, 1], on their device.

        Raises:
            ValueError: the digest that was loaded is that of another file, the network fails, or the embeddings are not
                finite.
        """
        if not torch.equal(self.digest.cpu(), self._loaded):
            raise ValueError(f"{self.path} is not the file that was fitted with: fit again")
        scale, shift = RANGES[self.input_range]
        pixels = scale * resized(faces.float(), self.input_size) + shift
        pixels = pixels.flip(1) if self.colours == "BGR" else pixels
        pixels = (pixels if self.layout == "NCHW" else pixels.movedim(1, 3)).cpu()
        size = self.batch_size or max(1, len(pixels))
        parts = []
        for chunk in pixels.split(size):
            missing = 0 if self.batch_size is None else size - len(chunk)
            parts.append(self._run(torch.cat((chunk, chunk[-1:].expand(missing, -1, -1, -1))))[: len(chunk)])
        embedded = torch.cat(parts).to(faces.device, torch.float32)
        if not torch.isfinite(embedded).all():
            raise ValueError(f"{self.path} returned embeddings that are not finite")
        return embedded

    def _run(self, pixels: Tensor) -> Tensor:
        what = f"{self.path} fails on {len(pixels)} face(s) as {tuple(pixels.shape)} ({self.layout})"
        try:
            (embeddings,) = self._session.run(None, {self._input: pixels.contiguous().numpy()})
        except Exception as error:  # nor have onnxruntime's exceptions here
            node = re.search(r"running (\w+) node", str(error))
            raise ValueError(
                f"{what}{f', in its {node[1]} node' if node else ''}: it is no face recogniser, or a broken export"
            ) from error
        if embeddings.ndim != 2 or len(embeddings) != len(pixels):
            raise ValueError(f"{what}: it returns {embeddings.shape}, expected ({len(pixels)}, D)")
        return torch.from_numpy(embeddings)

    def probe(self, faces: Tensor, pairs: Tensor, same: Tensor) -> None:
        """Find the input range and the order of colours under which faces of different people are farthest apart.

        The measure is :func:`separation`. All ranges that a normalisation in the graph does not rule out are tried,
        then the other order of colours, and where that is better the ranges again. What the field publishes stays
        unless another is clearly better.

        Args:
            faces: uint8 or float in [0, 1], (N, 3, H, W).
            pairs: int64 (2, P), which of them a pair shows.
            same: bool (P,), whether that is one person; both kinds must be there.
        """
        faces = to_float(faces) if faces.dtype == torch.uint8 else faces

        def found(form: tuple[int, int]) -> float:
            self.form.copy_(torch.tensor(form))
            try:
                embeddings = functional.normalize(torch.cat([self(batch) for batch in faces.split(64)]), dim=1)
            except ValueError:  # far out of its range a network may overflow
                return -math.inf
            return separation((embeddings[pairs[0]] * embeddings[pairs[1]]).sum(1), same)

        values: dict[tuple[int, int], float] = {}

        def best(forms: Iterable[tuple[int, int]]) -> tuple[int, int]:
            values.update([(form, found(form)) for form in forms if form not in values])
            most = max(values.values())
            return min(form for form, value in values.items() if value == most or _MARGIN * value >= most)

        span, _ = best((number, 0) for number in self._ranges)
        span, colours = best([(span, 1)])
        # Under the wrong order of colours the ranges may have been hard to tell apart.
        self.form.copy_(torch.tensor(best((number, colours) for number in self._ranges)))


class OnnxRecogniser(Recogniser):
    """A recogniser of plain faces that was brought along: an :class:`OnnxEncoder`, which has no gradients.

    It takes faces of ``image_size`` pixels a side.
    """

    def __init__(self, encoder: OnnxEncoder, image_size: int) -> None:
        nn.Module.__init__(self)
        self.spec = RecogniserSpec(
            backbone=f"onnx:{encoder.path.stem}",
            representation_shape=(3, image_size, image_size),
            embedding_size=encoder.embedding_size,
        )
        self.encoder = encoder

    def forward(self, representation: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces (N, 3, H, W) in [0, 1]."""
        embedding: Tensor = self.encoder(representation)
        return embedding

    def maps(self, representation: Tensor) -> Tensor:
        """The embeddings, (N, D, 1, 1): a file tells of nothing else."""
        maps: Tensor = self(representation)[..., None, None]
        return maps

    def __deepcopy__(self, memo: object) -> OnnxRecogniser:
        """Itself: nothing can change it, and its session cannot be copied."""
        return self


def separation(scores: Tensor, same: Tensor) -> float:
    """How far genuine scores lie above those of impostors, in their mean standard deviation (d', Daugman 2000).

    Args:
        scores: float (P,).
        same: bool (P,).

    Example:
        >>> import torch
        >>> separation(torch.tensor([3.0, 5.0, -1.0, 1.0]), torch.tensor([True, True, False, False]))
        4.0
    """
    genuine, impostor = scores[same].double(), scores[~same].double()
    spread = ((genuine.var(correction=0) + impostor.var(correction=0)) / 2).sqrt().clamp_min(1e-9)
    return float((genuine.mean() - impostor.mean()) / spread)


def resized(faces: Tensor, size: tuple[int, int]) -> Tensor:
    """Float faces (N, 3, H, W) in [0, 1] at another size: bilinear, with anti-aliasing; clipped to [0, 1]."""
    if tuple(faces.shape[-2:]) == size:
        return faces
    return functional.interpolate(faces, size, mode="bilinear", antialias=True).clamp(0, 1)
