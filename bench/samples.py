"""What a run keeps for looking at: a few victims, what was sent of them and what came back.

``samples/contact-sheet.png`` shows the first victims on one sheet. Beside it lie single pictures, listed in
``samples/samples.json``: of the first victims, which are the same for every run on them, and of the worst, the median
and the best one by what leaked. A report puts them side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.attack_stages import AttackStages
from bench.data.faceset import to_float
from bench.files import replacing, write_text
from bench.store import RunStore
from defenses.base import Defense
from reports.contact_sheet import as_picture, contact_sheet

#: Faces on the sheet.
ROWS = 8
#: Of these, the ones that are kept as single pictures, too.
_FIRST = 4
#: Pixels of a single picture at most; tiled maps are larger.
_SIDE = 224


def write_sheet(
    attacks: AttackStages,
    defense: Defense,
    probes: Tensor,
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    store: RunStore,
    *,
    leakage: Tensor | None = None,
    members: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``samples/contact-sheet.png``, and single pictures with their index ``samples/samples.json``.

    Args:
        attacks: intercepts what is shown as sent.
        defense: the one attacked.
        probes: the victim images, of which the first are shown.
        columns: heading -> pictures (V, C, h, w), shown to the right of ``original`` and ``sent``.
        captions: a line per victim; none for no line.
        store: has the run's folder.
        leakage: float (V,), how much leaked of each victim; without it there is no worst, median and best one.
        members: name -> recovered faces (V, C, h, w) of each attack of a composite one; single pictures only.
    """
    config, stages = attacks.config, attacks.stages
    rows = min(ROWS, len(probes))
    roles = _roles(len(probes), leakage)
    chosen = torch.tensor(sorted({*range(rows), *roles}))
    sent = _sent(attacks, defense, probes, chosen)
    every = {
        "original": to_float(stages.splits.victims.images[probes[chosen]]),
        "sent": sent,
        **{heading: pictures[chosen] for heading, pictures in columns.items()},
        **{heading: pictures[chosen] for heading, pictures in (members or {}).items()},
    }
    kind = "synthetic faces" if stages.source.synthetic else f"dataset {stages.source.name}"
    contact_sheet(
        store.directory / "samples" / "contact-sheet.png",
        [(heading, list(every[heading][:rows].numpy())) for heading in ("original", "sent", *columns)],
        list(captions[:rows]) or [""] * rows,
        f"{config.defense} / {config.attack} ({config.knowledge}), {kind}",
    )
    place = {int(victim): row for row, victim in enumerate(chosen)}
    victims = []
    for victim, named in sorted(roles.items()):
        pictures = {heading: tensors[place[victim]].cpu() for heading, tensors in every.items()}
        caption = captions[victim] if captions else ""
        victims.append({"image": int(probes[victim]), "roles": named, "caption": caption, "pictures": pictures})
    _keep(store.directory / "samples", list(every), victims)


def _roles(count: int, leakage: Tensor | None) -> dict[int, list[str]]:
    """Victim -> what it stands for."""
    roles = {victim: ["first"] for victim in range(min(_FIRST, count))}
    if leakage is not None:
        order = leakage.argsort(stable=True).tolist()
        for role, victim in (("worst", order[-1]), ("median", order[(count - 1) // 2]), ("best", order[0])):
            roles.setdefault(victim, []).append(role)
    return roles


def _sent(attacks: AttackStages, defense: Defense, probes: Tensor, chosen: Tensor) -> Tensor:
    """What was intercepted first of the ``chosen`` victims, float32 (M, C, h, w).

    All of them are protected again up to the last one chosen: what a random defence draws depends on its turn.
    """
    found: list[Tensor] = []
    start = 0
    for index, representations, _ in attacks.interceptions(defense, probes, 1):
        here = chosen[(chosen >= start) & (chosen < start + len(index))] - start
        found.append(representations[here.to(representations.device), 0].float().cpu())
        start += len(index)
        if start > int(chosen[-1]):
            break
    return torch.cat(found)


def _keep(folder: Path, headings: Sequence[str], victims: list[dict[str, object]]) -> None:
    """Write the pictures of each victim, then the index that names them."""
    index = []
    for number, victim in enumerate(victims):
        pictures = victim.pop("pictures")
        assert isinstance(pictures, dict)
        files = {}
        for column, (heading, picture) in enumerate(pictures.items()):
            files[heading] = f"victim-{number}-{column}.png"
            _write_picture(folder / files[heading], picture)
        index.append({**victim, "files": files})
    write_text(folder / "samples.json", json.dumps({"columns": list(headings), "victims": index}, indent=2) + "\n")


def _write_picture(path: Path, picture: Tensor) -> None:
    pixels = as_picture(picture.numpy())
    grey = bool((pixels == pixels[..., :1]).all())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    if image.width > _SIDE:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    with replacing(path) as temporary:
        image.save(temporary, optimize=True)
