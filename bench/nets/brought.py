"""Recognisers that somebody brings along: files of any kind, and plug-ins, as face encoders.

A file's kind is told by its bytes. Exported programs (``torch.export``, TorchScript) are programs: what they are known
to be misused for is refused before they are read, which is no reason to take one from a stranger.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import inspect
import logging
import os
import pickletools
import re
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from bench import plugins
from bench.errors import first_line
from bench.files import parse_json
from bench.nets.checkpoints import read_checkpoint
from bench.nets.encoder import SIDE, FaceEncoder, Told
from bench.nets.onnx import OnnxEncoder, file_digest
from bench.nets.options import AS_READ, InputForm

#: What a face recogniser's input may be where its file does not tell: the field's sizes, the usual one first.
_SIZES = ((SIDE, SIDE), (160, 160), (128, 128), (224, 224), (112, 96), (96, 96), (64, 64))
#: Where the operations of an exported graph come from; any other name of torch's could be one that runs programs.
_OPERATIONS = re.compile(r"torch\.ops\.|torch\.sym_\w+$|torch\._sym_\w+$|_operator\.|math\.")
#: Bytes that the packed members of an archive may become: torch packs code, never weights.
_UNPACKED = 2**28
#: Operations of TorchScript that touch files.
_FILES = frozenset({"aten::save", "aten::from_file", "aten::load"})


class TorchEncoder(FaceEncoder):
    """A face recogniser that torch runs, frozen: with gradients, for attacks to which its weights are known.

    Args:
        path: the file, or the name of a plug-in.
        network: maps its input to embeddings (N, D).
        told: what is known of the input; what is not is tried.
        device: where to compute.
        kind: what kind of file it comes from.
        given: what its input is, by who brings it.
        digest: SHA-256 of what the file holds, in hexadecimal.

    Raises:
        ValueError: the network fails on a face, whatever the input.
        UsageError: ``given`` contradicts what is told.
    """

    def __init__(
        self,
        path: Path,
        network: nn.Module,
        told: Told,
        device: torch.device,
        kind: str,
        given: InputForm,
        digest: str,
        *,
        architecture: str = "",
        values: int | None = None,
    ) -> None:
        super().__init__(path, (path,) if path.is_file() else (), digest)
        self.format = kind  # type: ignore[misc]
        self.architecture, self.training = architecture, False
        self.values = sum(value.numel() for value in network.parameters()) if values is None else values
        for parameter in network.parameters():  # TorchScript has no requires_grad_ of its own
            parameter.requires_grad_(False)
        self.network = network
        self.to(device)
        failure: ValueError | None = None
        for candidate in _candidates(told, given):
            try:
                self.take(candidate, given)
                return
            except ValueError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def train(self, mode: bool = True) -> TorchEncoder:
        """Nothing: it is as it was brought. (Exported programs have no such modes at all.)"""
        return self

    def run(self, pixels: Tensor) -> Tensor:
        """By torch, where the weights are."""
        embeddings: Tensor = self.network(pixels.to(self.form.device))
        return embeddings

    def maps(self, faces: Tensor) -> Tensor:
        """The network's last feature map, where it has ``maps``."""
        last: Callable[[Tensor], Tensor] | None = getattr(self.network, "maps", None)
        return super().maps(faces) if last is None else last(self.fed(faces).to(self.form.device))


def _candidates(told: Told, given: InputForm) -> Iterator[Told]:
    """What the input may be, the likeliest first: with what is told."""
    size = given.size if told.size == (None, None) else told.size
    layouts = [layout] if (layout := told.layout or given.layout) else ["NCHW", "NHWC"]
    for layout in layouts:
        for tried in _SIZES if size is None else (size,):
            yield Told(
                layout=layout,
                channels=told.channels,
                size=tried,
                batch=told.batch,
                range=told.range,
                colours=told.colours,
                usual=told.usual,
            )


