"""``bench data verify``: decode everything and report what is damaged or suspicious."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel

from bench.data.decode import AT_ONCE, by_threads, decode_image, own_limits, shown, workers
from bench.data.encoded import EncodedSource
from bench.data.recordio import RecordFile, read_property, scan
from bench.data.sources.insightface import PackSource, RecordIOSource
from bench.data.tools.info import layout_of, open_part, part_name
from bench.errors import DataError
from bench.progress import Report, no_report

#: Below this on the shorter side, features of a face are a pixel or two.
SMALL_SIDE = 32


class Finding(BaseModel, frozen=True):
    """Something wrong with a file or an image: ``damaged`` ones cannot be used, ``suspicious`` ones should be seen."""

    where: str
    severity: Literal["damaged", "suspicious"]
    reason: str


class Verification(BaseModel, frozen=True):
    """What was looked at, and every finding in order."""

    path: str
    kind: str
    images: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return all(finding.severity != "damaged" for finding in self.findings)


def verify(path: Path, *, report: Report = no_report) -> Verification:
    """Decode every image and check what the files say of each other.

    Looked for: images that cannot be decoded; blank, tiny or non-square images; identical images under one or two
    names; a pair of identical images; nobody with two images; ``property`` and record counts that
    disagree; stray files. Where the structure of a file is damaged, that is the finding, and the next file is
    looked at.

    Raises:
        MissingError: there is nothing at ``path``.
        DataError: ``path`` is a file of another kind.
    """
    kind, files = layout_of(path)
    findings: list[Finding] = []
    images = 0
    for file in files:
        try:
            source = open_part(file)
            findings += _images(source, lambda done, total, before=images: report(before + done, before + total))
            images += len(source)
            if isinstance(source, RecordIOSource):
                findings += _beside(source)
        except DataError as error:
            findings.append(Finding(where=shown(file.name), severity="damaged", reason=str(error)))
    return Verification(path=str(path), kind=kind, images=images, findings=tuple(findings))


def _images(source: EncodedSource, report: Report) -> list[Finding]:
    digests: list[bytes | None] = [None] * len(source)

    def look(start: int) -> list[Finding]:
        findings = []
        for i in range(start, min(start + AT_ONCE, len(source))):
            try:
                data = source.encoded_image(i)
                digests[i] = hashlib.blake2b(data, digest_size=16).digest()
                findings += [_suspicious(source.where(i), reason) for reason in _oddities(decode_image(data))]
            except DataError as error:  # an image, or the record that should hold it
                findings.append(Finding(where=source.where(i), severity="damaged", reason=str(error)))
        return findings

    findings = [_suspicious(entry.where, entry.reason) for entry in source.ignored]
    with own_limits():
        for number, some in enumerate(by_threads(look, range(0, len(source), AT_ONCE), workers()), 1):
            findings += some
            report(min(number * AT_ONCE, len(source)), len(source))
    findings += _duplicates(source, digests)
    if np.bincount(source.labels).max() < 2:
        findings.append(_suspicious(part_name(source), "nobody has two images"))
    return findings


def _suspicious(where: str, reason: str) -> Finding:
    return Finding(where=where, severity="suspicious", reason=reason)


def _oddities(image: torch.Tensor) -> list[str]:
    _, height, width = image.shape
    reasons = []
    if min(height, width) < SMALL_SIDE:
        reasons.append(f"{width}x{height} pixels, hardly a face")
    if height != width:
        reasons.append(f"{width}x{height} pixels, not square: the ends of the longer side will be cut")
    if float(image.to(torch.float32).std()) < 2.0:
        reasons.append("blank: all pixels are nearly equal")
    return reasons


def _duplicates(source: EncodedSource, digests: list[bytes | None]) -> list[Finding]:
    findings = []
    if (pairs := source.pairs) is not None:
        for number, same in enumerate(pairs.same.tolist()):
            first, second = int(pairs.first[number]), int(pairs.second[number])
            if digests[first] is not None and digests[first] == digests[second]:
                kind = "genuine" if same else "impostor"
                findings.append(_suspicious(source.where(first), f"{kind} pair {number} is one image twice"))
    if isinstance(source, PackSource):
        return findings  # packs repeat images by design
    seen: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        if digest is None or (first := seen.setdefault(digest, i)) == i:
            continue
        name, other = (source.name(int(source.labels[row])) for row in (first, i))
        who = "of the same person" if name == other else f"although these are {name} and {other}"
        findings.append(_suspicious(source.where(i), f"identical to {source.where(first)}, {who}"))
    return findings


def _beside(source: RecordIOSource) -> list[Finding]:
    """What the record file, its index and its ``property`` say of each other."""
    file, records = source.path, RecordFile(source.path)
    offsets = scan(file)  # also of what no image needs, such as the ranges of the identities
    claimed = read_property(file.with_name("property"))
    name, findings = shown(file.name), []
    if records.index is None:
        findings.append(_suspicious(name, "has no .idx beside it: the file is scanned instead"))
    elif strays := len(np.setxor1d(offsets, records.offsets)):
        findings.append(_suspicious(shown(records.index.name), f"disagrees with {name} on {strays} records"))
    if claimed is None:
        findings.append(_suspicious("property", "missing: InsightFace's own loaders want it"))
    elif claimed[0] != source.identities:
        what = f"claims {claimed[0]} identities, {name} has {source.identities}"
        findings.append(_suspicious("property", what))
    return findings
