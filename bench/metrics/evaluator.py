"""The recogniser that only judges: it measures identity leakage and is never used by a defence or an attack."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import DataError, MissingError
from bench.images import to_float
from bench.nets.onnx import OnnxEncoder, resized


class Evaluator:
    """Maps faces to L2-normalised embeddings, the mirrored face's added before normalising, as protocols do.

    Args:
        network: float32 faces (n, 3, h, w) in [0, 1] to embeddings (n, D); moved to ``device``, set to evaluation mode.
        name: what results call it.
        input_size: (h, w) in pixels that the network takes; other faces are resized.
        device: where to compute.
        batch_size: faces per forward pass.
        sha256: digest of its file, if it comes from one.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        input_size: tuple[int, int],
        device: torch.device | str = "cpu",
        *,
        batch_size: int = 128,
        sha256: str | None = None,
    ) -> None:
        self.name, self.input_size, self.batch_size, self.sha256 = name, input_size, batch_size, sha256
        self._device = torch.device(device)
        self._network = network.to(self._device).eval()

    @classmethod
    def from_onnx(cls, path: Path, device: torch.device | str = "cpu", *, batch_size: int = 64) -> Self:
        """A face recogniser in an ONNX file (:class:`bench.nets.onnx.OnnxEncoder`).

        Raises:
            MissingError: there is no such file.
            DataError: it is no ONNX model, or one with other inputs or outputs.
        """
        if not path.is_file():
            raise MissingError(f"evaluator: {path} does not exist; give --evaluator or BENCH_EVALUATOR an ONNX file")
        try:
            network = OnnxEncoder(path, torch.device(device))
        except ValueError as error:
            raise DataError(f"evaluator: {error}") from error
        batch_size = network.batch_size or batch_size
        return cls(network, path.stem, network.input_size, device, batch_size=batch_size, sha256=network.sha256)

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
        embeddings = torch.cat([self._embed(batch) for batch in torch.split(faces, self.batch_size)])
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
            raise DataError(f"evaluator: {error}") from error
        return embeddings.to(batch.device, torch.float32)
