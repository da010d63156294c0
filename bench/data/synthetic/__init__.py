"""Synthetic faces: parametric heads rendered in torch, the suite's embedded default dataset.

Every identity is shown in several pictures, deterministic from one seed.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field

from bench.data.decode import by_threads
from bench.data.faces import FaceSet, Source
from bench.data.loaders import Dataset
from bench.data.synthetic.parameters import Conditions, Identities, draw_conditions, draw_identities
from bench.data.synthetic.renderer import MIN_SIZE, render
from bench.progress import Report, no_report
from bench.randomness import Streams

__all__ = [
    "Conditions",
    "Identities",
    "SyntheticOptions",
    "draw_conditions",
    "draw_identities",
    "load_synthetic",
    "render",
]

_FACES_AT_ONCE = 64


class SyntheticOptions(BaseModel, frozen=True, extra="forbid"):
    identities: int = Field(ge=1, description="Number of people.")
    images_per_identity: int = Field(ge=1, description="Pictures of each.")
    image_size: int = Field(112, ge=MIN_SIZE, description="Height and width in pixels.")
    seed: int = Field(
        0,
        ge=0,
        description="The dataset's seed; the first k people (and the first j pictures of each) are the same however "
        "many are asked for.",
    )


def load_synthetic(
    options: SyntheticOptions, *, device: torch.device | str = "cpu", report: Report = no_report
) -> Source:
    """Render the dataset, its faces grouped by identity and on the CPU; what is drawn doesn't depend on ``device``.

    ``report`` is called with (faces done, faces in all).
    """
    streams = Streams(options.seed)
    each, total = options.images_per_identity, options.identities * options.images_per_identity
    identities = draw_identities(options.identities, streams.generator("synthetic/identities"))
    tables = [draw_conditions(each, streams.generator(f"synthetic/conditions/{i}")) for i in range(options.identities)]
    conditions = Conditions(torch.cat([table.values for table in tables]), tables[0].columns)
    labels = torch.arange(options.identities).repeat_interleave(each)
    images = torch.empty((total, 3, options.image_size, options.image_size), dtype=torch.uint8)
    threads, on_cpu = torch.get_num_threads(), torch.device(device).type == "cpu"

    def paint(start: int) -> int:
        if on_cpu:
            torch.set_num_threads(1)
        rows = slice(start, min(start + _FACES_AT_ONCE, total))
        people, pictures = identities.rows(labels[rows]).to(device), conditions.rows(rows).to(device)
        images[rows] = (render(people, pictures, options.image_size) * 255).round_().to("cpu", torch.uint8)
        return rows.stop

    # Rendering is thousands of small operations. Threads that share each of them wait for each other more than they
    # work, and for ever beside busy neighbours; so each thread paints faces of its own.
    try:
        for done in by_threads(paint, range(0, total, _FACES_AT_ONCE), threads if on_cpu else 1):
            report(done, total)
    finally:
        torch.set_num_threads(threads)
    names = tuple(f"synthetic-{i:06d}" for i in range(options.identities))
    return Source(
        name="synthetic",
        faces=FaceSet(images, labels, names),
        synthetic=True,
        details=options.model_dump(),
    )


DATASET = Dataset(
    "rendered faces, embedded; for trying the suite and for CI", SyntheticOptions, make=load_synthetic, needs_root=False
)
