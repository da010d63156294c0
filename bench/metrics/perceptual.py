"""How alike two faces look: LPIPS (Zhang et al., CVPR 2018), version 0.1 on the AlexNet trunk.

The learned linear heads come with the ``lpips`` package; the trunk is torchvision's ImageNet AlexNet, which somebody
has to fetch. Nothing is downloaded here and a random trunk is never used: without the file there is no figure.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.errors import MissingError
from bench.metrics.image_quality import checked_faces

#: torchvision's file (``AlexNet_Weights.IMAGENET1K_V1``); the name carries the first digits of its SHA-256.
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET_FILE}"

#: Environment variable that names the trunk's file.
WEIGHTS_VARIABLE = "BENCH_LPIPS_WEIGHTS"

#: Below this the last pooling layer of AlexNet has nothing left to pool.
MIN_SIZE = 31


def find_alexnet() -> Path:
    """Where the trunk's file is: ``BENCH_LPIPS_WEIGHTS``, else torch's hub cache.

    Raises:
        MissingError: there is none; the message says how to get it.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    named = os.environ.get(WEIGHTS_VARIABLE)
    path = Path(named) if named else cached
    if path.is_file():
        return path
    missing = f"the file {path} does not exist" if named else "no AlexNet weights in the torch hub cache"
    raise MissingError(f"LPIPS: {missing}; download {ALEXNET_URL} to {cached} or set {WEIGHTS_VARIABLE} to its path")


class Lpips:
    """LPIPS v0.1 (AlexNet) as a function of two batches of faces.

    Args:
        path: the trunk's file (:func:`find_alexnet`).
        device: where to compute.
        expected_sha256: the first hexadecimal digits of the file's SHA-256, checked as torchvision does.

    Raises:
        MissingError: it is another file. The message can stand as the reason why a result has no LPIPS.
    """

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", *, expected_sha256: str = ALEXNET_SHA256
    ) -> None:
        # Read once: what is hashed is what is loaded, even if the file changes meanwhile.
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if not digest.startswith(expected_sha256):
            raise MissingError(
                f"LPIPS: {path} is not torchvision's AlexNet (SHA-256 {digest[:8]}..., expected {expected_sha256}...); "
                f"download {ALEXNET_URL} again"
            )
        self._device = torch.device(device)
        try:
            trunk = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            self._network = _network(trunk).to(self._device)
        except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, TypeError) as error:
            raise MissingError(f"LPIPS: {path} holds no AlexNet state dict; download {ALEXNET_URL} again") from error

    @torch.no_grad()
    def __call__(self, recovered: Tensor, original: Tensor, *, batch_size: int = 64) -> Tensor:
        """Perceptual distance of each pair, float32 (N,) on the metric's device; 0 for identical images.

        Faces, float (N, 3, H, W) in [0, 1], enter at their own size (64 px leaves AlexNet a 3x3 map in its last layers,
        112 px a 6x6 one), so values compare between recoveries of one size, not across sizes.

        Raises:
            DataError: other shapes, integer images, or a side below 31 pixels.
        """
        recovered, original = checked_faces(recovered, original, MIN_SIZE)
        if not len(recovered):
            return torch.empty(0, device=self._device)
        distances = [
            self._network(r.to(self._device, torch.float32), o.to(self._device, torch.float32), normalize=True)
            for r, o in zip(torch.split(recovered, batch_size), torch.split(original, batch_size), strict=True)
        ]
        return torch.cat(distances).reshape(-1)


def _network(trunk: dict[str, Tensor]) -> nn.Module:
    # The package would start from a download; instead the trunk is built untrained and every one of its weights is
    # replaced. Building it draws from the global generator, which is put back, and torchvision warns about the
    # package's old-style arguments, which nobody who runs the benchmark can change.
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        network: nn.Module = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    features = network.get_submodule("net")
    # ``slice2.3.weight`` of the package is ``features.3.weight`` of torchvision.
    features.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in features.state_dict()})
    return network.eval().requires_grad_(False)
