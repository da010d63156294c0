"""What a run keeps for looking at: a few victims, what was sent of them and what came back.

``samples/contact-sheet.png`` shows the first victims on one sheet. Beside it lie single pictures, listed in
``samples/samples.json``: of the first victims, which are the same for every run on them, and of the worst, the median
and the best one by what leaked. A report puts them side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bench.files import replacing, write_text
from bench.images import to_float
from bench.run.attacker import AttackStages
from bench.run.store import RunStore
from defenses.base import Defense

Array = npt.NDArray[np.float32]

#: Pixels of one cell.
CELL = 112
_GAP = 4
_HEADER = 18
_FOOTER = 16


def as_picture(representation: Array) -> npt.NDArray[np.uint8]:
    """Something to look at for any representation (C, h, w): (H, W, 3) in [0, 255].

    Three channels in [0, 1] are shown as the picture they are. Other maps are tiled in channel order on
    the smallest square grid, each scaled so that its own 1st and 99th percentile span black to white:
    coefficients have no common range, and a reader wants to see structure. Single values (a template) share one scale.
    """
    channels, height, width = representation.shape
    if channels == 3 and representation.min() >= -0.001 and representation.max() <= 1.001:
        picture: npt.NDArray[np.uint8] = np.rint(np.moveaxis(representation, 0, -1).clip(0, 1) * 255).astype(np.uint8)
        return picture
    side = math.ceil(math.sqrt(channels))
    within = (1, 2) if height * width > 1 else None
    low, high = np.percentile(representation, (1, 99), axis=within, keepdims=True)
    scaled = (representation - low) / np.maximum(high - low, 1e-6)
    grid = np.zeros((side * side, height, width), dtype=np.float32)
    grid[:channels] = scaled.clip(0, 1)
    tiled = grid.reshape(side, side, height, width).transpose(0, 2, 1, 3).reshape(side * height, side * width)
    grey: npt.NDArray[np.uint8] = np.rint(tiled * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def contact_sheet(
    path: Path, columns: Sequence[tuple[str, Sequence[Array]]], captions: Sequence[str], title: str
) -> None:
    """Write a PNG with one row per victim, its caption under it, and one column per way of seeing it.

    Columns are (heading, pictures); a picture is float (C, h, w) as for :func:`as_picture`. The title must say when the
    faces are synthetic.

    Raises:
        ValueError: columns of different lengths.
    """
    rows = len(captions)
    if any(len(pictures) != rows for _, pictures in columns):
        raise ValueError("every column needs one picture per caption")
    width = len(columns) * (CELL + _GAP) + _GAP
    row_height = CELL + _FOOTER
    sheet = Image.new("RGB", (width, 2 * _HEADER + rows * (row_height + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 3), title, fill="black")
    for column, (heading, pictures) in enumerate(columns):
        left = _GAP + column * (CELL + _GAP)
        draw.text((left, _HEADER + 2), heading, fill="black")
        for row, picture in enumerate(pictures):
            top = 2 * _HEADER + row * (row_height + _GAP)
            image = Image.fromarray(as_picture(picture))
            # Tiled maps are shrunk (smoothly), small pictures enlarged (with their pixels visible).
            method = Image.Resampling.BOX if image.width > CELL else Image.Resampling.NEAREST
            sheet.paste(image.resize((CELL, CELL), method), (left, top))
    for row, caption in enumerate(captions):
        draw.text((_GAP, 2 * _HEADER + row * (row_height + _GAP) + CELL + 2), caption, fill="#444444")
    sheet.save(path)


#: Faces on the sheet.
ROWS = 8
#: Of these, the ones that are kept as single pictures, too.
_FIRST = 4
#: Pixels of a single picture at most; tiled maps are larger.
_SIDE = 224


def write_sheet(
    attacks: AttackStages,
    defense: Defense,
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    store: RunStore,
    *,
    leakage: Tensor | None = None,
    members: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write ``samples/contact-sheet.png``, and single pictures with their index ``samples/samples.json``.

    Args:
        attacks, defense: who intercepts from whom what is shown as sent.
        columns: heading -> pictures (V, C, h, w), shown to the right of ``original`` and ``sent``.
        captions: a line per victim; none for no line.
        store: has the run's folder.
        leakage: float (V,), how much leaked of each victim; without it there is no worst, median and best one.
        members: name -> recovered faces (V, C, h, w) of each of several attacks; single pictures only.
    """
    config, stages, probes = attacks.config, attacks.stages, attacks.selection.attacked
    folder, rows = store.directory / "samples", min(ROWS, len(probes))
    roles = _roles(len(probes), leakage)
    chosen = torch.tensor(sorted({*range(rows), *roles}))
    sent = attacks.interceptions(defense, probes[chosen], 1)
    every = {
        "original": to_float(stages.splits.victims.images[probes[chosen]]),
        "sent": torch.cat([first[:, 0].float().cpu() for _, first, _ in sent]),
        **{heading: pictures[chosen] for heading, pictures in columns.items()},
        **{heading: pictures[chosen] for heading, pictures in members.items()},
    }
    source = stages.victim_source
    kind = "synthetic faces" if source.synthetic else f"dataset {source.name}"
    contact_sheet(
        folder / "contact-sheet.png",
        [(heading, list(every[heading][:rows].numpy())) for heading in ("original", "sent", *columns)],
        list(captions[:rows]) or [""] * rows,
        f"{config.defense} / {config.attack} ({config.knowledge}), {kind}",
    )
    index = []
    for number, (victim, victim_roles) in enumerate(sorted(roles.items())):
        row, files = chosen.tolist().index(victim), {}
        for column, (heading, pictures) in enumerate(every.items()):
            files[heading] = f"victim-{number}-{column}.png"
            _write_picture(folder / files[heading], pictures[row])
        caption = captions[victim] if captions else ""
        index.append({"image": int(probes[victim]), "roles": victim_roles, "caption": caption, "files": files})
    write_text(folder / "samples.json", json.dumps({"columns": list(every), "victims": index}, indent=2) + "\n")


def _roles(count: int, leakage: Tensor | None) -> dict[int, list[str]]:
    """Victim -> what it stands for."""
    roles = {victim: ["first"] for victim in range(min(_FIRST, count))}
    if leakage is not None:
        order = leakage.argsort(stable=True).tolist()
        for role, victim in (("worst", order[-1]), ("median", order[(count - 1) // 2]), ("best", order[0])):
            roles.setdefault(victim, []).append(role)
    return roles


def _write_picture(path: Path, picture: Tensor) -> None:
    pixels = as_picture(picture.cpu().numpy())
    grey = bool((pixels == pixels[..., :1]).all())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    if image.width > _SIDE:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    with replacing(path) as temporary:
        image.save(temporary, optimize=True)
