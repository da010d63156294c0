"""The recogniser that only judges: it measures identity leakage and is never used by a defence or an attack.

A provider's teacher, another recogniser of plain faces, is run in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import plugins
from bench.data.faces import FaceSet, PairProtocol
from bench.errors import DataError, MissingError, UsageError
from bench.images import to_float
from bench.memory import in_halves
from bench.nets.brought import digest_of, is_plugin, open_recogniser
from bench.nets.encoder import PICTURE, BroughtRecogniser, FaceEncoder, resized
from bench.nets.onnx import files_of
from bench.nets.options import AS_READ, InputForm

#: People, and pairs of either kind, that the form of a judge's input is found on.
PROBED = 96
#: Fewer people with two faces tell too little.
_FEWEST = 10


class Evaluator:
    """Maps faces to L2-normalised embeddings, the mirrored face's added before normalising, as protocols do.

    Args:
        network: float32 faces (n, 3, h, w) in [0, 1] to embeddings (n, D); moved to ``device``, set to evaluation mode.
        name: what results call it.
        input_size: (h, w) in pixels that the network takes; other faces are resized.
        device: where to compute.
        batch_size: faces per forward pass.
        role: ``evaluator`` or ``teacher``, named where something is wrong.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        input_size: tuple[int, int],
        device: torch.device | str = "cpu",
        *,
        batch_size: int = 128,
        role: str = "evaluator",
    ) -> None:
        self.name, self.input_size, self.batch_size, self.role = name, input_size, batch_size, role
        self._device = torch.device(device)
        self._network = network.to(self._device).eval()

    @classmethod
    def from_file(
        cls, path: Path, device: torch.device | str = "cpu", *, batch_size: int = 64, role: str = "evaluator"
    ) -> Self:
        """A recogniser of plain faces in a file (:func:`bench.nets.brought.open_recogniser`), tried on a face.

        Raises:
            MissingError: there is no such file, or one is not there in which it keeps its weights.
            DataError: it is no recogniser of plain faces, damaged, or it fails on a face.
        """
        return cls.of(open_encoder(path, device, role=role, pictures=True), device, batch_size=batch_size, role=role)

    @classmethod
    def of(
        cls, encoder: FaceEncoder, device: torch.device | str, *, batch_size: int = 64, role: str = "evaluator"
    ) -> Self:
        """The judge that an encoder of plain faces makes."""
        size = encoder.batch_size or batch_size
        return cls(encoder, encoder.path.stem, encoder.input_size, device, batch_size=size, role=role)

    @property
    def form(self) -> Tensor:
        """What the network is fed, int64 (2,), as :class:`bench.nets.encoder.FaceEncoder` keeps it; to be stored."""
        return self._network.form.cpu() if isinstance(self._network, FaceEncoder) else torch.zeros(2, dtype=torch.int64)

    @form.setter
    def form(self, form: Tensor) -> None:
        if isinstance(self._network, FaceEncoder):
            self._network.form.copy_(form)

    def describe(self) -> dict[str, Any]:
        """Its file and what it is fed, by the names of :class:`bench.results.EvaluatorInfo`."""
        network, fed = self._network, {"name": self.name, "input_size": self.input_size}
        if not isinstance(network, FaceEncoder):
            return {**fed, "sha256": None, "layout": "NCHW", "input_range": "0..1", "colours": "RGB"}
        return {**fed, **told_of(network)}

    def probe(self, faces: FaceSet, victims: FaceSet | None = None, pairs: PairProtocol | None = None) -> None:
        """Find out what the network is fed, if it comes from a file: :func:`probe`."""
        if isinstance(self._network, FaceEncoder):
            probe(self._network, faces, victims, pairs, role=self.role)

    @torch.no_grad()
    def embed(self, faces: Tensor) -> Tensor:
        """Embeddings, float32 (N, D) of unit length, on the device of ``faces``.

        Args:
            faces: float (N, 3, H, W) in [0, 1], or uint8 in [0, 255]; of any size (bilinear, anti-aliased resize).

        Raises:
            DataError: no faces, another shape or type, or the network's values are not finite or of another shape.
        """
        if faces.ndim != 4 or faces.shape[1] != 3 or not len(faces):
            raise DataError(f"{self.name} expects faces (N, 3, H, W), N > 0, got {tuple(faces.shape)}")
        if faces.dtype != torch.uint8 and not faces.is_floating_point():
            raise DataError(f"{self.name} expects float faces in [0, 1] or uint8, got {faces.dtype}")
        parts = in_halves(lambda rows: self._embed(faces[rows]), len(faces), self.batch_size, f"judging by {self.name}")
        embeddings = torch.cat(list(parts))
        if embeddings.ndim != 2 or len(embeddings) != len(faces):
            raise DataError(f"{self.name} returned {tuple(embeddings.shape)} for {len(faces)} faces, expected (N, D)")
        if not torch.isfinite(embeddings).all():
            raise DataError(f"{self.name} returned embeddings that are not finite")
        return F.normalize(embeddings, dim=1)

    def _embed(self, batch: Tensor) -> Tensor:
        batch = to_float(batch) if batch.dtype == torch.uint8 else batch.to(torch.float32)
        pixels = resized(batch, self.input_size).to(self._device)
        try:
            embeddings: Tensor = self._network(pixels) + self._network(pixels.flip(-1))
        except ValueError as error:
            raise DataError(f"{self.role}: {error}") from error
        return embeddings.to(batch.device, torch.float32)


