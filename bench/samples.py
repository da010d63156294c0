"""The contact sheet of a run: a few victims, what was sent of them and what came back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from bench.attack_stages import AttackStages
from bench.data.faceset import to_float
from bench.store import RunStore
from defenses.base import Defense
from reports.contact_sheet import contact_sheet

#: Faces on the sheet.
ROWS = 8


def write_sheet(
    attacks: AttackStages,
    defense: Defense,
    probes: Tensor,
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    store: RunStore,
) -> None:
    """Write ``samples/contact-sheet.png``.

    Args:
        attacks: intercepts what is shown as sent.
        defense: the one attacked.
        probes: the victim images, of which the first are shown.
        columns: heading -> pictures (V, C, h, w), shown to the right of ``original`` and ``sent``.
        captions: a line per victim; none for no line.
        store: has the run's folder.
    """
    config, stages = attacks.config, attacks.stages
    _, representations, _ = next(iter(attacks.interceptions(defense, probes, 1)))
    rows = min(ROWS, len(representations))
    shown = {
        "original": to_float(stages.splits.victims.images[probes[:rows]]),
        "sent": representations[:rows, 0].float().cpu(),
        **{heading: pictures[:rows] for heading, pictures in columns.items()},
    }
    kind = "synthetic faces" if stages.source.synthetic else f"dataset {stages.source.name}"
    contact_sheet(
        store.directory / "samples" / "contact-sheet.png",
        [(heading, [picture.numpy() for picture in pictures]) for heading, pictures in shown.items()],
        list(captions[:rows]) or [""] * rows,
        f"{config.defense} / {config.attack} ({config.knowledge}), {kind}",
    )
