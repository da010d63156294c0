"""Files that were damaged or made to do harm, and what every reader of the suite may do with one.

From the command line, for many more than a test has time for: ``python tests/support/hostile.py READER --count 5000``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.files import keep
from bench.run.launch import forget_peak, peak_bytes

#: What one input may cost: seconds of a processor, and bytes beyond what the process holds anyway.
SECONDS, MEMORY = 5.0, 512 * 2**20

# -- damage --------------------------------------------------------------------------------------

_WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
_DEPTH = 100_000


class _Payload:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


def _archive(kind: str) -> bytes:
    """An archive whose members lie outside the folder that it is unpacked in."""
    buffer = io.BytesIO()
    names = ("../owned", "/tmp/../../owned", "a/../../owned")
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            for name in names:
                file.writestr(name, b"owned")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 5
                tar.addfile(member, io.BytesIO(b"owned"))
            link = tarfile.TarInfo("out")
            link.type, link.linkname = tarfile.SYMTYPE, ".."
            tar.addfile(link)
            through = tarfile.TarInfo("out/owned")
            through.size = 5
            tar.addfile(through, io.BytesIO(b"owned"))
    return buffer.getvalue()


def _arrays() -> bytes:
    """An ``.npz`` of objects."""
    buffer = io.BytesIO()
    np.savez(buffer, faces=np.array([_Payload()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


#: Whole files that are something else than the reader expects.
STRANGERS: tuple[bytes, ...] = (
    b"",
    b"\0",
    b"\0" * 4096,
    b"\xff" * 4096,
    b"\xef\xbb\xbf",
    b"\xff\xfe[\0",
    b"<!doctype html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"[" * _DEPTH,
    b'{"a":' * _DEPTH,
    b"a = " + b"[" * _DEPTH,
    b"a = " + b"{a = " * 5000,
    b"null",
    b"[]",
    b"{}",
    b"NaN",
    b'"\\ud800"',
    b"1" * 5000,
    b"-" * 5000,
    pickle.dumps(_Payload()),
    pickle.dumps(([_Payload()], [True])),
    b"\x80\x04" + b"(" * _DEPTH + b".",
    b"\x80\x04" + b"]" * 2 + b"a" * 10 + b".",
    _archive("zip"),
    _archive("tar"),
    _arrays(),
    b"\x1f\x8b\x08\0" + b"\0" * 60,
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2**32) + b"{" * 100,
)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    # Half of the time near the start, where headers are.
    end = min(len(data), 256) if rng.random() < 0.5 else len(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_word(data: bytes, rng: random.Random) -> bytes:
    """A huge length, or another number that no field expects."""
    order, size = rng.choice("<>"), rng.choice((1, 2, 4, 8))
    word = struct.pack(f"{order}Q", rng.choice(_WORDS))
    word = word[:size] if order == "<" else word[-size:]
    end = min(len(data), 256) if rng.random() < 0.5 else len(data)
    at = rng.randrange(end)
    return data[:at] + word + data[at + size :]


def _stretch(data: bytes, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    return at, min(len(data), at + rng.choice((1, 4, 8, 16, 64, 512, 4096)))


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two fields in each other's place."""
    a, b = sorted((_stretch(data, rng), _stretch(data, rng)))
    if a[1] > b[0]:
        return data[::-1]
    return data[: a[0]] + data[slice(*b)] + data[a[1] : b[0]] + data[slice(*a)] + data[b[1] :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    a, b = _stretch(data, rng)
    return data[:b] + data[a:b] * rng.choice((1, 2, 50)) + data[b:]


def drop(data: bytes, rng: random.Random) -> bytes:
    a, b = _stretch(data, rng)
    return data[:a] + data[b:]


def fill(data: bytes, rng: random.Random) -> bytes:
    a, b = _stretch(data, rng)
    return data[:a] + rng.choice((b"\0", b"\xff", rng.randbytes(1))) * (b - a) + data[b:]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.randrange(1, 64)), rng.choice(STRANGERS)[:4096])) + data[at:]


