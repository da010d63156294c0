"""InsightFace verification packs (``lfw.bin`` and its kin): a pickle from strangers, read without trusting it.

A pack is the pickle of ``(images, same)``: 2 P encoded images, pair i being images 2 i and 2 i + 1, and P flags.
Unpickling can run any code, so nothing is left to chance here:

1. Before anything is executed, every instruction of the pickle is read. Only those that build lists, tuples, strings,
   numbers and flags are allowed, and the callables named must be those of :data:`_PERMITTED`.
2. Even these are not the real ones: what numpy arrays, numpy scalars or old-style bytes need is rebuilt by stand-ins
   that accept one-dimensional arrays of plain numbers and bytes, and nothing else.

Images are bytes or arrays of ``uint8``. Flags are a list, a tuple, an array or bytes of what equals 0 or 1: Python's or
numpy's booleans, whole or floating-point numbers.

Packs written by Python 2 are read (its strings are the bytes of the images); protocol 0, which nobody uses for
images, is not.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import readable, shown, stranger
from bench.errors import DataError

#: Larger packs are refused; the largest in use are below 200 MB.
MAX_PACK_BYTES = 2 * 2**30

_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}


class _Hostile(Exception):
    """What the pickle asks for is not what a pack is made of."""


#: What arrays and scalars may be made of: truth values, and whole and floating-point numbers.
_NUMBERS = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248])")


class _Array:
    """Stands in for ``numpy.ndarray`` while its pieces arrive."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (int(), tuple() as shape, _Dtype() as dtype, _, (bytes() | bytearray()) as raw):
                self.values = _line(raw, dtype, shape)
            case _:
                raise _Hostile("an array that is not of plain numbers")


class _Dtype:
    """Stands in for a ``numpy.dtype`` of plain numbers, whose state matters for its byte order only."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or any(isinstance(value, list | tuple) for value in state):
            raise _Hostile("a structured array type")
        if len(state) > 1 and state[1] in (">", b">"):
            self.code = ">" + self.code.lstrip("|<>=")


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


def _line(raw: bytes | bytearray, dtype: _Dtype, shape: Any) -> NDArray[Any]:
    # (n,) from np.frombuffer, (n, 1) and (1, n) from OpenCV's imencode.
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _Hostile("an array without a proper shape")
    plain = np.dtype(dtype.code)
    if sum(n != 1 for n in shape) > 1 or len(shape) > 2 or math.prod(shape) * plain.itemsize != len(raw):
        raise _Hostile(f"an array of shape {shape}, expected the bytes of one encoded image, or flags")
    return np.frombuffer(bytes(raw), dtype=plain)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Hostile("an array of a class of its own")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise _Hostile("an array that is not of plain numbers")
    array = _Array()
    array.values = _line(raw, dtype, shape)
    return array


def _scalar(dtype: Any, raw: Any) -> bool | int | float:
    if not isinstance(raw, bytes) or not isinstance(dtype, _Dtype):
        raise _Hostile("a numpy scalar that is no plain number")
    value: bool | int | float = _line(raw, dtype, (1,)).tolist()[0]
    return value


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _Dtype:
    name = code.decode("latin-1") if isinstance(code, bytes) else code
    if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
        raise _Hostile(f"an array of type {code!r}, expected uint8, or flags")
    return _Dtype(name)


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
    **{(f"numpy.{core}.multiarray", "scalar"): _StandIn(_scalar) for core in ("core", "_core")},
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
        what = stranger(data) or f"{shown(error)[:120]} (copy or download it again)"
        raise DataError(f"{shown(path)} is no verification pack or is damaged: {what}") from error
    return _checked(path, content)


def _checked(path: Path, content: Any) -> VerificationPack:
    def wrong(what: str) -> DataError:
        return DataError(f"{shown(path)} is no verification pack: {what}")

    if not isinstance(content, tuple | list) or len(content) != 2:
        raise wrong("expected a pair (images, same)")
    images, same = content
    if isinstance(same, _Array) and same.values is not None:
        same = same.values.tolist()
    if not isinstance(images, list | tuple) or not isinstance(same, list | tuple | bytes | bytearray):
        raise wrong("expected a list of images and a list of flags")
    for number, flag in enumerate(same):
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise wrong(f"flag {number} is neither true nor false, but {_what(flag)}")
    if not same:
        raise wrong("it holds no pair")
    if len(images) != 2 * len(same):
        raise wrong(f"{len(same)} pairs need {2 * len(same)} images, it holds {len(images)}")
    encoded = []
    for number, image in enumerate(images):
        if isinstance(image, _Array) and image.values is not None and image.values.dtype == np.uint8:
            image = image.values.tobytes()
        if not isinstance(image, bytes | bytearray):
            raise wrong(f"image {number} is not the bytes of an encoded image, but {_what(image)}")
        encoded.append(bytes(image))
    return VerificationPack(tuple(encoded), np.asarray(list(same), dtype=np.bool_))


def _what(value: Any) -> str:
    """A value of a pack for a message, short."""
    if isinstance(value, _Array) and value.values is not None:
        return f"{value.values.size} values of type {value.values.dtype}"
    return shown(f"{value!r:.40}") if isinstance(value, bool | int | float | str | bytes) else type(value).__name__


def write_pack(path: Path, pack: VerificationPack) -> None:
    """Write a pack as InsightFace reads it (pickle protocol 4).

    Raises:
        ValueError: the images are not twice the flags.
    """
    if len(pack.images) != 2 * len(pack.same):
        raise ValueError(f"{len(pack.same)} pairs need {2 * len(pack.same)} images, got {len(pack.images)}")
    with path.open("wb") as file:
        pickle.dump((list(pack.images), [bool(flag) for flag in pack.same]), file, protocol=4)
