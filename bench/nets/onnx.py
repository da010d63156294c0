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

    Attributes:
        embedding_size: D.
        digest: uint8 (32,) buffer, SHA-256 of the file.
    """

    digest: Tensor

    def __init__(self, path: Path, device: torch.device) -> None:
        """
        Args:
            path: the file.
            device: runs on CUDA where this says so and onnxruntime can, else on the processor.

        Raises:
            ValueError: there is no such file, or it is no ONNX model of that form.
        """
        super().__init__()
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"teacher {path} does not exist: name the ONNX file of a face recogniser")
        content = path.read_bytes()
        self.path = path
        self._loaded = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        self.register_buffer("digest", self._loaded.clone())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle workers would spin between batches and take the cores from torch, which works in turns with them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors, which are raised as well
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise ValueError(f"teacher {path} is no ONNX model that onnxruntime can load") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shapes = [list(one.shape) for one in (*inputs, *outputs)]
        if [len(shape) for shape in shapes] != [4, 2] or shapes[0][1] != 3 or not isinstance(shapes[1][1], int):
            raise ValueError(f"teacher {path} must map (N, 3, H, W) to (N, D), but has inputs and outputs {shapes}")
        self._input = inputs[0].name
        self._batch, _, height, width = (size if isinstance(size, int) else None for size in shapes[0])
        self._size = (height or 112, width or 112)
        self.embedding_size: int = shapes[1][1]

    @torch.no_grad()
    def forward(self, faces: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces (N, 3, H, W) in [0, 1], on their device.

        Raises:
            ValueError: the digest that was loaded is that of another file, or the embeddings are not finite.
        """
        if not torch.equal(self.digest.cpu(), self._loaded):
            raise ValueError(f"teacher {self.path} is not the file that the attack was fitted with: fit it again")
        pixels = faces.float()
        if pixels.shape[-2:] != self._size:
            pixels = functional.interpolate(pixels, self._size, mode="bilinear", antialias=True).clamp(0, 1)
        pixels = ((255 * pixels - 127.5) / 128).cpu()
        parts = []
        for chunk in pixels.split(self._batch or max(1, len(pixels))):
            missing = 0 if self._batch is None else self._batch - len(chunk)
            full = torch.cat((chunk, chunk[-1:].expand(missing, -1, -1, -1)))
            (embeddings,) = self._session.run(None, {self._input: full.contiguous().numpy()})
            parts.append(torch.from_numpy(embeddings)[: len(chunk)])
        found = torch.cat(parts).to(faces.device, torch.float32)
        if not torch.isfinite(found).all():
            raise ValueError(f"teacher {self.path} returned embeddings that are not finite")
        return found
