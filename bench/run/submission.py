"""Scores what somebody's own attack made of an exported observation, and keeps it as a run beside the run."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from attacks.base import Knowledge
from bench.data.decode import SUFFIXES, decode_image, read_image_file
from bench.errors import DataError, MissingError, UsageError
from bench.files import sha256
from bench.images import to_float
from bench.results import NO_BETTER, AttackInfo, RunResult
from bench.run.archive import Run
from bench.run.findings import Findings
from bench.run.observe import ROUNDING, SUBMITTED, Exports, opened
from bench.run.pictures import write_sheet
from bench.run.recovery import between, captions, floor_recoveries, link_recovered, make_scorer, over_floors
from bench.run.scorer import Scorer
from bench.run.store import RunStore

#: Names of submissions, which name folders, too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

#: How far values may lie outside [0, 1], as rounding takes them.
_SLACK = 1e-4


class Submission(NamedTuple):
    """What was submitted.

    Attributes:
        faces: float32 (V, 3, H, W) in [0, 1], in the order of the probes.
        sha256: of the file; of a folder, of what ``sha256sum`` prints of its pictures in the order of their numbers.
        observed: the digest of the export that it was made from; None where it names none.
    """

    faces: Tensor
    sha256: str
    observed: str | None


def read_submission(path: Path, count: int, size: int) -> Submission:
    """The recovered faces in an ``.npz`` file, or in a folder of pictures.

    A file holds ``faces``, uint8 or float in [0, 1], (N, 3, H, W) or (N, H, W, 3), and may hold ``observed``. A
    folder's pictures are ordered by the last number in their names, which are consecutive from 0 or 1; a file
    ``observed.txt`` may lie beside them.

    Args:
        path: the file or folder.
        count: how many faces there have to be.
        size: their height and width in pixels.

    Raises:
        UsageError: it is neither a folder nor an ``.npz`` file.
        MissingError: it is not there.
        DataError: it cannot be read, or holds not so many pictures, of another size, or values that are none.
    """
    if not path.exists():
        raise MissingError(f"--recovered {path} does not exist")
    if path.is_dir():
        faces, digest, observed = _read_folder(path, count, size)
    elif path.suffix == ".npz":
        # Room for some more faces in double precision: then their number is what is wrong.
        faces, digest, observed = _read_file(path, most=2**26 + 4 * count * 3 * size**2 * 8)
    else:
        raise UsageError(f"--recovered {path}: give a folder of pictures, or an .npz file")
    _check_count(path, len(faces), count)
    _check_size(path, faces, size)
    return Submission(faces, digest, observed)


def _check_count(path: Path, held: int, count: int) -> None:
    if held != count:
        raise DataError(f"{path} holds {held} faces, the run has {count} victims: one for each, in their order")


def _check_size(path: Path, faces: Tensor, size: int) -> None:
    height, width = faces.shape[-2:]
    if (height, width) != (size, size):
        raise DataError(f"the faces of {path} are {height} x {width}, the run's {size} x {size}: resize them yourself")


#: Bytes of a note that are read: a digest, and what somebody's editor adds.
_NOTE = 200


def _read_folder(folder: Path, count: int, size: int) -> tuple[Tensor, str, str | None]:
    numbered: dict[int, Path] = {}
    for path in sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise DataError(f"{path} has no number in its name: pictures are ordered by it")
        number = int(numbers[-1])
        if number in numbered:
            raise DataError(f"{numbered[number]} and {path} have one number, {number}")
        numbered[number] = path
    if not numbered:
        raise DataError(f"{folder} holds no pictures")
    gaps = (number for number in range(min(*numbered, 1), max(numbered)) if number not in numbered)
    if (gap := next(gaps, None)) is not None:
        raise DataError(f"{folder} has no picture {gap}: numbers run on from 0 or 1, without gaps")
    _check_count(folder, len(numbered), count)  # before so many are decoded
    faces, listed = [], hashlib.sha256()
    for _, path in sorted(numbered.items()):
        try:
            encoded = read_image_file(path)
            faces.append(decode_image(encoded))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        _check_size(path, faces[-1], size)
        listed.update(f"{hashlib.sha256(encoded).hexdigest()}  {path.name}\n".encode(errors="surrogateescape"))
    note, observed = folder / "observed.txt", None
    if note.is_file():
        with note.open("rb") as file:
            observed = file.read(_NOTE).decode("utf-8", "replace").strip()
    return to_float(torch.stack(faces)), listed.hexdigest(), observed


def _read_file(path: Path, most: int) -> tuple[Tensor, str, str | None]:
    """Its faces, digest, and the export that it names; of at most so many bytes, unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > most:
                raise DataError(f"{path} unpacks to {size} bytes, the faces of the run need no more than {most}")
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in ("faces", "observed") if name in file}
    except DataError:
        raise
    except Exception as error:  # a damaged archive or array surfaces as nearly any exception type
        raise DataError(f"{path} is no .npz file of plain arrays: {' '.join(str(error).split())[:200]}") from None
    if "faces" not in held:
        raise DataError(f"{path} holds no array 'faces'")
    observed = str(held["observed"]) if "observed" in held else None
    return _as_faces(path, held["faces"]), sha256(path), observed


