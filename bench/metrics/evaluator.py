"""Recognisers that only judge: they measure identity leakage and are never used by a defence or an attack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import DataError, MissingError
from bench.images import to_float
from bench.nets.onnx import OnnxEncoder, resized


class Evaluator(ABC):
    """Maps faces to L2-normalised embeddings.

    Attributes:
        name: what results call it.
        input_size: height and width in pixels that the network takes; other faces are resized.
        flip: whether the embedding of the mirrored face is added before normalisation, as verification protocols do.
        batch_size: faces per forward pass.
    """

    name: str
    input_size: tuple[int, int]

    def __init__(self, *, flip: bool = True, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        self.flip = flip
        self.batch_size = batch_size

    @abstractmethod
    def _forward(self, faces: Tensor) -> Tensor:
        """Raw embeddings (n, D) of at most ``batch_size`` float32 faces (n, 3, *input_size) in [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """What identifies it in a manifest."""
        return {"name": self.name, "input_size": list(self.input_size), "flip": self.flip}

    def embed(self, faces: Tensor) -> Tensor:
        """Embeddings of faces.

        Args:
            faces: float (N, 3, H, W) in [0, 1], or uint8 in [0, 255]; any size (bilinear, anti-aliased resize) and
                device.

        Returns:
            float32 (N, D), each of unit length, on the device of ``faces``.

        Raises:
            DataError: another shape or type, or the network returned values that are not finite or of another shape.
        """
        if faces.ndim != 4 or faces.shape[1] != 3:
            raise DataError(f"{self.name} expects faces (N, 3, H, W), got {tuple(faces.shape)}")
        if not len(faces):
            raise DataError(f"{self.name} got no faces to embed")
        embeddings = torch.cat([self._embed_batch(batch) for batch in torch.split(faces, self.batch_size)])
        if not torch.isfinite(embeddings).all():
            raise DataError(f"{self.name} returned embeddings that are not finite")
        return F.normalize(embeddings, dim=1)

    def _embed_batch(self, batch: Tensor) -> Tensor:
        if batch.dtype == torch.uint8:
            batch = to_float(batch)
        elif not batch.is_floating_point():
            raise DataError(f"{self.name} expects float faces in [0, 1] or uint8, got {batch.dtype}")
        batch = resized(batch.detach().to(torch.float32), self.input_size)
        raw = self._forward(batch)
        if self.flip:
            raw = raw + self._forward(batch.flip(-1))
        if raw.ndim != 2 or len(raw) != len(batch):
            raise DataError(f"{self.name} returned {tuple(raw.shape)} for {len(batch)} faces, expected (N, D)")
        return raw.to(batch.device, torch.float32)


class OnnxEvaluator(Evaluator):
    """A face recogniser in an ONNX file (:class:`bench.nets.onnx.OnnxEncoder`)."""

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", *, flip: bool = True, batch_size: int = 64
    ) -> None:
        """
        Args:
            path: the ONNX file.
            device: run on CUDA where this says so and onnxruntime can, else on the processor.
            flip: add the embedding of the mirrored face.
            batch_size: faces per run; a batch size fixed in the model goes first.

        Raises:
            MissingError: there is no such file.
            DataError: it is no ONNX model, or one with other inputs or outputs.
        """
        super().__init__(flip=flip, batch_size=batch_size)
        if not path.is_file():
            raise MissingError(f"evaluator: {path} does not exist; give --evaluator or BENCH_EVALUATOR an ONNX file")
        try:
            self.network = OnnxEncoder(path, torch.device(device))
        except ValueError as error:
            raise DataError(f"evaluator: {error}") from error
        self.name = path.stem
        self.input_size = self.network.input_size
        self.batch_size = self.network.batch_size or batch_size

    def _forward(self, faces: Tensor) -> Tensor:
        try:
            embeddings: Tensor = self.network(faces)
        except ValueError as error:
            raise DataError(f"evaluator: {error}") from error
        return embeddings

    def describe(self) -> dict[str, Any]:
        """What identifies it in a manifest, with the file's digest."""
        return super().describe() | {"sha256": self.network.sha256, "providers": list(self.network.providers)}


class RecogniserEvaluator(Evaluator):
    """A second recogniser of the suite's own, trained with another seed and architecture on other identities."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        input_size: tuple[int, int],
        device: torch.device | str = "cpu",
        *,
        flip: bool = True,
        batch_size: int = 128,
    ) -> None:
        """
        Args:
            network: faces float32 (N, 3, H, W) in [0, 1] to embeddings (N, D); moved to ``device``, set to evaluation
                mode.
            name: what results call it.
            input_size: height and width that it was trained on.
            device: where to compute.
            flip: add the embedding of the mirrored face.
            batch_size: faces per forward pass.
        """
        super().__init__(flip=flip, batch_size=batch_size)
        self.name = name
        self.input_size = input_size
        self._device = torch.device(device)
        self._network = network.to(self._device).eval()

    @torch.no_grad()
    def _forward(self, faces: Tensor) -> Tensor:
        embeddings: Tensor = self._network(faces.to(self._device))
        return embeddings