def told_of(encoder: FaceEncoder) -> dict[str, Any]:
    """What results say of what an encoder is fed, by the names of :class:`bench.results.EvaluatorInfo`."""
    told = ("sha256", "layout", "input_range", "colours", "normalisation")
    files = [file.name for file in encoder.files]
    return {**{name: getattr(encoder, name) for name in told}, "files": files, "batch": encoder.batch_size}


def describe(encoder: FaceEncoder) -> dict[str, Any]:
    """All that is known of an encoder, by the names of :class:`bench.results.RecogniserInfo`.

    What is no picture has no range and no colours: it is fed as it is sent.
    """
    told = ("format", "architecture", "values", "channels", "input_size", "embedding_size")
    unknown = {} if encoder.channels == PICTURE else {"input_range": None, "colours": None}
    return {**{name: getattr(encoder, name) for name in told}, **told_of(encoder), **unknown}


def probe(
    encoder: FaceEncoder,
    faces: FaceSet,
    victims: FaceSet | None = None,
    pairs: PairProtocol | None = None,
    *,
    role: str,
    sent: Callable[[Tensor], Tensor] = lambda faces: faces,
) -> None:
    """Find out what a network is fed of pictures (:meth:`bench.nets.encoder.FaceEncoder.probe`).

    It is tried on plain ``faces``, or what is ``sent`` of them, of a judge those of people whom the attacker has; where
    too few of these have two, on some of the victims' own plain pairs, on which a judge is tried anyhow. Without such
    pairs what is usual stays.

    Raises:
        DataError: the network fails.
    """
    if not encoder.is_open:
        return
    first, second, same = _people_twice(faces)
    if int(same.sum()) < _FEWEST:
        if victims is None or pairs is None:
            return
        some = torch.cat([_spread((pairs.same == kind).nonzero().squeeze(1)) for kind in (True, False)])
        faces, first, second, same = victims, pairs.first[some], pairs.second[some], pairs.same[some]
    used, index = torch.unique(torch.stack((first, second)), return_inverse=True)
    images = sent(to_float(faces.images[used].to(encoder.form.device)))
    try:
        encoder.probe(images, index, same)
    except ValueError as error:
        raise DataError(f"{role}: {error}") from error


def open_encoder(
    path: Path,
    device: torch.device | str = "cpu",
    given: InputForm = AS_READ,
    *,
    role: str,
    pictures: bool = False,
) -> FaceEncoder:
    """The recogniser in a file, or of the plug-in of that name (:func:`bench.nets.brought.open_recogniser`).

    Raises:
        MissingError: there is no such file, or one is not there in which it keeps its weights.
        DataError: it is no recogniser, damaged, or it fails on a face.
        UsageError: ``given`` contradicts it.
    """
    _check_files(path, role)
    try:
        return open_recogniser(path, device, given, pictures=pictures)
    except ValueError as error:
        raise DataError(f"{role}: {error}") from error