def _as_faces(path: Path, array: NDArray[Any]) -> Tensor:
    """float32 (N, 3, H, W) in [0, 1]."""
    if array.ndim == 4 and array.shape[1] != 3 and array.shape[3] == 3:
        array = np.moveaxis(array, 3, 1)
    integers = array.dtype == np.uint8
    if array.ndim != 4 or array.shape[1] != 3 or not (integers or array.dtype.kind == "f"):
        raise DataError(
            f"the faces of {path} must be uint8 or float, (N, 3, H, W) or (N, H, W, 3), got {array.dtype} {array.shape}"
        )
    if integers:
        return to_float(torch.from_numpy(np.ascontiguousarray(array)))
    if not np.isfinite(array).all():
        wrong = int((~np.isfinite(array)).any(axis=(1, 2, 3)).sum())
        raise DataError(f"{wrong} of the {len(array)} faces of {path} hold values that are not finite")
    if array.size and not (array.min() >= -_SLACK and array.max() <= 1 + _SLACK):
        raise DataError(
            f"the faces of {path} hold values from {array.min():.4g} to {array.max():.4g}: floats lie in [0, 1], "
            "or give uint8"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).clamp(0, 1)


def score(recovered: Path, directory: Path, name: str | None = None) -> tuple[RunResult, Path]:
    """Score recovered faces that were made elsewhere as the run's own are, and keep that as a run beside it.

    Judges, floors and margins are those of the run; so is the ceiling, what its own attacks get out of unprotected
    faces, as nobody knows what this one would. Utility and speed of the defence are taken over. An earlier submission
    of this name with this run is replaced.

    Args:
        recovered: as :func:`read_submission`.
        directory: the run's folder.
        name: of the submission; without it, that of the file or folder.

    Returns:
        The result, and the folder it lies in.

    Raises:
        UsageError: the name cannot be one; or as :func:`read_submission` and :func:`bench.run.observe.opened`.
        MissingError: the run, or what was submitted, is not there.
        DataError: as :func:`read_submission`; it was made from another run; or the run's data or judges have changed.
    """
    name = recovered.resolve().stem if name is None else name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: letters, digits, dots, dashes and underscores name a submission, 64 at most"
        )
    run, pipeline, attacks = opened(directory)
    config, stages = pipeline.config, attacks.stages
    submission = read_submission(recovered, len(attacks.selection.attacked), config.image_size)
    if submission.observed is not None and submission.observed not in Exports.of(directory).observed:
        raise DataError(
            f"{recovered} was made from another run: bench observe has not exported {submission.observed[:16]}... of "
            f"{directory}"
        )
    defense = stages.defense(config.defense, config.defense_options)
    scorer = make_scorer(attacks)
    _check_judges(scorer, run)
    method = SUBMITTED + name
    with stages.timed("measure"):
        assessed = scorer.assess(submission.faces)
        floors = {floor: scorer.assess(faces) for floor, faces in floor_recoveries(attacks, defense).items()}
        over = over_floors(scorer, assessed, floors | {"others": scorer.strangers(submission.faces, assessed)})
        linkage = link_recovered(attacks, scorer, {method: assessed})[method]
    details = {"submitted": submission.sha256, "observed": submission.observed, "scored_with": run.result.run_id}
    info = AttackInfo(
        name=method,
        options={},
        knowledge=Knowledge(config.knowledge),
        saturated=None,
        states_covered=None,
        above_floor=over.above,
        floor_test=over,
        details=details,
    )
    whole = run.result.worst_case or run.result.recovery
    assert whole is not None and run.result.dataset is not None  # noqa: PT018
    warnings = [
        "submitted: the attack was run elsewhere, and what it recovered was scored here; the ceiling is the run's"
    ]
    if submission.observed is None:
        warnings.append("submitted: what it was made from is not named (observed): run and order were taken on trust")
    if over.above is False:
        warnings.append(f"{NO_BETTER} ({over.told()})")
    shown = pipeline.warnings(run.result.dataset, defense)

    interceptions = next(iter(pipeline.attack_configs.values()))[-1].interceptions
    own: dict[str, Any] = {"attack": method, "attack_options": {}, "budget": None, "queries": interceptions}
    device, precision = str(pipeline.machine.device), pipeline.machine.precision
    store = RunStore(config.model_copy(update=own))
    store.write_manifest("started", device, precision, submission=details)
    result = RunResult(
        run_id=store.run_id,
        status="success",
        warnings=[*warnings, *shown, *stages.splits.notes, *scorer.warnings],
        **Findings(several=False, evaluators=scorer.evaluators).judges,
        **{part: getattr(run.result, part) for part in ("defense", "teacher", "dataset", "utility", "template")},
        attack=info,
        recovery=between(assessed, floors, whole.ceiling),
        linkage=linkage,
        throughput={
            operation: speed
            for operation, speed in (run.result.throughput or {}).items()
            if operation.partition(" ")[0] not in ("recover", "link")
        },
        seconds={stage: round(seconds, 3) for stage, seconds in stages.seconds.items()},
        cached=list(dict.fromkeys(stages.cached)),
    )
    rows = [part.per_image.assign(method=label) for label, part in ({method: assessed} | floors).items()]
    if (ceiling := run.rows("ceiling")) is not None:
        rows.insert(1, ceiling)
    store.write_table("per_image", pd.concat(rows, ignore_index=True))
    leakage, pictures = assessed.values["ssim"], {"recovered": submission.faces}
    write_sheet(attacks, defense, pictures, captions(assessed), store, leakage=leakage)
    for checkpoint in (directory / "checkpoints").glob("*.safetensors"):
        if not checkpoint.name.startswith("attack"):
            store.keep_checkpoint(checkpoint, checkpoint.name)
    store.write_result(result)
    store.log("submitted", **details)
    store.write_manifest("success", device, precision, submission=details)
    return result, store.directory


def _check_judges(scorer: Scorer, run: Run) -> None:
    """Refuse to score with other judges than the run's.

    Raises:
        DataError: they are others, or not as good as they were.
    """
    then = {name: judge.accuracy.value for name, judge in run.result.judges.items()}
    now = {name: judge.accuracy.value for name, judge in scorer.evaluators.items()}
    if then.keys() != now.keys() or any(
        abs((then[name] or 0.0) - (accuracy or 0.0)) > ROUNDING for name, accuracy in now.items()
    ):
        raise DataError(f"the judges of {run.directory} are others today: data or software have changed, run it again")