def other(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((*STRANGERS, rng.randbytes(rng.randrange(1, 2048))))


BYTES = (truncate, flip_bits, flip_bits, set_word, set_word, swap, repeat, drop, fill, insert, other)

#: What a value of a document may become; texts are looked for as paths, too.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**64, 10**400, -(10**18), 0.5, 1e308, -1e-308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "\0", "\ud800", "a" * 100_000, "../owned", "../../owned", "/etc/passwd", "a\nb\r\x1b[31m", "{{7*7}}"),
    *("<script>alert(1)</script>", "=1+1", "nan", "1e999", "[bold]", "[/]", "‮"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": 1}}),
)


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _at(node: Any, path: Sequence[Any]) -> Any:
    for key in path:
        node = node[key]
    return node


def change_document(document: Any, rng: random.Random) -> Any:
    """Change one to three places: another value, another place's value, one more level, or nothing there."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [place for place in _places(document) if place]
        if not places:
            return document
        *parents, last = rng.choice(places)
        parent, way = _at(document, parents), rng.random()
        if way < 0.1:
            del parent[last]
        elif way < 0.3:
            parent[last] = copy.deepcopy(_at(document, rng.choice(places)))
        elif way < 0.35:
            deep: Any = parent[last]
            for _ in range(rng.choice((1, 50, 250))):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            parent[last] = deep
        elif way < 0.4 and isinstance(parent, dict):
            parent[rng.choice(("", "../owned", "a" * 1000, "\0", "schema"))] = parent.pop(last)
        else:
            parent[last] = rng.choice(_VALUES)
    return document


def json_text(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with other values."""
    try:
        document = json.loads(data)
    except ValueError:
        return flip_bits(data, rng)
    return json.dumps(change_document(document, rng)).encode("utf-8", "surrogatepass")


def json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json_text(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def toml_text(data: bytes, rng: random.Random) -> bytes:
    """A TOML document with another value on one line."""
    lines = data.decode().splitlines()
    number = rng.choice([number for number, line in enumerate(lines) if "=" in line])
    values = (
        "nan",
        "-inf",
        "1e400",
        "9" * 5000,
        '""',
        '"\\u0000"',
        "[]",
        "{}",
        "[[[[]]]]",
        "true",
        "1979-05-27",
        "'a'",
    )
    deep = ("[" * 2000 + "]" * 2000, "{a=" * 200 + "1" + "}" * 200, '"../owned"', '"' + "a" * 100_000 + '"', "-1", "0")
    key = lines[number].partition("=")[0]
    key = rng.choice((key, key, key, "a.b.c", '""', key + ".b ", "a" * 1000, ".".join("a" * 1200)))
    lines[number] = f"{key}= {rng.choice((*values, *deep))}"
    return "\n".join(lines).encode()


def words_text(data: bytes, rng: random.Random) -> bytes:
    """A list of words with other words."""
    parts = data.split(b" ") if rng.random() < 0.3 else data.split(b"\t") if rng.random() < 0.5 else data.split(b"\n")
    strange = (
        b"",
        b"-1",
        b"0",
        b"9" * 30,
        b"9" * 5000,
        "٣".encode(),
        b"\xff",
        b"\0",
        b"../../owned",
        b"1e5",
        b"\x1b[31m",
    )
    at = rng.randrange(len(parts))
    parts[at] = rng.choice((*strange, rng.choice(parts), parts[at] * 50))
    return rng.choice((b" ", b"\t", b"\n")).join(parts) if rng.random() < 0.1 else b"\t".join(parts)


def table_values(data: bytes, rng: random.Random) -> bytes:
    """A Parquet file of other values, columns or rows."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(pa.BufferReader(data))
    at, count = rng.randrange(table.num_columns), table.num_rows
    name, column = table.column_names[at], table.column(at)
    values = column.to_pylist()
    strange = rng.choice(
        (
            *(
                None,
                True,
                -1,
                2**62,
                0.5,
                1e308,
                -1e308,
                float("nan"),
                float("inf"),
                "",
                "a" * 10_000,
                "<b>",
                "\0",
                "1",
            ),
            *(
                b"\xff",
                [],
                [1.0, 2.0],
                {"a": 1},
                datetime.datetime(1, 1, 1),
                datetime.date(9999, 12, 31),
                Decimal("1e30"),
            ),
        )
    )
    way = rng.randrange(9)
    if way < 3:  # all of a column, or (where the type allows it) some of it
        some = pa.array([strange] * count) if way < 2 else None
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            some = some or pa.array([strange if rng.random() < 0.1 else value for value in values], column.type)
        table = table.set_column(at, name, some or pa.nulls(count))
    elif way == 3:
        table = table.remove_column(at)
    elif way == 4:
        other = rng.choice((*table.column_names, "", "../owned", "<b>", "a" * 1000))
        table = table.rename_columns([other if place == at else each for place, each in enumerate(table.column_names)])
    elif way == 5:
        table = table.slice(0, rng.choice((0, 0, 1, 2)))
    elif way == 6:
        table = table.take([rng.randrange(count) for _ in range(rng.choice((count, 50 * count)))])
    elif way == 7:
        table = table.set_column(at, name, column.dictionary_encode())
    else:
        meta = {**(table.schema.metadata or {})}
        table = table.replace_schema_metadata({**meta, b"pandas": json_text(meta.get(b"pandas", b"{}"), rng)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def tensors_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, as long as it says."""
    (length,) = struct.unpack("<Q", data[:8])
    header = change_document(json.loads(data[8 : 8 + length]), rng)
    if rng.random() < 0.3:  # what is packed in a text within it
        meta = header.get("__metadata__")
        if isinstance(meta, dict) and isinstance(meta.get("details"), str):
            meta["details"] = json_text(meta["details"].encode(), rng).decode("utf-8", "replace")
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


#: What a module of somebody else may do while it is imported, or while what it defines is used.
_STATEMENTS = (
    *("raise SystemExit(0)", "raise SystemExit", "raise KeyError", "raise ValueError", "raise RuntimeError('a\\nb')"),
    *("print('printed')", "import sys; sys.stdout.write('written')", "import no_such_module", "1 / 0", "def f(:", "\0"),
    *("name = None", "name = '../../owned'", "name = ''", "summary = 5", "reference = None", "level = 'x'"),
    *("Options = dict", "Options = 3", "presets = [1]", "presets = {'cpu': 2}", "budgets = 1", "needs = 'all'"),
    *("weakened = 1", "trainable = 'no'", "del Defense", "Defense = object", "Mine = 3", "Network = None"),
    *("def transform(self): pass", "def __init__(self): pass", "representation_shape = None", "return", "yield 1"),
    *("f = lambda: f()\nf()", "import sys; sys.exit('bye')", "class Mine: pass", "raise NotImplementedError"),
)


def python_text(data: bytes, rng: random.Random) -> bytes:
    """A module with one more line, or without one."""
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    more = [indent + line for line in rng.choice(_STATEMENTS).splitlines()]
    lines[number : number + (rng.random() < 0.3)] = more
    return "\n".join(lines).encode()


def array_header(data: bytes, rng: random.Random) -> bytes:
    """An ``.npz`` whose array says that it is another."""
    buffer = io.BytesIO()
    header = rng.choice(
        (
            "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 3, 1000, 1000), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 8, 8), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 3, 8, 8), }",
            "{'descr': [('a', '<f4', (9, 9))], 'fortran_order': False, 'shape': (4,), }",
            "{'descr': '<f4', 'shape': (4, 3, 8, 8), }",
            "{'descr': '<c16', 'fortran_order': False, 'shape': (4, 3, 8, 8), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': ((((4,),),),), }",
            "__import__('os').system('touch owned')",
            "(" * 9000,
        )
    )
    if rng.random() < 0.1:
        return _bomb()
    text = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("faces.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + rng.randbytes(4096))
    return buffer.getvalue()


@functools.cache
def _bomb() -> bytes:
    """An ``.npz`` that is little packed and 300 MiB unpacked."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, faces=np.zeros((100, 3, 1024, 1024), dtype=np.uint8))
    return buffer.getvalue()


def zip_member(data: bytes, rng: random.Random) -> bytes:
    """A ZIP archive, one member of which is damaged; any other file is, as a whole."""
    if not data.startswith(b"PK"):
        return rng.choice(BYTES)(data, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(buffer, "w") as file:
        names = whole.namelist()
        chosen = rng.choice((*[name for name in names if name.endswith(".pkl")] * len(names), *names))
        for name in names:
            content = whole.read(name)
            file.writestr(name, rng.choice(BYTES)(content, rng) if name == chosen and content else content)
    return buffer.getvalue()


def onnx_field(data: bytes, rng: random.Random) -> bytes:
    """A model with another field."""
    import onnx

    model = onnx.load_from_string(data)
    graph, way = model.graph, rng.randrange(12)
    tensor, node = rng.choice(graph.initializer), rng.choice(graph.node)
    huge = rng.choice((0, -1, 7, 2**31, 2**62))
    if way == 0:
        tensor.dims[:] = [huge, *tensor.dims][: max(1, len(tensor.dims))]
    elif way == 1:
        tensor.data_location = tensor.EXTERNAL
        tensor.ClearField("raw_data")
        place = rng.choice(
            ("../owned", "/etc/passwd", "", ".", "model.onnx", "\0", "a" * 5000, "/dev/zero", "/dev/stdin")
        )
        for key, value in (
            ("location", place),
            ("offset", str(rng.choice(_WORDS))),
            ("length", str(rng.choice(_WORDS))),
        ):
            tensor.external_data.add(key=key, value=value)
    elif way == 2:
        tensor.data_type = rng.choice((0, 2, 7, 8, 10, 16, 99))
    elif way == 3:
        node.op_type = rng.choice(("Loop", "If", "Scan", "Nothing", "", "ConstantOfShape", "Expand", "Tile"))
    elif way == 4:
        node.input[rng.randrange(len(node.input))] = rng.choice((node.output[0], "", "nowhere"))
    elif way == 5:
        graph.input[0].type.tensor_type.shape.dim[rng.randrange(4)].dim_value = huge
    elif way == 6:
        graph.input[0].type.tensor_type.elem_type = rng.choice((0, 7, 8, 10, 11))
    elif way == 7:
        del graph.input[:]
    elif way == 8:
        del graph.output[:]
    elif way == 9:
        graph.node.add(op_type="Expand", input=[node.output[0], tensor.name], output=["more"])
        graph.output[0].name = "more"
    elif way == 10:
        inner = graph
        for _ in range(rng.choice((3, 40, 90))):
            inner = inner.node.add(op_type="If", input=["x"], output=["y"]).attribute.add(name="then_branch", type=5).g
    else:
        model.opset_import[0].version = huge if huge > 0 else 10**6
    return bytes(model.SerializeToString())


# -- readers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A reader of the suite.

    Attributes:
        make: writes whole files into a folder.
        files: patterns of those that are damaged, one at a time.
        read: reads them; it may write to the second folder, and nowhere else.
        damage: what is done to them besides :data:`BYTES`, by the suffix of the file.
        memory: bytes that one input may take.
        alone: whether it reads one file at a time.
        drawn: that of so many figures one is drawn, which takes longer than all the rest.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path, Path], object]
    damage: dict[str, Callable[[bytes, random.Random], bytes]]
    memory: int = MEMORY
    alone: bool = False
    drawn: int = 1


def _decoded(opened: Any) -> None:
    from bench.data.decode import decode_batch

    for view in (opened.faces, opened.victims):
        if view is None:
            continue
        encoded = view.source.encoded(np.arange(len(view.source))[:16])
        decode_batch(encoded, 16)


def _records(folder: Path) -> None:
    from small_sets import people, write_records

    write_records(folder, people(4, 2, 16), people(3, 2, 16, first=4))
    (folder / "property").write_text("4,16,16\n")


def _read_records(folder: Path, out: Path) -> None:
    from bench.data.recordio import read_property
    from bench.data.sources.insightface import InsightfaceOptions, open_insightface

    read_property(folder / "property")
    _decoded(open_insightface(folder, 16, InsightfaceOptions()))


def _pack(folder: Path) -> None:
    from small_sets import people, write_pairs

    write_pairs(folder / "lfw.bin", people(3, 2, 16))


def _read_pack(folder: Path, out: Path) -> None:
    from bench.data.decode import decode_batch
    from bench.data.sources.insightface import PackSource

    source = PackSource(folder / "lfw.bin", 16)
    source.once()
    decode_batch(source.encoded(np.arange(len(source))), 16)


def _images(folder: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((24, 24))
    for kind in ("jpg", "png", "bmp", "webp", "tif", "gif", "ppm", "pgm"):
        (image.convert("L") if kind == "pgm" else image).save(folder / f"face.{kind}")
    image.save(folder / "progressive.jpg", progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24)).save(folder / "deep.png")
    image.save(folder / "packed.tif", compression="tiff_lzw")
    exif = Image.Exif()
    exif[274] = 6
    image.save(folder / "turned.jpg", exif=exif)


def _read_images(folder: Path, out: Path) -> None:
    from bench.data.decode import decode_image, own_limits, read_image_file

    (file,) = folder.iterdir()
    with own_limits():
        decode_image(read_image_file(file), 16)


def _pairs(folder: Path) -> None:
    from small_sets import PAIRS, PEOPLE, people, write_folder

    everyone = people(len(PEOPLE), 3, 16)
    write_folder(folder / "faces", everyone)
    for number, (name, count) in enumerate(PEOPLE.items()):
        (folder / "named" / name).mkdir(parents=True)
        for image in range(count):
            (folder / "named" / name / f"{name}_{image + 1:04d}.jpg").write_bytes(everyone[number][image])
    (folder / "named" / "pairs.txt").write_text(PAIRS)


def _read_pairs(folder: Path, out: Path) -> None:
    from bench.data.sources.folder import FolderOptions, open_folder

    _decoded(open_folder(folder / "named", 16, FolderOptions()))


def _janus(folder: Path) -> None:
    from small_sets import people, write_janus

    write_janus(folder / "ijbc", people(2, 6, 112))


def _read_janus(folder: Path, out: Path) -> None:
    from bench.data.decode import decode_batch
    from bench.data.ijb import open_janus

    images = open_janus(folder / "ijbc", 16).source
    decode_batch(images.encoded(np.arange(len(images))[:2]), 16)


def _shards(folder: Path) -> None:
    from small_sets import people, write_shards

    write_shards(folder, people(4, 2, 16))


def _read_shards(folder: Path, out: Path) -> None:
    from bench.data.sources.webdataset import WebDatasetOptions, open_webdataset

    _decoded(open_webdataset(folder, 16, WebDatasetOptions()))


def _archived(folder: Path) -> None:
    for kind in ("", "gz", "xz"):
        with tarfile.open(folder / f"faces.tar{kind and '.'}{kind}", f"w:{kind}") as tar:
            for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
                member = tarfile.TarInfo(name)
                member.size = 900
                tar.addfile(member, io.BytesIO(bytes(900)))


def _unpack(folder: Path, out: Path) -> None:
    from bench.data.sources.lfw import unpack

    (archive,) = folder.iterdir()
    (out / "unpacked").mkdir()
    unpack(archive, out / "unpacked")


def _model(folder: Path) -> None:
    from onnx_models import entering_model, linear_model

    weights = np.random.default_rng(0).normal(size=(192, 4)).astype(np.float32) / 14
    entering_model(folder / "model.onnx", weights, [("Sub", 127.5), ("Mul", 1 / 128)])
    linear_model(folder / "split.onnx", weights, ("n", 3, 8, 8), external="split.onnx.data")


def _read_model(folder: Path, out: Path) -> None:
    import torch

    from bench.metrics.evaluator import Evaluator

    for file in sorted(folder.glob("*.onnx")):
        Evaluator.from_file(file).embed(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def _checkpoint(folder: Path) -> None:
    from bench.nets.recogniser import build_recogniser
    from bench.recognition.state import save_recogniser

    recogniser = build_recogniser("ir-tiny", (3, 16, 16), 8, image_size=16)
    save_recogniser(recogniser, folder / "recogniser.safetensors", {"losses": [1.0, 0.5]})


def _read_checkpoint(folder: Path, out: Path) -> None:
    import torch

    from bench.nets.checkpoints import load_recogniser

    recogniser, _ = load_recogniser(folder / "recogniser.safetensors")
    recogniser.embed(torch.zeros(1, *recogniser.spec.representation_shape))


def _state_dict(folder: Path) -> None:
    """TFace's IR-18, of which every layer holds one value many times: a file of a few kilobytes."""
    import torch

    from bench.nets.recogniser import build_recogniser

    theirs = {"residual": "res_layer", "shortcut": "shortcut_layer", "stages": "body", "stem": "input_layer"}
    theirs |= {"output.norm": "output_layer.0", "output.linear": "output_layer.3"}
    weights = {}
    for name, value in build_recogniser("ir-18", (3, 16, 16), 8).backbone.state_dict().items():
        name = name.replace("output.embedding_norm", "output_layer.4")
        for ours, called in theirs.items():
            name = name.replace(ours, called)
        weights[name] = value.flatten()[0].clone().expand(value.shape)  # else the file holds all of them
    torch.save(weights, folder / "theirs.pth")
    torch.save({"state_dict": weights, "epoch": 3}, folder / "old.pth", _use_new_zipfile_serialization=False)


def _read_state_dict(folder: Path, out: Path) -> None:
    from bench.nets.checkpoints import read_checkpoint

    (file,) = folder.iterdir()
    try:
        read_checkpoint(file)
    except ValueError as error:  # which the harness gives the name of the option that it came by
        raise BenchError(str(error)) from error


class _Net(nn.Module):
    """A network of a few weights, for pictures of 16 pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.PReLU(4), nn.Flatten(), nn.Linear(196, 8))

    def forward(self, faces: Tensor) -> Tensor:
        embeddings: Tensor = self.body(faces)
        return embeddings


@functools.cache
def _net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Net().eval()


@functools.cache  # names within depend on what was scripted before
def _scripts() -> dict[str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is old
        made = {"scripted.pt": torch.jit.script(_net())}
        made["traced.pt"] = torch.jit.trace(_net(), torch.zeros(1, 3, 16, 16))
        buffers = {name: io.BytesIO() for name in made}
        for name, buffer in buffers.items():
            torch.jit.save(made[name], buffer)
    return {name: buffer.getvalue() for name, buffer in buffers.items()}


def _scripted(folder: Path) -> None:
    for name, data in _scripts().items():
        (folder / name).write_bytes(data)


def _exported(folder: Path) -> None:
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(_net(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=batch)
    torch.export.save(program, folder / "net.pt2")


def _read_recogniser(folder: Path, out: Path) -> None:
    """As ``--recogniser FILE`` reads it."""
    from bench.nets.brought import open_recogniser
    from bench.nets.options import InputForm

    (file,) = folder.iterdir()
    try:
        open_recogniser(file, "cpu", InputForm(size=(16, 16)))(torch.zeros(1, 3, 16, 16))
    except ValueError as error:  # which the harness gives the name of the option that it came by
        raise BenchError(str(error)) from error


def _run(folder: Path) -> None:
    from run_folders import write_run

    write_run(folder / "runs" / "a", attack="unet,linear", strength=True, protocols={"calfw": (0.8, 0.9)})


_RUN_FILES = (
    "runs/a/*.json",
    "runs/a/*.parquet",
    "runs/a/events.jsonl",
    "runs/a/samples/samples.json",
    "runs/a/samples/*.png",
)


def _read_archive(folder: Path, out: Path) -> None:
    """What every command on runs does first."""
    bench(folder, "show", "runs/a")
    bench(folder, "runs", "runs")


def _read_table(folder: Path, out: Path) -> None:
    bench(folder, "table", "paper-partialface-recovery", "runs", "--format", "csv", "--out", str(out / "table.csv"))


def _resolved(folder: Path) -> None:
    """A run that `bench explain`, `observe`, `score` and `export` open: its configuration is one of today's."""
    from run_folders import write_run

    from bench.run.config import resolve
    from bench.run.observe import Exports

    run = write_run(folder / "runs" / "a", samples=False)
    for table in run.glob("*.parquet"):  # of which others see to the damage
        table.unlink()
    given = {"defense": "partialface", "attack": "unet", "preset": "quick", "device": "cpu", "image_size": 64}
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"] = resolve(given, {}).model_dump(mode="json")
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "observed.json").write_text(Exports(observed=("ab" * 32,)).model_dump_json())


class _Opened(Exception):
    """All that lies in a run's folder was read."""


def _read_opened(folder: Path, out: Path) -> None:
    """As `bench explain`, `observe` and `score` do, up to where the stages of the run are made again."""
    from bench.run.observe import Exports, opened
    from bench.run.pipeline import Pipeline

    Exports.of(folder / "runs" / "a")
    with patch.object(Pipeline, "attack_stages", side_effect=_Opened), contextlib.suppress(_Opened):
        opened(folder / "runs" / "a")


def _kept(folder: Path) -> None:
    """What finished runs keep of a defence that was fitted, and of a recogniser that was brought along."""
    import torch
    from onnx_models import linear_model
    from safetensors.torch import save_file

    from bench import plugins

    weights = np.random.default_rng(0).normal(size=(768, 8)).astype(np.float32)
    linear_model(folder / "brought.onnx", weights, ("n", 3, 16, 16))
    for run in ("fitted", "brought"):
        (folder / run / "checkpoints").mkdir(parents=True)
    save_file({"form": torch.tensor([0, 0])}, folder / "brought" / "checkpoints" / "recogniser.safetensors")
    fitted = plugins.make_defense("ppfr-fd", {}, "quick", 16)
    save_file(fitted.state_dict(), folder / "fitted" / "checkpoints" / "defense.safetensors")


def _read_kept(folder: Path, out: Path) -> None:
    """As `bench protect` and `bench export` do."""
    from bench.run.config import resolve
    from bench.run.provider import load_defense

    given = {"preset": "quick", "device": "cpu", "image_size": 16}
    fitted = {**given, "attack": "unet", "defense": "ppfr-fd"}
    brought = {**given, "attack": "template", "defense": "biohash", "recogniser": folder / "brought.onnx"}
    for run, settings in {"fitted": fitted, "brought": brought}.items():
        load_defense(folder / run, resolve(settings, {}))


def _read_report(folder: Path, out: Path) -> None:
    bench(folder, "report", "runs/a", "--out", str(out / "report"))


def _read_leaderboard(folder: Path, out: Path) -> None:
    bench(folder, "leaderboard", "runs", "--out", str(out / "board"))


def _shown(folder: Path) -> None:
    from run_folders import write_run

    write_run(folder / "runs" / "a")


def _read_view(folder: Path, out: Path) -> None:
    """The page over all runs, which nothing in a folder takes down, and the one of a run."""
    from starlette.testclient import TestClient

    from reports.view import make_app

    with TestClient(make_app(folder / "runs", "token"), base_url="http://127.0.0.1") as client:
        overview = client.get("/token/")
        assert overview.status_code == 200, overview.text[:300]
        page = client.get("/token/run/a")
    if page.status_code != 200:
        raise BenchError(page.text)


def _timed(folder: Path) -> None:
    call = {"name": "test_a", "stats": {"median": 0.1, "q1": 0.09, "q3": 0.2, "rounds": 5}, "extra_info": {"n": 1.5}}
    (folder / "timed.json").write_text(json.dumps({"machine_info": {"node": "here"}, "benchmarks": [call, call]}))


def _read_timed(folder: Path, out: Path) -> None:
    """As ``bench report --benchmarks`` does."""
    from reports.benchmarks import benchmark_table
    from reports.terminal import render_table

    table = benchmark_table([folder / "timed.json"])
    with contextlib.redirect_stdout(io.StringIO()):
        from bench.commands import console

        console.show([], False, lambda: render_table([table] if table else []))


def _gated(folder: Path) -> None:
    from gate_world import make_run

    for name, seed in (("a", 0), ("b", 1)):
        make_run(folder / "runs" / name, seed=seed)
    bench(folder, "baseline", "runs/a", "runs/b", "-o", "baseline.json")


def _read_gate(folder: Path, out: Path) -> None:
    bench(folder, "gate", "--baseline", "baseline.json", "runs", "--junit", str(out / "junit.xml"))
    bench(folder, "compare", "runs/a", "runs/b")
    bench(folder, "baseline", "runs", "-o", str(out / "baseline.json"))


def _config(folder: Path) -> None:
    from bench.run.config import resolve, write_config

    given = {"defense": "partialface", "attack": "unet", "preset": "quick", "defense_options": {"views": 2}}
    write_config(resolve(given, {}), folder / "run.toml")


def _read_config(folder: Path, out: Path) -> None:
    from bench.run.config import resolve

    resolve({"device": "cpu"}, {}, folder / "run.toml")


def _swept(folder: Path) -> None:
    from sweep_at_work import light, sweep

    sweep(folder, light).run()


@functools.cache
def _cells(folder: Path) -> Any:
    from sweep_at_work import light, sweep

    return sweep(folder, light).cells


def _read_sweep(folder: Path, out: Path) -> None:
    from bench.sweep.journal import survey

    survey(_cells(folder))


_TRAINED = {"epochs": 1, "batch_size": 12, "head": "partial-fc", "sample_rate": 1.0}


def _trained(folder: Path) -> None:
    """A recogniser's training after its only epoch, and an attack's after one step."""
    from training_at_work import learn

    from bench.recognition.processes import Processes

    learn(Processes(), [_TRAINED], folder / "training")
    step, network = _fit(folder)
    network(torch.ones(1, 3)).sum().backward()
    step._optimizers[0].step()
    from attacks.parts.training import _Progress

    step.save(_Progress(1, None, [(4, 0.5)]))


def _fit(folder: Path) -> tuple[Any, nn.Module]:
    """What keeps an attack's training in a folder, and the network that is trained."""
    from attacks.parts.training import _Checkpoint

    network = nn.Linear(3, 2)
    trainer: Any = SimpleNamespace(adversary=SimpleNamespace(checkpoint=folder), fit={"seed": 0}, states_seen=None)
    training: Any = SimpleNamespace(name="fit", stored=None, network=network)
    (folder / "fit").mkdir(exist_ok=True)
    average, optimizer = nn.Linear(3, 2), torch.optim.AdamW(network.parameters())
    return _Checkpoint(trainer, training, average, [network], [optimizer]), network


def _read_trained(folder: Path, out: Path) -> None:
    """As a training that was killed goes on."""
    from training_at_work import learn

    from bench.recognition.processes import Processes

    try:
        _fit(folder)[0].resume()
    except ValueError as error:  # which the attack's failure is told with
        raise BenchError(str(error)) from error
    (learnt,) = learn(Processes(), [_TRAINED], folder / "training")
    if "error" in learnt:
        raise BenchError(learnt["error"])


_PLUGIN = """
import torch
from pydantic import Field
from torch import nn
from attacks.base import RecoveryAttack, FitReport
from defenses.base import Defense, DefenseOptions

class Options(DefenseOptions):
    amount: int = Field(3, ge=1, description="How much.")

class Mine(Defense):
    name = "mine"
    summary = "mine alone"
    Options = Options
    presets = {"cpu": {"amount": 2}}

    def __init__(self, options, *, image_size):
        super().__init__(options, image_size=image_size)
        self.amount = options.amount

    @property
    def representation_shape(self):
        return (3, self.image_size, self.image_size)

    def transform(self, faces, state, generator):
        return faces / self.amount

class Theirs(RecoveryAttack):
    name = "theirs"
    summary = "theirs alone"

    def build(self, adversary):
        pass

    def fit(self, adversary):
        return FitReport()

    def run(self, observation):
        return observation.representations[:, 0]

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, faces):
        return self.layer(faces.mean(dim=(2, 3)))
"""


def _plugged(folder: Path) -> None:
    about = folder / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    kinds = {"defenses": ("mine", "Mine"), "attacks": ("theirs", "Theirs"), "recognisers": ("net", "Network")}
    groups = (f"[bench.{kind}]\n{name} = hostile_plugin:{what}\n" for kind, (name, what) in kinds.items())
    (about / "entry_points.txt").write_text("\n".join(groups))
    (folder / "hostile_plugin.py").write_text(_PLUGIN)


def _read_plugins(folder: Path, out: Path) -> None:
    """As lists and runs do, of the package in this folder alone."""
    from importlib import metadata

    from bench import plugins
    from bench.commands import console, list

    def entry_points(group: str) -> Any:
        found = (dist.entry_points.select(group=group) for dist in metadata.distributions(path=[str(folder)]))
        return [entry for entries in found for entry in entries]

    kinds = (plugins.defenses, plugins.attacks, plugins.recognisers)
    with (
        patch.object(plugins, "entry_points", entry_points),
        patch.object(sys, "path", [str(folder), *sys.path]),
        patch.object(sys, "dont_write_bytecode", True),  # the bytecode that Python keeps is no harm that a plugin does
    ):
        try:
            for kind in kinds:
                kind.cache_clear()
            console.Command("list", callback=lambda: _use_plugins(list)).main([], standalone_mode=False)
        finally:
            sys.modules.pop("hostile_plugin", None)
            for kind in kinds:
                kind.cache_clear()


def _use_plugins(listing: Any) -> None:
    from bench import plugins

    for name in sorted({*plugins.defenses()} - _builtin("defenses")):
        listing._entry(listing._defense(plugins.defenses().get(name)))
        plugins.make_defense(name, {}, "cpu", 16)
    for name in sorted({*plugins.attacks()} - _builtin("attacks")):
        listing._entry(listing._plugin(plugins.attacks().get(name)))
        plugins.make_attack(name, {}, "cpu")
    for name in plugins.recognisers():
        plugins.recognisers().get(name)


@functools.cache
def _builtin(package: str) -> set[str]:
    import importlib
    import pkgutil

    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return {module.name.replace("_", "-") for module in modules}


def _submitted(folder: Path) -> None:
    faces = np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32)
    np.savez_compressed(folder / "faces.npz", faces=faces, observed=np.array("ab" * 32))


def _pictured(folder: Path) -> None:
    from small_sets import picture

    for number in range(4):
        (folder / f"face_{number}.jpg").write_bytes(picture(0, number, 16))
    (folder / "observed.txt").write_text("ab" * 32)


def _read_pictures(folder: Path, out: Path) -> None:
    from bench.run.submission import read_submission

    read_submission(folder, 4, 16)


def _read_submission(folder: Path, out: Path) -> None:
    from bench.run.submission import read_submission

    read_submission(folder / "faces.npz", 4, 8)


def _cached(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from bench.run.stage import StageCache

    cache = StageCache(folder)
    with cache.entry("stage", "k") as entry:
        save_file({"a": torch.ones(9)}, entry.partial / "a.safetensors")
    partial = folder / "other-k.partial"
    partial.mkdir()
    save_file({"a": torch.ones(9)}, partial / "a.safetensors")
    (partial / "state.json").write_text('{"step": 1}')
    torch.save({"a": torch.ones(3)}, partial / "fit.ckpt")


def _read_cached(folder: Path, out: Path) -> None:
    from bench.run.stage import StageCache

    cache = StageCache(folder)
    for stage in ("stage", "other"):
        with cache.entry(stage, "k"):
            pass


@functools.cache
def _planned(folder: Path) -> Any:
    """A run of faces on disk, which stand for any."""
    from rich.console import Console

    from bench.run.config import resolve
    from bench.run.pipeline import Pipeline

    given = {"defense": "blur", "attack": "unet", "preset": "quick", "device": "cpu", "utility": False}
    given |= {"dataset": "folder", "data_root": str(folder / "faces"), "out": str(folder), "image_size": 32}
    return Pipeline(resolve(given, {}), console=Console(quiet=True))


#: Of the parts of these faces.
_SIZES = {"provider": 19, "public": 5, "evaluator": 4, "victims": 4}


def _noted(folder: Path) -> None:
    """What plans and lists go by: what was found in data, what stages took, and a list."""
    from small_sets import people, write_folder

    from bench.commands import list
    from bench.run.provider import Stages

    write_folder(folder / "faces", people(16, 2, 32))
    stages = _planned(folder).attack_stages().stages
    with patch.object(Stages, "_note", lambda stages: folder / "cache" / "found-k.json"):
        assert stages.found["excluded"] is not None
    assert stages.sizes() == _SIZES
    (folder / "cache" / "attack-unet-blur-k").mkdir()
    keep(folder / "cache" / "attack-unet-blur-k" / "seconds.json", {"seconds": 2.0, **stages.circumstances()})
    with patch.object(list, "_version", lambda root: "k"), patch.dict(os.environ, BENCH_CACHE=str(folder)):
        list._remembered("heads")


def _read_notes(folder: Path, out: Path) -> None:
    """What is damaged is as if it were not there."""
    from bench.commands import list
    from bench.run.plan import Timings
    from bench.run.provider import Stages

    stages = _planned(folder).attack_stages().stages
    with patch.object(Stages, "_note", lambda stages: folder / "cache" / "found-k.json"):
        recalled = stages.recall()
    assert stages.sizes() == (_SIZES if recalled else {})
    job = SimpleNamespace(stage="attack-unet-blur")
    step: Any = SimpleNamespace(job=job, kind="attack-unet-", attack=SimpleNamespace(name="unet"))
    assert Timings(stages).estimate(step) in ((2.0, None) if recalled else (None,))
    with (
        patch.object(list, "_version", lambda root: "k"),
        patch.object(list, "entry_points", lambda group: ()),
        patch.dict(os.environ, BENCH_CACHE=str(folder)),
    ):
        assert list._remembered("heads") == list.catalogue("heads")


_JSON = {".json": json_text, ".jsonl": json_lines}
_RUN = {**_JSON, ".parquet": table_values}

READERS: dict[str, Reader] = {
    "recordio": Reader(_records, ("*.rec", "*.idx", "property"), _read_records, {".idx": words_text, "": words_text}),
    "pack": Reader(_pack, ("lfw.bin",), _read_pack, {}),
    "images": Reader(_images, ("*",), _read_images, {}, memory=2**30, alone=True),
    "pairs": Reader(_pairs, ("named/pairs.txt",), _read_pairs, {".txt": words_text}),
    "ijb": Reader(_janus, ("ijbc/meta/*",), _read_janus, {".txt": words_text, ".csv": words_text}),
    "webdataset": Reader(_shards, ("*.tar",), _read_shards, {}),
    "archive": Reader(_archived, ("*",), _unpack, {}, alone=True),
    "onnx": Reader(_model, ("*.onnx", "*.data"), _read_model, {".onnx": onnx_field}),
    "checkpoint": Reader(_checkpoint, ("*",), _read_checkpoint, {".safetensors": tensors_header}),
    "state_dict": Reader(_state_dict, ("*.pth",), _read_state_dict, {".pth": zip_member}, alone=True),
    "torchscript": Reader(_scripted, ("*.pt",), _read_recogniser, {".pt": zip_member}, alone=True),
    "exported": Reader(_exported, ("*.pt2",), _read_recogniser, {".pt2": zip_member}, alone=True),
    "resumed": Reader(_trained, ("*/*.safetensors", "*/*/*"), _read_trained, {".safetensors": tensors_header}),
    "cache": Reader(_cached, ("*/*",), _read_cached, {".safetensors": tensors_header, **_JSON}),
    "notes": Reader(_noted, ("cache/*.json", "cache/*/*", "lists/*"), _read_notes, _JSON),
    "run": Reader(_run, _RUN_FILES, _read_archive, _RUN),
    "table": Reader(_shown, ("runs/a/*.json", "runs/a/*.parquet"), _read_table, _RUN),
    "opened": Reader(_resolved, ("runs/a/*.json",), _read_opened, _JSON),
    "kept": Reader(_kept, ("*/checkpoints/*",), _read_kept, {".safetensors": tensors_header}),
    "report": Reader(_run, _RUN_FILES, _read_report, _RUN, drawn=40),
    "leaderboard": Reader(_run, _RUN_FILES, _read_leaderboard, _RUN, drawn=40),
    "view": Reader(_shown, _RUN_FILES, _read_view, _RUN, drawn=40),
    "gate": Reader(_gated, ("baseline.json", *_RUN_FILES), _read_gate, _RUN),
    "timed": Reader(_timed, ("*.json",), _read_timed, _JSON),
    "toml": Reader(_config, ("*.toml",), _read_config, {".toml": toml_text}),
    "sweep": Reader(_swept, ("sweeps/*/sweep.json",), _read_sweep, _JSON),
    "plugin": Reader(_plugged, ("*.py", "*/*"), _read_plugins, {".py": python_text, ".txt": words_text}),
    "recovered": Reader(_pictured, ("*",), _read_pictures, {}, memory=2**27),
    "submission": Reader(_submitted, ("*.npz",), _read_submission, {".npz": array_header}, memory=2**27),
}  # fmt: skip


def bench(folder: Path, *arguments: str) -> None:
    """The command in ``folder``, without ``bench.cli``'s last resort for what nobody expected."""
    import typer

    with _within(folder), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = _command().main(list(arguments), "bench", standalone_mode=False)
        except typer.Exit as ended:
            code = ended.exit_code
    if code not in (None, 0, 1, 4):
        raise BenchError(f"exit code {code}")


@functools.cache
def _command() -> Any:
    import typer

    from bench.cli import app

    return typer.main.get_command(app)


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class _Sheet:
    """In the place of a figure and of its axes: whatever is painted is taken, and nothing is laid out or drawn."""

    def __call__(self, *given: Any, **options: Any) -> _Sheet:
        return self

    def __getattr__(self, name: str) -> _Sheet:
        return self

    def get_legend_handles_labels(self) -> tuple[list[Any], list[str]]:
        return [], []

    def savefig(self, file: Any, **options: Any) -> None:
        file.write(b'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt" viewBox="0 0 9 9"></svg>')


@contextmanager
def _drawing(one_in: int, seed: int) -> Iterator[None]:
    """One figure in so many is drawn, others with other seeds; of the rest all that lies in them is worked out."""
    from reports import svg

    figure, canvas, rng = svg.Figure, svg.FigureCanvasSVG, random.Random(seed)

    def made(**options: Any) -> Any:
        return _Sheet() if rng.randrange(one_in) else figure(**options)

    def canvas_of(made: Any) -> Any:
        return made if isinstance(made, _Sheet) else canvas(made)

    with patch.object(svg, "Figure", made), patch.object(svg, "FigureCanvasSVG", canvas_of):
        yield


# -- trying --------------------------------------------------------------------------------------


def _tree(folder: Path) -> set[str]:
    return {f"{at}/{name}" for at, _, names in os.walk(folder) for name in names}


class Trial:
    """A reader in a folder of its own: ``<root>/box/in`` is read, ``box/out`` may be written to.

    >>> import tempfile
    >>> trial = Trial("toml", Path(tempfile.mkdtemp()))
    >>> trial.fault(0) is None
    True
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.reader, self.root = name, READERS[name], root
        self._whole = root / "whole"
        self._whole.mkdir()
        self.reader.make(self._whole)
        self.accepted = 0
        self._box = root / "box"
        for file in self.files() if self.reader.alone else [None]:  # what is whole is read
            self._lay_out(file)
            with _within(self._box):
                self.reader.read(self._box / "in", self._box / "out")
            shutil.rmtree(self._box)

    def files(self) -> list[str]:
        """The files that are damaged."""
        found = (file for pattern in self.reader.files for file in sorted(self._whole.glob(pattern)))
        return list(dict.fromkeys(str(file.relative_to(self._whole)) for file in found if file.is_file()))

    def _lay_out(self, name: str | None, data: bytes | None = None) -> None:
        """Whole files for the reader, but for the one that holds ``data``."""
        inputs = self._box / "in"
        (self._box / "out").mkdir(parents=True)
        if name is not None and self.reader.alone:
            inputs.mkdir()
            shutil.copy(self._whole / name, inputs)
        else:
            shutil.copytree(self._whole, inputs)
        if name is not None and data is not None:
            (inputs / name).write_bytes(data)

    def damaged(self, seed: int) -> tuple[str, bytes]:
        """The name of the file that is damaged under this seed, and what it holds then."""
        rng = random.Random(f"{self.name} {seed}")
        name = rng.choice(self.files())
        data = (self._whole / name).read_bytes()
        special = self.reader.damage.get(Path(name).suffix)
        ways = BYTES if special is None else (*BYTES, *([special] * len(BYTES)))
        return name, rng.choice(ways)(data, rng)

    def fault(self, seed: int) -> str | None:
        """What went wrong with one damaged input; None if it was refused in one clear line, or read as it is."""
        name, data = self.damaged(seed)
        inputs, out = self._box / "in", self._box / "out"
        self._lay_out(name, data)
        before, began = _tree(self.root), time.process_time()
        held = peak_bytes() if forget_peak() else None
        problem = None
        try:
            printed = io.StringIO()  # stdout belongs to the command line
            drawn = contextlib.nullcontext() if self.reader.drawn == 1 else _drawing(self.reader.drawn, seed)
            with _within(self._box), contextlib.redirect_stdout(printed), warnings.catch_warnings(), drawn:
                warnings.simplefilter("ignore")
                self.reader.read(inputs, out)
            self.accepted += 1
            problem = f"prints {printed.getvalue()[:200]!r}" if printed.getvalue() else None
        except BenchError as error:
            problem = None if str(error).strip() else "an error without a word"
            problem = f"prints {printed.getvalue()[:200]!r}" if printed.getvalue() else problem
        except Exception:
            problem = traceback.format_exc(limit=-5)
        took, most = time.process_time() - began, peak_bytes()
        if problem is None and took > SECONDS:
            problem = f"{took:.1f} s of work"
        if problem is None and held is not None and most is not None and most - held > self.reader.memory:
            problem = f"{(most - held) / 2**20:.0f} MiB"
        strays = {file for file in _tree(self.root) - before if not Path(file).is_relative_to(out)}
        allowed = inputs if self.name in ("cache", "notes", "sweep") else None
        strays = {file for file in strays if allowed is None or not Path(file).is_relative_to(allowed)}
        if problem is None and strays:
            problem = f"wrote {', '.join(sorted(strays))}"
        shutil.rmtree(self._box)
        return None if problem is None else f"{self.name} seed {seed} ({name}): {problem}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--most", type=int, default=10, help="faults after which a reader is left")
    asked = parser.parse_args()
    for name in READERS if asked.reader == "all" else (asked.reader,):
        _try_out(name, range(asked.first, asked.first + asked.count), asked.most)


def _try_out(name: str, seeds: range, most: int) -> None:
    """Try seeds in child processes, since one that crashes takes its process with it."""
    with tempfile.TemporaryDirectory() as root:
        Trial(name, Path(root))  # raises here if what is whole is not read
    at, found, began, accepted, kinds = seeds.start, 0, time.perf_counter(), 0, set[str]()
    while at < seeds.stop and len(kinds) < most:
        receiver, sender = os.pipe()
        if not (child := os.fork()):
            try:
                os.close(receiver)
                _tell(name, range(at, seeds.stop), sender)
            finally:
                os._exit(0)
        os.close(sender)
        with os.fdopen(receiver) as lines:
            for line in lines:
                at, fault, taken = json.loads(line)
                at, accepted = at + 1, accepted + taken
                if fault:
                    found += 1
                    if (kind := re.sub(r"[0-9]+", "", " ".join(fault.splitlines()[-3:]))[-300:]) not in kinds:
                        print(fault, flush=True)
                    kinds.add(kind)
                    if len(kinds) >= most:
                        break
        if len(kinds) >= most:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and at < seeds.stop and len(kinds) < most:
            raise RuntimeError(f"{name} seed {at}: the trial itself failed")
        if os.WIFSIGNALED(status) and len(kinds) < most:
            kinds.add(f"{name} seed {at}: the process died of signal {os.WTERMSIG(status)}")
            print(f"{name} seed {at}: the process died of signal {os.WTERMSIG(status)}", flush=True)
            at, found = at + 1, found + 1
    took = time.perf_counter() - began
    told = f"{at - seeds.start} inputs, {accepted} read as they are, {found} faults of {len(kinds)} kinds, {took:.0f} s"
    print(f"{name}: {told}", flush=True)


def _tell(name: str, seeds: range, sender: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        trial = Trial(name, Path(root))
        for seed in seeds:
            before = trial.accepted
            fault = trial.fault(seed)
            os.write(sender, (json.dumps([seed, fault, trial.accepted - before]) + "\n").encode())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
