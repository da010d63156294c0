"""Published face recognisers in ONNX files, run by onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class OnnxEncoder(nn.Module):
    """A published face recogniser from an ONNX file: faces to embeddings, nothing to train.

    One input, RGB (N, 3, H, W) as (255 x - 127.5) / 128 of faces x in [0, 1], and one output (N, D): the form in which
    the field publishes them. Faces of another size are resized; free sizes mean 112 x 112. The weights stay in the
    file: what ``state_dict()`` carries is its digest, by which another file is found out.

    Args:
        path: the file.
        device: runs on CUDA where this says so and onnxruntime can, else on the processor, with as many threads as
            torch uses.

    Attributes:
        input_size: (H, W) that the network takes.
        batch_size: faces per run where the file fixes it, else None.
        embedding_size: D.
        digest: uint8 (32,) buffer, SHA-256 of the file.
        providers: the onnxruntime execution providers in use.

    Raises:
        ValueError: there is no such file, or it is no ONNX model of that form.
    """

    digest: Tensor

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"{path} does not exist: name the ONNX file of a face recogniser")
        content = path.read_bytes()
        self.path = path
        self._loaded = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        self.register_buffer("digest", self._loaded.clone())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle workers would spin between batches and take the cores from torch, which works in turns with them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors, which are raised as well
        wanted = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=wanted)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise ValueError(f"{path} is no ONNX model that onnxruntime can load") from error
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        # A size that is free has a name, or none.
        shapes = [[size if isinstance(size, int) else None for size in end.shape] for end in ends]
        if (
            [len(shape) for shape in shapes] != [4, 2]
            or shapes[0][1] not in (3, None)
            or ends[0].type != "tensor(float)"
        ):
            raise ValueError(
                f"{path} must map (N, 3, H, W) to embeddings (N, D) in float32, but has inputs and outputs "
                f"{[(end.type, shape) for end, shape in zip(ends, shapes, strict=True)]}"
            )
        self.batch_size, _, height, width = shapes[0]
        self.input_size = (height or 112, width or 112)
        self.embedding_size: int = shapes[1][1] or self(torch.zeros(1, 3, *self.input_size)).shape[1]

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return bytes(self._loaded.tolist()).hex()

    @torch.no_grad()
    def forward(self, faces: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces (N, 3, H, W) in [0, 1], on their device.

        Raises:
            ValueError: the digest that was loaded is that of another file, or the embeddings are not finite.
        """
        if not torch.equal(self.digest.cpu(), self._loaded):
            raise ValueError(f"{self.path} is not the file that was fitted with: fit again")
        pixels = resized(faces.float(), self.input_size)
        pixels = ((255 * pixels - 127.5) / 128).cpu()
        parts = []
        for chunk in pixels.split(self.batch_size or max(1, len(pixels))):
            missing = 0 if self.batch_size is None else self.batch_size - len(chunk)
            full = torch.cat((chunk, chunk[-1:].expand(missing, -1, -1, -1)))
            (embeddings,) = self._session.run(None, {self._session.get_inputs()[0].name: full.contiguous().numpy()})
            parts.append(torch.from_numpy(embeddings)[: len(chunk)])
        embedded = torch.cat(parts).to(faces.device, torch.float32)
        if not torch.isfinite(embedded).all():
            raise ValueError(f"{self.path} returned embeddings that are not finite")
        return embedded


def resized(faces: Tensor, size: tuple[int, int]) -> Tensor:
    """Float faces (N, 3, H, W) in [0, 1] at another size: bilinear, with anti-aliasing; clipped to [0, 1]."""
    if tuple(faces.shape[-2:]) == size:
        return faces
    return functional.interpolate(faces, size, mode="bilinear", antialias=True).clamp(0, 1)