def open_recogniser(
    source: Path, device: torch.device | str = "cpu", given: InputForm = AS_READ, *, pictures: bool = False
) -> FaceEncoder:
    """The recogniser in a file, or of the plug-in of that name, tried on a face.

    Args:
        source: an ONNX file, one of ``torch.export`` or TorchScript, a checkpoint (safetensors, or of ``torch.save``),
            or a name in the entry points ``bench.recognisers``.
        device: where to compute.
        given: what its input is, where the file does not say so.
        pictures: refuse a network of other than three channels.

    Raises:
        ValueError: it is none of these, damaged or hostile, or it fails on a face.
        UsageError: ``given`` contradicts it, or a plug-in cannot be imported.
    """
    encoder = _opened(source, torch.device(device), given, pictures)
    if pictures and encoder.channels != 3:
        raise ValueError(f"{source} takes {encoder.channels} channels: name a recogniser of plain faces, of three")
    return encoder


def digest_of(source: Path) -> str:
    """SHA-256 of all that decides what a recogniser computes: of its files, or of a plug-in's weights.

    Raises:
        ValueError: a file of weights that it names is not there.
    """
    return _plugin_digest(_plugin(source)) if is_plugin(source) else file_digest(source)


def is_plugin(source: Path) -> bool:
    """Whether a plug-in is meant, and no file."""
    return not source.is_file() and str(source) in plugins.recognisers()


def plugin_module(source: Path) -> str | None:
    """The module that a plug-in's network is written in; None of a file."""
    return type(_plugin(source)).__module__ if is_plugin(source) else None


def _opened(source: Path, device: torch.device, given: InputForm, pictures: bool) -> FaceEncoder:
    if is_plugin(source):
        network = copy.deepcopy(_plugin(source))  # each encoder moves and freezes its own
        told = _told_by(source, network)
        name = type(network).__name__
        return TorchEncoder(source, network, told, device, "plug-in", given, _plugin_digest(network), architecture=name)
    with source.open("rb") as file:
        head = file.read(9)
    if source.suffix == ".onnx":
        return OnnxEncoder(source, device, given, pictures=pictures)
    digest = file_digest(source)
    if (names := _members(source)) is not None:
        if any(re.search(r"(^|/)(archive_format|serialized_exported_program\.json)$", name) for name in names):
            network, told = _exported(source, device)
            return TorchEncoder(source, network, told, device, "torch.export", given, digest)
        if any("/code/" in name for name in names):
            network, told = _scripted(source, device)
            return TorchEncoder(source, network, told, device, "torchscript", given, digest)
    elif head[:2] == b"PK":
        raise ValueError(f"{source} is cut short: copy it again")
    elif head[:1] != b"\x80" and head[8:] != b"{":
        raise ValueError(
            f"{source} is no recogniser: expected an ONNX file (.onnx), one of torch.export or TorchScript, or a "
            "checkpoint (safetensors, or a state_dict by torch.save)"
        )
    found = read_checkpoint(source, given.size)
    kind = "safetensors" if head[8:] == b"{" and head[:1] != b"\x80" else "state_dict"
    return TorchEncoder(
        source,
        found.network,
        found.told,
        device,
        kind,
        given,
        digest,
        architecture=found.architecture,
        values=found.values,
    )


