"""Small training sets of the same people in every layout that can be streamed, with what real ones have wrong."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.data.ijb import TEMPLATE
from bench.data.recordio import RecordWriter
from bench.data.verification_pack import VerificationPack, write_pack

#: Images of each person, and a list of pairs of three of them in two folds: for folders with LFW-style names.
PEOPLE = {"Ann": 3, "Bob": 2, "Cy": 2, "Dee": 2, "Eve": 1}
PAIRS = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\nCy\t1\t2\nCy\t2\tBob\t1\n"

#: Encoded images of one person.
Person = Sequence[bytes]


def picture(person: int, image: int, size: int = 32) -> bytes:
    """A JPEG: smooth noise that is the person's, and a little that is the image's."""
    own = np.random.default_rng(person).integers(0, 256, (4, 4, 3))
    more = np.random.default_rng((person, image)).integers(-40, 41, (4, 4, 3))
    pixels = (own + more).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def people(count: int, images: int, size: int = 32, first: int = 0) -> list[list[bytes]]:
    """Numbered from ``first``."""
    return [[picture(first + person, image, size) for image in range(images)] for person in range(count)]


def write_records(root: Path, everyone: Sequence[Person], victims: Sequence[Person]) -> Path:
    """``train.rec`` and a verification pack of a genuine and an impostor pair per victim."""
    root.mkdir(parents=True, exist_ok=True)
    total, key, starts = sum(map(len, everyone)), 1, []
    with RecordWriter(root / "train.rec") as writer:
        writer.write(0, (total + 1.0, total + 1.0 + len(everyone)))
        for label, person in enumerate(everyone):
            starts.append(key)
            for image in person:
                writer.write(key, (float(label),), image)
                key += 1
        for label, person in enumerate(everyone):
            writer.write(key + label, (float(starts[label]), float(starts[label] + len(person))))
    write_pairs(root / "lfw.bin", victims)
    return root


def write_pairs(path: Path, victims: Sequence[Person]) -> None:
    """A verification pack of a genuine and an impostor pair per victim."""
    slots: list[bytes] = []
    for i, person in enumerate(victims):
        slots += [person[0], person[1], person[0], victims[(i + 1) % len(victims)][1]]
    write_pack(path, VerificationPack(tuple(slots), np.tile([True, False], len(victims))))


def write_folder(root: Path, everyone: Sequence[Person], victims: Sequence[Person] = ()) -> Path:
    """One folder a person, and a ``pairs.txt`` over the victims where there are any."""
    for prefix, group in (("p", everyone), ("v", victims)):
        for label, person in enumerate(group):
            folder = root / f"{prefix}{label:03d}"
            folder.mkdir(parents=True)
            for number, image in enumerate(person, 1):
                (folder / f"{folder.name}_{number:04d}.jpg").write_bytes(image)
    if victims:
        same = [f"v{i:03d}\t1\t2" for i in range(len(victims))]
        other = [f"v{i:03d}\t1\tv{(i + 1) % len(victims):03d}\t2" for i in range(len(victims))]
        (root / "pairs.txt").write_text("\n".join([str(len(victims)), *same, *other]) + "\n")
    return root


def write_shards(root: Path, everyone: Sequence[Person], shards: int = 2) -> Path:
    """Tar shards, the images of a person spread over them; gives the pattern that means them all."""
    root.mkdir(parents=True, exist_ok=True)
    images = [(label, image) for label, person in enumerate(everyone) for image in person]
    for shard in range(shards):
        with tarfile.open(root / f"faces-{shard:04d}.tar", "w") as tar:
            for number, (label, image) in enumerate(images[shard::shards]):
                for suffix, data in (("jpg", image), ("cls", b"%d" % label)):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return root / f"faces-{{0000..{shards - 1:04d}}}.tar"


def write_janus(root: Path, everyone: Sequence[Person], *, name: str = "ijbc", aligned: bool = True) -> Path:
    """A benchmark in the layout of IJB-C, of people with six images: two templates to look for, one that is enrolled.

    The first image of each is a medium of its own, the others share one. The first half of the people is in one
    gallery, the others in another. With ``aligned`` the landmarks are where they belong, in images of 112 pixels, and
    the detector trusts the images in different degrees.
    """
    (root / "loose_crop").mkdir(parents=True)
    (root / "meta").mkdir()
    images, owner, points, number = [], {}, [], 0
    for subject, person in enumerate(everyone):
        for slot, template in enumerate((1000 - subject, 2000 + subject, 3000 + subject)):
            owner[template] = subject
            for image in person[2 * slot : 2 * slot + 2]:
                number += 1
                (root / "loose_crop" / f"{number}.jpg").write_bytes(image)
                images.append(f"{number}.jpg {template} {min(number % 6, 2)}")
                points.append(f"{number}.jpg {' '.join(f'{x:.4f}' for x in TEMPLATE.flatten())} {0.5 + number % 3 / 5}")
    pairs = [f"{a} {b} {int(owner[a] == owner[b])}" for a in owner for b in owner if a < b]
    half = len(everyone) // 2

    def rows(chosen: list[int]) -> list[str]:
        return ["TEMPLATE_ID,SUBJECT_ID,FILENAME", *(f"{template},{owner[template]},x.jpg" for template in chosen)]

    lists = {
        "face_tid_mid.txt": images,
        "template_pair_label.txt": pairs,
        "1N_gallery_G1.csv": rows([1000 - subject for subject in range(half)]),
        "1N_gallery_G2.csv": rows([1000 - subject for subject in range(half, len(everyone))]),
        "1N_probe_mixed.csv": rows([template for template in owner if template >= 2000]),
        **({"name_5pts_score.txt": points} if aligned else {}),
    }
    for file, lines in lists.items():
        (root / "meta" / f"{name}_{file}").write_text("\n".join(lines) + "\n")
    return root
