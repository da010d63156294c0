from __future__ import annotations

import gzip
import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest

from bench.data.verification_pack import VerificationPack, read_pack, write_pack
from bench.errors import DataError, MissingError

BINS = [b"one", b"two", b"\xff\xd8three", b"four" * 100]
SAME = [True, False]


def store(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "lfw.bin"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_binary_protocol(tmp_path, protocol):
    pack = read_pack(store(tmp_path, pickle.dumps((BINS, SAME), protocol)))
    assert pack.images == tuple(BINS)
    assert pack.same.tolist() == SAME
    assert pack.same.dtype == np.bool_


def arrays(shape=(-1,)):
    return [np.frombuffer(b, np.uint8).copy().reshape(shape) for b in BINS]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1)])
def test_numpy_uint8_arrays(tmp_path, protocol, shape):
    assert read_pack(store(tmp_path, pickle.dumps((arrays(shape), SAME), protocol))).images == tuple(BINS)


def test_read_only_arrays_and_flags_as_an_array(tmp_path):
    read_only = [np.frombuffer(b, np.uint8) for b in BINS]
    pack = read_pack(store(tmp_path, pickle.dumps((read_only, np.array([1, 0], np.uint8)), 5)))
    assert pack.images == tuple(BINS)
    assert pack.same.tolist() == SAME


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "flags",
    [
        [np.True_, np.False_],
        [np.int64(1), np.uint8(0)],
        [1, 0],
        [1.0, 0.0],
        [np.float32(1), np.float64(0)],
        (True, False),
        np.array([True, False]),
        np.array([1, 0]),
        np.array([1, 0], ">i4"),
        np.array([[1.0], [0.0]]),
        b"\1\0",
    ],
    ids=str,
)
def test_flags_of_any_kind(tmp_path, flags, protocol):
    pack = read_pack(store(tmp_path, pickle.dumps((BINS, flags), protocol)))
    assert pack.same.tolist() == SAME
    assert pack.same.dtype == np.bool_