def _members(path: Path) -> list[str] | None:
    """The names within a ZIP archive; None where it is none.

    Raises:
        ValueError: it is damaged, or would fill the memory.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    packed = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
    if packed > _UNPACKED:
        raise ValueError(f"{path} unpacks to {packed // 2**20} MiB, where torch packs code alone: it is not loaded")
    return [member.filename for member in members]


def _read_members(path: Path, suffix: str, parse: Callable[[bytes], Any]) -> Iterator[Any]:
    """What the members of an archive with that end to their names hold.

    Raises:
        ValueError: one cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(suffix):
                try:
                    document = parse(archive.read(name))
                except (ValueError, RuntimeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{path} is damaged: its {name} cannot be read") from error
                yield document


# -- plug-ins --------------------------------------------------------------------------------------


def _plugin(source: Path) -> nn.Module:
    return plugins.recognisers().get(str(source))


def _told_by(source: Path, network: nn.Module) -> Told:
    shape = getattr(network, "representation_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(size, int) and size > 0 for size in shape)):
        raise ValueError(f"recogniser {source} must say its representation_shape, (C, h, w), but says {shape!r}")
    channels, high, wide = shape
    try:
        form = InputForm(range=getattr(network, "input_range", None), colours=getattr(network, "colours", None))
    except ValueError as error:
        raise ValueError(f"recogniser {source}: {' '.join(str(error).split())[:160]}") from error
    return Told(layout="NCHW", channels=channels, size=(high, wide), range=form.range, colours=form.colours)


def _plugin_digest(network: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# -- torch.export ----------------------------------------------------------------------------------


def _exported(path: Path, device: torch.device) -> tuple[nn.Module, Told]:
    _check_exported(path)
    with _weights_only():
        try:
            program = torch.export.load(path)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            # Guards are checked by code that is made of strings in the file.
            guarded = "check_guards" in inspect.signature(program.module).parameters
            network = program.module(check_guards=False) if guarded else program.module()
        except Exception as error:  # as many kinds as there are ways to damage a file
            raise ValueError(
                f"{path} is no exported program that torch can load ({first_line(error)[:120]})"
            ) from error
    (user,) = list(program.graph_signature.user_inputs)[:1] or [None]
    value = next((node.meta["val"] for node in program.graph.nodes if node.name == user), None)
    if not isinstance(value, Tensor) or value.ndim != 4:
        raise ValueError(f"{path} must map one tensor (N, C, H, W) or (N, H, W, C) to embeddings (N, D)")
    batch, *axes = (int(size) if isinstance(size, int) else None for size in value.shape)
    return network, _told_of_axes(axes, batch)


def _told_of_axes(axes: Sequence[int | None], batch: int | None = None) -> Told:
    """By where three channels are, the first axis where that is not clear."""
    if axes[0] != 3 == axes[2]:
        return Told(layout="NHWC", channels=3, size=(axes[0], axes[1]), batch=batch)
    return Told(layout="NCHW", channels=axes[0], size=(axes[1], axes[2]), batch=batch)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Unpickle weights alone, also where torch asks for more: when that fails ``torch.export.load`` would."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    logger = logging.getLogger("torch.export")  # it tells what goes wrong twice, the first time on many lines
    silent, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = silent
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_exported(path: Path) -> None:
    """Refuse what an exported program is known to be misused for.

    Raises:
        ValueError: compiled code, operations that are none of a graph's, or sizes that are no arithmetic.
    """
    if any("/aotinductor/" in name for name in _members(path) or ()):
        raise ValueError(f"{path} holds compiled code, which is not run: save it by torch.export.save")
    for document in _read_members(path, ".json", parse_json):
        _check_document(path, document)


def _check_document(path: Path, document: Any) -> None:
    rest = [document]
    while rest:
        node = rest.pop()
        if isinstance(node, list):
            rest += reversed(node)
        elif isinstance(node, dict):
            operation, expression = node.get("target"), node.get("expr_str")
            if "inputs" in node and isinstance(operation, str) and not _OPERATIONS.match(operation):
                raise ValueError(f"{path} calls {operation[:60]}, which is no operation of a network: it is not loaded")
            if isinstance(expression, str) and not _is_arithmetic(expression):
                raise ValueError(f"{path} has a size that is no arithmetic ({expression[:60]}): it is not loaded")
            rest += reversed(node.values())


#: What a size may be written with. Calls are those of sympy's classes, whose names are capital.
_ARITHMETIC: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Compare, ast.cmpop),
)


def _is_arithmetic(text: str) -> bool:
    """Whether a size, which torch evaluates, is nothing but that. Text in it may only name a symbol."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    symbols = set()
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not node.func.id[0].isupper():
                return False
            if node.func.id == "Symbol":
                symbols |= {id(argument) for argument in node.args[:1]}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)]
    return all(id(node) in symbols and str(node.value).isidentifier() for node in texts)


# -- TorchScript -----------------------------------------------------------------------------------


def _scripted(path: Path, device: torch.device) -> tuple[nn.Module, Told]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is old
        # Where a pickle ends too early torch goes on with what the memory held before.
        for _ in _read_members(path, "pkl", lambda data: deque(pickletools.genops(data), maxlen=0)):
            pass
        try:
            network = torch.jit.load(path, map_location=device)
            operations = set(torch.jit.export_opnames(network))
        except Exception as error:  # as many kinds as there are ways to damage a file
            raise ValueError(f"{path} is no TorchScript that torch can load ({first_line(error)[:120]})") from error
    if touched := sorted(_FILES & {name.partition(".")[0] for name in operations}):
        raise ValueError(f"{path} reads or writes files ({', '.join(touched)}), which no recogniser has to")
    first = next((value for value in network.state_dict().values() if value.ndim == 4), None)
    return network.eval(), Told(channels=None if first is None else int(first.shape[1]))
