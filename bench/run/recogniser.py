"""What an existing recogniser is, and how well it tells apart people of the verification packs at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bench import plugins
from bench.errors import DataError, MissingError, UsageError
from bench.metrics.evaluator import brought_recogniser, describe, open_encoder, probe
from bench.metrics.verification import pair_scores
from bench.nets.encoder import PICTURE
from bench.nets.options import AS_READ, InputForm
from bench.progress import Report, no_report
from bench.randomness import Streams
from bench.recognition.embed import embed_faces
from bench.results import RecogniserInfo, Verification
from bench.run.protocols import find_packs, load_pack
from bench.run.verification import verification
from defenses.base import Defense


class RecogniserReport(BaseModel):
    """A recogniser, and how well it tells pairs of further packs apart, by their names."""

    model_config = ConfigDict(frozen=True)

    recogniser: RecogniserInfo
    defense: str = Field(description="what the pictures were sent through; none: plain faces")
    packs: dict[str, Verification] = Field({}, description="pairs told apart, image and mirror image together")
    notes: list[str] = Field([], description="what to know of these figures")


def report_on(
    source: Path,
    given: InputForm = AS_READ,
    *,
    defense: str = "none",
    defense_options: Mapping[str, Any] | None = None,
    data_root: Path | None = None,
    packs: Sequence[Path] = (),
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    task: Callable[[str], AbstractContextManager[Report]] | None = None,
) -> RecogniserReport:
    """Open a recogniser, and verify the pairs of packs behind a defence that draws nothing but states.

    Args:
        source: a file or the name of a plug-in.
        given: what its input is, where that does not say so.
        defense: whose representations it takes.
        defense_options: its options.
        data_root: a folder of packs, or a pack.
        packs: paths, or names in the data root; all of the folder by default.
        device: where to compute.
        batch_size: faces at a time.
        task: what shows progress under a title.

    Raises:
        MissingError: the recogniser or a pack is not there.
        DataError: one is damaged, or none; the recogniser fails.
        UsageError: ``given`` contradicts the file, the recogniser takes another shape than the defence sends, or a
            defence that has to be fitted, or whose clients have keys.
    """
    encoder = open_encoder(source, device, given, role="recogniser")
    mechanism = _defense(defense, defense_options or {}, max(encoder.input_size))
    notes, found, measured = list[str](), dict[str, Path](), dict[str, Verification]()
    if encoder.channels != PICTURE and defense == "none":
        notes.append(f"it takes {encoder.channels} channels: give the --defense that sends them to measure it")
    else:
        recogniser = brought_recogniser(encoder, mechanism.representation_shape, defense, "recogniser")
        found = _packs(data_root, packs)
        if not found:
            notes.append("no verification pack was at hand: point --data-root at a folder of .bin files")
    streams = Streams(0)
    for name, path in found.items():
        pack = load_pack(path, mechanism.image_size, lambda faces: np.zeros(len(faces), dtype=bool))
        notes += pack.notes
        if encoder.is_open and not measured:
            generator = streams.generator("recogniser/input")

            def sent(faces: Tensor, generator: torch.Generator = generator) -> Tensor:
                return mechanism.protect(faces, generator).representation

            probe(encoder, pack.faces, pack.faces, pack.pairs, role="recogniser", sent=sent)
            notes.append(f"its input range and colours are those that tell some people of {name} apart best")
        with nullcontext(no_report) if task is None else task(f"embed {name}") as report:
            embeddings = embed_faces(
                recogniser,
                mechanism,
                pack.faces,
                generators=streams.numbered(f"queries/{name}"),
                batch_size=batch_size,
                report=report,
            )
        scores = pair_scores(embeddings, pack.pairs)
        try:
            measured[name] = verification(scores, pack.pairs, pack.faces.labels)
        except DataError as error:
            raise DataError(f"pack {name}: {error}") from error
    told = RecogniserInfo(name=source.name, **describe(encoder))
    return RecogniserReport(recogniser=told, defense=defense, packs=measured, notes=notes)


def _defense(name: str, options: Mapping[str, Any], image_size: int) -> Defense:
    defense = plugins.make_defense(name, dict(options), "cpu", image_size)
    if defense.level == "template" or defense.trainable:
        raise UsageError(f"{name} is fitted to faces first: measure the recogniser behind it by bench run --recogniser")
    if defense.draw_keys(1, torch.Generator()) is not None:
        raise UsageError(f"clients of {name} have keys: measure the recogniser behind it by bench run --recogniser")
    return defense


def _packs(root: Path | None, asked: Sequence[Path]) -> dict[str, Path]:
    if root is not None and not root.exists():
        raise MissingError(f"{root} does not exist: point --data-root at a folder of verification packs")
    if not asked and root is not None:
        asked = sorted(root.glob("*.bin")) if root.is_dir() else [root]
    return find_packs(asked, "folder", root, {})