def test_old_numpy_module_names(tmp_path):
    data = pickle.dumps((arrays(), SAME), 2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in data
    assert read_pack(store(tmp_path, data)).images == tuple(BINS)


def test_empty_bytes_under_protocol_2(tmp_path):
    # Python 3 spells b"" as a call of bytes() there; the image is for the decoder to refuse.
    data = pickle.dumps(([b"", b"x"], [False]), 2)
    assert any(op.name == "GLOBAL" for op, *_ in pickletools.genops(data))
    assert read_pack(store(tmp_path, data)).images == (b"", b"x")


def test_python_2_pack(tmp_path):
    """What ``cPickle.dump((bins, same), f, 2)`` of Python 2 writes: strings as BINSTRING, memo from 1."""
    data = b"\x80\x02]q\x01("
    for i, image in enumerate(BINS):
        data += b"U" + bytes([len(image)]) + image if len(image) < 256 else b"T" + struct.pack("<i", len(image)) + image
        data += b"q" + bytes([i + 2])
    data += b"e]q\x14(\x88\x89e\x86q\x15."
    # Memo indices may run ahead only as far as instructions went, which the picklers keep.
    data = data.replace(b"]q\x14", b"]q\x06").replace(b"\x86q\x15", b"\x86q\x07")
    pack = read_pack(store(tmp_path, data))
    assert pack.images == tuple(BINS)
    assert pack.same.tolist() == SAME


def test_round_trip(tmp_path):
    write_pack(tmp_path / "x.bin", VerificationPack(tuple(BINS), np.array(SAME)))
    pack = read_pack(tmp_path / "x.bin")
    assert pack.images == tuple(BINS)
    assert pickle.loads((tmp_path / "x.bin").read_bytes()) == (BINS, SAME)
    with pytest.raises(ValueError, match="2 pairs need 4 images"):
        write_pack(tmp_path / "y.bin", VerificationPack(tuple(BINS[:3]), np.array(SAME)))


class _Reduces:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("hostile", "name"),
    [
        (lambda mark: _Reduces(os.system, f"touch {mark}"), "system"),
        (lambda mark: _Reduces(eval, f"open({mark!r}, 'w')"), "eval"),
        (lambda mark: _Reduces(exec, f"open({mark!r}, 'w')"), "exec"),
        (lambda mark: _Reduces(getattr, os, "system"), "getattr|refused|damaged"),
        (lambda mark: _Reduces(open, mark, "w"), "open"),
        (lambda mark: _Reduces(__import__, "antigravity"), "__import__"),
        (lambda mark: _Reduces(bytearray, 10**12), "bytearray"),
        (lambda mark: _Reduces(np.load, mark), "load"),
        (lambda mark: _Reduces(np.frombuffer, b"x"), "frombuffer"),
    ],
)
def test_hostile_calls_never_run(tmp_path, protocol, hostile, name):
    mark = tmp_path / "executed"
    try:
        data = pickle.dumps(([b"a", hostile(str(mark))], [True]), protocol)
    except TypeError:  # a module, as getattr needs one, has no pickle: spell the reference out
        data = b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x04\x00\x00\x00name\x86R."
    path = store(tmp_path, data)
    with pytest.raises(DataError, match=name) as caught:
        read_pack(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_hostile_global_is_refused_before_anything_runs(tmp_path, monkeypatch):
    # A permitted call comes first; it must not be made when a hostile reference follows.
    from bench.data import verification_pack

    calls = []
    permitted = dict(verification_pack._PERMITTED)
    permitted["_codecs", "encode"] = verification_pack._StandIn(lambda *a: calls.append(a))
    monkeypatch.setattr(verification_pack, "_PERMITTED", permitted)
    head = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R0"
    with pytest.raises(DataError, match=r"posix\.system"):
        read_pack(store(tmp_path, head + b"cposix\nsystem\nX\x02\x00\x00\x00id\x85R."))
    assert calls == []


@pytest.mark.parametrize(
    "array",
    [
        np.array([b"a", None], dtype=object),
        np.zeros(3, np.complex64),
        np.zeros(3, "datetime64[s]"),
        np.zeros((2, 2, 3), np.uint8),
        np.zeros(3, [("a", "u1")]),
        np.array(["text"]),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_arrays_are_refused(tmp_path, array, protocol):
    with pytest.raises(DataError, match=r"lfw\.bin is refused"):
        read_pack(store(tmp_path, pickle.dumps(([array, b"x"], [True]), protocol)))


ENCODE = b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    "tampering",
    [
        ENCODE + b"}X\x05\x00\x00\x00valueX\x01\x00\x00\x00xsb.",  # BUILD with a dictionary
        ENCODE + b"X\x01\x00\x00\x00xb.",  # BUILD on a permitted name
        b"cnumpy\nndarray\n)R.",  # calling what only stands for a class
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ
        ENCODE + b"X\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13\x86R.",
        b"c__builtin__\nbytes\nJ\x00\x00\x00\x7f\x85R.",  # bytes(2**31 - 1)
        b"cnumpy.core.multiarray\n_reconstruct\nc__builtin__\nbytes\nK\x00\x85U\x01b\x87R.",  # another class
        b"(dc__builtin__\nobject\n.",
        b"X\x01\x00\x00\x00xQ.",  # persistent id
        b"(X\x02\x00\x00\x00idios\nsystem\n.",  # INST
        b"\x82\x01.",  # extension registry
        b"]r\xff\xff\xff\x7f.",  # a memo index that would allocate gigabytes
        b"]" + b"N" * 3 + b"\x8f.",  # sets
    ],
)
def test_tampering(tmp_path, tampering):
    with pytest.raises(DataError, match=r"refused|damaged") as caught:
        read_pack(store(tmp_path, b"\x80\x02" + tampering))
    assert "\n" not in str(caught.value)


def test_reference_made_up_on_the_stack(tmp_path):
    # STACK_GLOBAL takes its names from the stack, where reading alone cannot see them.
    with pytest.raises(DataError, match=r"a reference to os\.system"):
        read_pack(store(tmp_path, b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."))


def test_claimed_length_beyond_the_file_allocates_nothing(tmp_path):
    with pytest.raises(DataError, match="damaged"):
        read_pack(store(tmp_path, b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"abc."))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], r"pair \(images, same\)"),
        ("text", r"pair \(images, same\)"),
        ((b"ab", [True]), "list of images"),
        ((BINS, "ab"), "list of flags"),
        ((BINS, b"ab"), "flag 0 is neither true nor false, but 97"),
        ((BINS, [True, float("nan")]), "flag 1 is neither true nor false, but nan"),
        ((BINS, np.array([1, 2])), "flag 1 is neither true nor false, but 2"),
        ((BINS, [True, b"\1"]), "flag 1 is neither true nor false, but b'"),
        (
            ([b"a", np.zeros(3, bool)], [True]),
            "image 1 is not the bytes of an encoded image, but 3 values of type bool",
        ),
        (([b"a", np.uint8(3)], [True]), "image 1 is not the bytes of an encoded image, but 3$"),
        ((BINS, [True]), "1 pairs need 2 images, it holds 4"),
        ((BINS, [True, 2]), "neither true nor false"),
        ((BINS, [True, None]), "neither true nor false"),
        (([], []), "no pair"),
        (([b"a", "text"], [True]), "image 1 is not the bytes"),
        (([b"a", None], [True]), "image 1 is not the bytes"),
        (([b"a", [b"b"]], [True]), "image 1 is not the bytes"),
    ],
)
def test_other_contents(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_pack(store(tmp_path, pickle.dumps(content, 4)))


def test_truncated_empty_and_foreign(tmp_path):
    whole = pickle.dumps((BINS, SAME), 4)
    for data in (whole[:-20], whole[: len(whole) // 2], b"", b"\xff\xd8\xff\xe0 a JPEG"):
        with pytest.raises(DataError, match=r"lfw\.bin is (no verification pack|refused)"):
            read_pack(store(tmp_path, data))


def test_what_is_no_pack_is_named(tmp_path):
    for data, what in (
        (gzip.compress(b"x"), r"compressed \(gzip\)"),
        (b"version https://git-lfs.github.com", "Git LFS"),
    ):
        with pytest.raises(DataError, match=rf"lfw\.bin is no verification pack .*{what}"):
            read_pack(store(tmp_path, data))


def test_missing_and_too_large(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        read_pack(tmp_path / "none.bin")
    data = pickle.dumps((BINS, SAME), 4)
    path = store(tmp_path, data)
    assert len(read_pack(path, max_bytes=len(data)).images) == 4
    with pytest.raises(DataError, match=f"{len(data)} bytes, a verification pack may have"):
        read_pack(path, max_bytes=len(data) - 1)
