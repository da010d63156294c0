"""InsightFace verification packs (``lfw.bin`` and its kin): a pickle from strangers, read without trusting it.

A pack is the pickle of ``(images, same)``: 2 P encoded images, pair i being images 2 i and 2 i + 1, and P flags.
Unpickling can run any code, so nothing is left to chance here:

1. Before anything is executed, every instruction of the pickle is read. Only those that build lists, tuples, strings,
   numbers and flags are allowed, and the callables named must be those of :data:`_PERMITTED`.
2. Even these are not the real ones: what a numpy array or old-style bytes need is rebuilt by stand-ins that accept
   one-dimensional ``uint8`` arrays and bytes, and nothing else.

Packs written by Python 2 are read (its strings are the bytes of the images); protocol 0, which nobody uses for
images, is not.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import readable, shown
from bench.errors import DataError

#: Larger packs are refused; the largest in use are below 200 MB.
MAX_PACK_BYTES = 2 * 2**30

_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}


class _Hostile(Exception):
    """What the pickle asks for is not what a pack is made of."""


class _Array:
    """Stands in for ``numpy.ndarray`` while its pieces arrive."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (int(), tuple() as shape, _UnsignedByte(), _, (bytes() | bytearray()) as raw):
                self.values = _uint8(raw, shape)
            case _:
                raise _Hostile("an array that is not of type uint8")


class _UnsignedByte:
    """Stands in for ``numpy.dtype('uint8')``; its state says nothing that matters."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or any(isinstance(value, list | tuple) for value in state):
            raise _Hostile("a structured array type")


class _StandIn:
    """A callable that the pickle may call and can neither change nor look into."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise _Hostile("a call that no array needs")
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Hostile("a change to a permitted name")


def _uint8(raw: bytes | bytearray, shape: Any) -> NDArray[np.uint8]:
    # (n,) from np.frombuffer, (n, 1) and (1, n) from OpenCV's imencode.
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _Hostile("an array without a proper shape")
    if sum(n != 1 for n in shape) > 1 or len(shape) > 2 or int(np.prod(shape)) != len(raw):
        raise _Hostile(f"an array of shape {shape}, expected the bytes of one encoded image")
    return np.frombuffer(bytes(raw), dtype=np.uint8)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Hostile("an array of a class of its own")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _UnsignedByte):
        raise _Hostile("an array that is not of type uint8")
    array = _Array()
    array.values = _uint8(raw, shape)
    return array


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _UnsignedByte:
    if code not in ("u1", b"u1", "|u1", b"|u1"):
        raise _Hostile(f"an array of type {code!r}, expected uint8")
    return _UnsignedByte()


def _latin1(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes under protocols 1 and 2.
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise _Hostile("an encoding other than latin1")
    return text.encode("latin-1")


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:  # bytes(10**12) would be a bomb
        raise _Hostile("bytes made from something else")
    return b""


_NDARRAY = _StandIn()

#: The only names a pack may refer to, and what they are taken for.
_PERMITTED: dict[tuple[str, str], _StandIn] = {
    ("_codecs", "encode"): _StandIn(_latin1),
    ("__builtin__", "bytes"): _StandIn(_no_bytes),
    ("builtins", "bytes"): _StandIn(_no_bytes),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_dtype),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _StandIn(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _StandIn(_frombuffer) for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _permitted(module, name)


def _permitted(module: str, name: str) -> _StandIn:
    if (module, name) not in _PERMITTED:
        raise _Hostile(f"a reference to {shown(module)}.{shown(name)}")
    return _PERMITTED[module, name]


def _inspect(data: bytes) -> None:
    """Read every instruction without executing any."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES:
            raise _Hostile(f"the pickle instruction {opcode.name}")
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            _permitted(module, name)
        # The memo is an array: one instruction with an index of a billion would allocate gigabytes.
        if opcode.name.endswith("PUT") and not 0 <= int(str(argument)) <= count:
            raise _Hostile(f"a memo index of {argument}")


@dataclass(frozen=True, slots=True)
class VerificationPack:
    """2 P images, still encoded, pair i being images 2 i and 2 i + 1, and bool (P,) whether they are of one person."""

    images: tuple[bytes, ...]
    same: NDArray[np.bool_]


def read_pack(path: Path, *, max_bytes: int = MAX_PACK_BYTES) -> VerificationPack:
    """Read a verification pack (a ``.bin`` file) of at most ``max_bytes``.

    Raises:
        MissingError: it is not there.
        DataError: it is no pack, is damaged, too large, or holds anything but images and flags.
    """
    with readable(path):
        if (size := path.stat().st_size) > max_bytes:
            raise DataError(f"{shown(path)} has {size} bytes, a verification pack may have {max_bytes}")
        data = path.read_bytes()
    try:
        _inspect(data)
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Hostile as error:
        raise DataError(f"{shown(path)} is refused: it holds {error}, which no verification pack needs") from error
    except Exception as error:  # a damaged pickle surfaces as nearly any exception type
        raise DataError(f"{shown(path)} is no verification pack or is damaged: {shown(error)}") from error
    return _checked(path, content)


def _checked(path: Path, content: Any) -> VerificationPack:
    def wrong(what: str) -> DataError:
        return DataError(f"{shown(path)} is no verification pack: {what}")

    if not isinstance(content, tuple | list) or len(content) != 2:
        raise wrong("expected a pair (images, same)")
    images, same = content
    if isinstance(same, _Array) and same.values is not None:
        same = same.values.tolist()
    if not isinstance(images, list | tuple) or not isinstance(same, list | tuple):
        raise wrong("expected a list of images and a list of flags")
    if not all(isinstance(flag, bool) or (type(flag) is int and flag in (0, 1)) for flag in same):
        raise wrong("a flag is neither true nor false")
    if not same:
        raise wrong("it holds no pair")
    if len(images) != 2 * len(same):
        raise wrong(f"{len(same)} pairs need {2 * len(same)} images, it holds {len(images)}")
    encoded = []
    for number, image in enumerate(images):
        if isinstance(image, _Array) and image.values is not None:
            image = image.values.tobytes()
        if not isinstance(image, bytes):
            raise wrong(f"image {number} is not the bytes of an encoded image")
        encoded.append(image)
    return VerificationPack(tuple(encoded), np.asarray(same, dtype=np.bool_))


def write_pack(path: Path, pack: VerificationPack) -> None:
    """Write a pack as InsightFace reads it (pickle protocol 4).

    Raises:
        ValueError: the images are not twice the flags.
    """
    if len(pack.images) != 2 * len(pack.same):
        raise ValueError(f"{len(pack.same)} pairs need {2 * len(pack.same)} images, got {len(pack.images)}")
    with path.open("wb") as file:
        pickle.dump((list(pack.images), [bool(flag) for flag in pack.same]), file, protocol=4)