def brought_recogniser(encoder: FaceEncoder, shape: tuple[int, int, int], sender: str, role: str) -> BroughtRecogniser:
    """A recogniser that was brought along, behind the ``sender`` of representations of ``shape``.

    Raises:
        UsageError: it takes another shape.
    """
    try:
        return BroughtRecogniser(encoder, shape)
    except ValueError as error:
        raise UsageError(
            f"--{role.replace('_', '-')}: {error} by {sender}: give a recogniser that was trained behind it, or leave "
            "it out so that one is trained"
        ) from error


def check_evaluators(paths: Sequence[Path]) -> None:
    """Try each file on a face.

    Raises:
        MissingError, DataError: as :func:`open_encoder`.
        UsageError: two of them are the same network, byte for byte.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        digest = _tried(path, "evaluator")
        if (twin := seen.setdefault(digest, path)) is not path:
            raise UsageError(f"--evaluator: {twin} and {path} are one file: each judge counts once")


def check_no_judge(path: Path, evaluators: Sequence[Path], role: str) -> None:
    """Refuse a provider's ``teacher``, or its ``recogniser``, that is also a judge.

    Raises:
        MissingError, DataError: as :func:`open_encoder`.
        UsageError: it is one of the ``evaluators``, byte for byte.
    """
    _check_files(path, role)
    digest = _tried(path, role) if role == "teacher" else digest_of(path)
    for evaluator in evaluators:
        if digest_of(evaluator) == digest:
            is_it = "one that the provider's was trained by" if role == "teacher" else "the provider's own"
            raise UsageError(
                f"--{role} {path} and --evaluator {evaluator} are one file: the recogniser that judges leakage may "
                f"not be {is_it}; give --{role}, or --evaluator, another"
            )


def _tried(path: Path, role: str) -> str:
    """Try a recogniser of plain faces; its digest."""
    _check_files(path, role)
    digest = digest_of(path)
    _opened(path, digest, role)
    return digest


@functools.cache
def _opened(path: Path, digest: str, role: str) -> None:
    """Open the file of this digest, once in a process: a sweep asks for every cell."""
    Evaluator.from_file(path, role=role)


def _check_files(path: Path, role: str) -> None:
    if is_plugin(path):
        return
    if not path.is_file():
        flag, names = role.replace("_", "-"), ", ".join(plugins.recognisers())
        raise MissingError(
            f"{role}: {path} does not exist; give --{flag} or BENCH_{role.upper()} a recogniser's file"
            f"{f', or one of {names}' if names else ''}"
        )
    try:
        files_of(path)
    except ValueError as error:
        raise MissingError(f"{role}: {error}") from error


def judge_names(paths: Sequence[Path]) -> list[str]:
    """What results call the judges in these files: the files' names, with the folder where two have one name.

    Dots, which separate the parts of a place in a result, become dashes.
    """
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}-{path.stem}" for path in paths]
    names = [name.replace(".", "-").replace("@", "-") for name in names]
    return names if len(set(names)) == len(names) else [f"{name}-{n}" for n, name in enumerate(names, start=1)]


def _people_twice(faces: FaceSet) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (first, second, same) of the first and the last face of some people, each with each; copies are no pair."""
    order = faces.labels.argsort(stable=True)
    people, counts = torch.unique_consecutive(faces.labels[order], return_counts=True)
    ends = counts.cumsum(0)
    first, last = order[ends - counts], order[ends - 1]
    chosen = _spread((counts > 1).nonzero().squeeze(1)) if len(people) else counts
    first, last = first[chosen], last[chosen]
    different = (faces.images[first] != faces.images[last]).flatten(1).any(1)
    first, last = first[different], last[different]
    count = len(first)
    return first.repeat_interleave(count), last.repeat(count), torch.eye(count, dtype=torch.bool).flatten()


def _spread(index: Tensor) -> Tensor:
    """At most :data:`PROBED` of these, from all over."""
    return index[torch.linspace(0, len(index) - 1, min(PROBED, len(index))).round().long()]
