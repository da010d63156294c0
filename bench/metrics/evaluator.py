"""Recognisers that only judge: they measure identity leakage and are never used by a defence or an attack."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import DataError, MissingError


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
            batch = batch.to(torch.float32) / 255
        elif not batch.is_floating_point():
            raise DataError(f"{self.name} expects float faces in [0, 1] or uint8, got {batch.dtype}")
        batch = batch.detach().to(torch.float32)
        if tuple(batch.shape[-2:]) != self.input_size:
            batch = F.interpolate(batch, size=self.input_size, mode="bilinear", antialias=True, align_corners=False)
            batch = batch.clamp(0, 1)
        raw = self._forward(batch)
        if self.flip:
            raw = raw + self._forward(batch.flip(-1))
        if raw.ndim != 2 or len(raw) != len(batch):
            raise DataError(f"{self.name} returned {tuple(raw.shape)} for {len(batch)} faces, expected (N, D)")
        return raw.to(batch.device, torch.float32)


class OnnxEvaluator(Evaluator):
    """A face recogniser in an ONNX file, run by onnxruntime.

    The model has one input, float32 RGB (N, 3, H, W) with ``(255 x - 127.5) / 128`` of the faces (the field's usual
    pre-processing), and one output (N, D). A fixed batch dimension is respected, free spatial ones mean 112x112.

    Attributes:
        sha256: digest of the file, for the record.
        providers: the onnxruntime execution providers in use.
    """

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", *, flip: bool = True, batch_size: int = 64
    ) -> None:
        """
        Args:
            path: the ONNX file.
            device: run on CUDA where this says so and onnxruntime can, else on the processor, with as many threads as
                torch uses.
            flip: add the embedding of the mirrored face.
            batch_size: faces per run; a batch size fixed in the model goes first.

        Raises:
            MissingError: there is no such file.
            DataError: it is no ONNX model, or one with other inputs or outputs.
        """
        super().__init__(flip=flip, batch_size=batch_size)
        if not path.is_file():
            raise MissingError(f"evaluator: {path} does not exist; give --evaluator or BENCH_EVALUATOR an ONNX file")
        import onnxruntime as ort

        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = path.stem
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle workers would spin between batches and take the cores from torch, which works in turns with them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; they are raised as well
        wanted = ["CPUExecutionProvider"]
        if torch.device(device).type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        try:
            self._session = ort.InferenceSession(content, options, providers=wanted)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise DataError(f"evaluator: {path} is no ONNX model that onnxruntime can load") from error
        self.providers = tuple(self._session.get_providers())
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise DataError(
                f"evaluator: {path} must have one input and one output, has {len(inputs)} and {len(outputs)}"
            )
        shape = inputs[0].shape
        if inputs[0].type != "tensor(float)" or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            raise DataError(f"evaluator: the input of {path} must be float32 (N, 3, H, W), is {inputs[0].type} {shape}")
        if len(outputs[0].shape) != 2:
            raise DataError(f"evaluator: the output of {path} must be embeddings (N, D), is {outputs[0].shape}")
        batch, _, height, width = shape
        self.input_size = (height if isinstance(height, int) else 112, width if isinstance(width, int) else 112)
        self._fixed_batch = batch if isinstance(batch, int) else None
        if self._fixed_batch is not None:
            self.batch_size = self._fixed_batch
        self._input = inputs[0].name

    def _forward(self, faces: Tensor) -> Tensor:
        pixels = (faces * 255 - 127.5) / 128
        missing = 0 if self._fixed_batch is None else self._fixed_batch - len(pixels)
        if missing:  # the last batch of a model with a fixed batch size
            pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
        (embeddings,) = self._session.run(None, {self._input: pixels.cpu().contiguous().numpy()})
        return torch.from_numpy(embeddings)[: len(faces)].to(faces.device)

    def describe(self) -> dict[str, Any]:
        """What identifies it in a manifest, with the file's digest."""
        return super().describe() | {"sha256": self.sha256, "providers": list(self.providers)}


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
