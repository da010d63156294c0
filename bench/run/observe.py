"""What an attacker sees of a run's victims, in a file: for attacks that are run elsewhere.

The ``.npz`` holds arrays alone, no pickles. Of N victim images, numbered in the order of the probes:

* ``representations``, float32 (N, k, C, h, w), as intercepted k times each; ``states``, ``keys``, ``templates`` and
  ``enrolled`` as in :class:`attacks.base.Observation`, where the run's rung and attacks have them.

Of everything else what an attack of the run is handed:

* ``faces``, uint8 (M, 3, H, W), and ``identities``, int64 (M,): the public faces.
* ``about``, JSON: ``knowledge``, ``defense``, ``options``, ``image_size`` and, where the defence draws noise once for a
  batch, the size of these ``batches``.
* ``weights.NAME``: the defence's buffers and weights, secret included. Under a black box both they and the options are
  those of a guess.
* ``observed``: SHA-256 of all of these, to be named by what is submitted.

Neither the run's name nor its seed are there: from the seed everything that was drawn could be drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from torch import Tensor

from attacks.base import GRANTS, Adversary, Attack, Capability, FitReport, Knowledge
from bench.errors import DataError, UsageError
from bench.files import replacing, write_text
from bench.images import ssim, to_float
from bench.metrics.floors import grey
from bench.run.archive import Run, load_run, read_model
from bench.run.attacker import AttackStages
from bench.run.config import run_config
from bench.run.pipeline import Pipeline
from defenses.base import noise_is_shared

#: What names of attacks begin with that were run elsewhere.
SUBMITTED = "submitted:"

#: In a run's folder, the digests of what was exported of it.
_EXPORTS = "observed.json"

#: Largest difference of a figure between a run and today that is rounding.
ROUNDING = 1e-3


class Observed(BaseModel):
    """What was written.

    Attributes:
        file: the ``.npz`` file.
        arrays: name -> shape.
        knowledge: the rung that it is for.
        observed: the digest that a submission names.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    arrays: dict[str, tuple[int, ...]]
    knowledge: str
    observed: str


class Exports(BaseModel):
    """The digests of what was exported of a run."""

    model_config = ConfigDict(frozen=True)

    observed: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: Path) -> Exports:
        """Those of the run in the folder ``run``.

        Raises:
            MissingError: the list is damaged.
        """
        path = run / _EXPORTS
        return read_model(path, cls) if path.is_file() else cls()


class _Elsewhere(Attack):
    """Stands for an attack that is run elsewhere: it is shown something, and does nothing."""

    name = "elsewhere"

    def __init__(self, needs: frozenset[Capability]) -> None:
        super().__init__()
        self.needs = needs

    def build(self, adversary: Adversary) -> None:
        pass

    def fit(self, adversary: Adversary) -> FitReport:
        return FitReport()


def opened(directory: Path) -> tuple[Run, Pipeline, AttackStages]:
    """A finished run, and what it is made of, out of the cache beside it.

    Raises:
        UsageError: it is a submission, or has no attack that recovers faces.
        MissingError: it is no run, or data or weights that it was made of are not there.
        DataError: the run failed, or its data have changed since.
    """
    run = load_run(directory)
    if run.failed:
        raise DataError(f"{directory} has no figures ({run.result.error}): name a run that succeeded")
    if str(run.manifest.config.get("attack")).startswith(SUBMITTED):
        raise UsageError(f"{directory} is a submission itself: name the run that it was scored with")
    if run.result.worst_case is None and run.result.recovery is None:
        raise UsageError(f"{directory} has no attack that recovers faces, whose floors and ceiling could be taken")
    config = run_config(directory).model_copy(update={"out": directory.resolve().parent, "resume": True})
    pipeline = Pipeline(config, console=Console(stderr=True))
    attacks = pipeline.attack_stages()
    probes, floor = attacks.selection.attacked, run.rows("grey")
    if floor is not None:
        plain = to_float(attacks.stages.splits.victims.images[probes])
        now = ssim(grey(len(probes), config.image_size), plain).numpy()
        if floor["image"].tolist() != probes.tolist() or np.abs(floor["ssim"].to_numpy() - now).max() > ROUNDING:
            raise DataError(f"the victims of {directory} are others today: its data have changed, run it again")
    return run, pipeline, attacks


def observe(directory: Path, out: Path, *, templates: bool = False) -> Observed:
    """Write what an attacker sees of a finished run's victims, and what an attack of it is handed, to a file.

    Args:
        directory: the run's folder; the digest of what was written is kept there.
        out: the ``.npz`` file, replaced if it is there.
        templates: whether templates are stolen although no attack of the run steals them.

    Raises:
        UsageError: ``out`` is no ``.npz`` file; or as :func:`opened`.
        MissingError, DataError: as :func:`opened`.
    """
    if out.suffix != ".npz":
        raise UsageError(f"--out {out}: the file must end in .npz")
    _, pipeline, attacks = opened(directory)
    arrays = _exported(pipeline, attacks, templates=templates)
    digest = digest_of(arrays)
    with replacing(out) as temporary:
        np.savez(temporary, observed=np.array(digest), **arrays)  # type: ignore[arg-type]
    known = Exports.of(directory).observed
    write_text(directory / _EXPORTS, Exports(observed=tuple(dict.fromkeys((*known, digest)))).model_dump_json() + "\n")
    shapes = {name: array.shape for name, array in arrays.items()}
    return Observed(file=str(out), arrays=shapes, knowledge=pipeline.config.knowledge, observed=digest)


def _exported(pipeline: Pipeline, attacks: AttackStages, *, templates: bool) -> dict[str, NDArray[Any]]:
    config, stages = pipeline.config, attacks.stages
    defense = stages.defense(config.defense, config.defense_options)
    last = [configs[-1] for configs in pipeline.attack_configs.values()]
    needs = {Capability.KEY} & GRANTS[Knowledge(config.knowledge)]
    if templates or any(Capability.TEMPLATES in attack_config.make().needs for attack_config in last):
        needs |= {Capability.TEMPLATES}
    seen: dict[str, list[Tensor]] = {}
    elsewhere, probes = _Elsewhere(frozenset(needs)), attacks.selection.attacked
    for batch in attacks.observations(elsewhere, defense, probes, last[0].interceptions):
        for name in ("representations", "states", "keys", "templates", "enrolled"):
            if (part := getattr(batch.observation, name)) is not None:
                seen.setdefault(name, []).append(part.detach().cpu())
    public = attacks.public(last[0])
    known = attacks.mechanism(defense)(attacks.streams.generator("observe"))
    about: dict[str, Any] = {
        "knowledge": config.knowledge,
        "defense": defense.name,
        "options": known.options.model_dump(mode="json"),
        "image_size": config.image_size,
    }
    if noise_is_shared(defense):
        about["batches"] = config.batch_size
    return {
        **{name: torch.cat(parts).numpy() for name, parts in seen.items()},
        "faces": public.images.numpy(),
        "identities": public.labels.numpy(),
        "about": np.array(json.dumps(about)),
        **{f"weights.{name}": weights.cpu().numpy() for name, weights in known.state_dict().items()},
    }


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, types, shapes and values, in hexadecimal; whatever the file they stand in."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
