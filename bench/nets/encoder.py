"""An existing face recogniser, whatever runs it: what its input is, by its file, by who brings it, or by trial."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import UsageError
from bench.images import to_float
from bench.nets.options import COLOURS, RANGES, InputForm
from bench.nets.recogniser import Recogniser, RecogniserSpec

#: A network that leaves its sizes open gets faces of so many pixels, those of the field's template.
SIDE = 112
#: Channels of a picture. What has others is fed what a defence sends, as it is sent.
PICTURE = 3

#: Another input range or order of colours must separate faces better than what is usual by this factor.
_MARGIN = 1.02
#: How far embeddings of one face alone and beside another may differ, of the largest value.
_ALIKE = 1e-3
#: Values that a run may be fed: 2048 x 2048 pixels twice over, or 800 faces of 112 x 112.
_MOST_VALUES = 2**25


@dataclass(frozen=True, slots=True)
class Told:
    """What a file says of its network's input; None of what it says nothing of.

    Attributes:
        layout: NCHW or NHWC.
        channels: C.
        size: height and width in pixels.
        batch: faces that it takes at once.
        range: what it is fed, one of :data:`bench.nets.options.RANGES`.
        colours: RGB or BGR.
        suiting: the ranges that the operations at its entry suit.
        usual: the range that networks of its kind are fed.
        normalisation: the operations at its entry that scale the input, in words.
    """

    layout: str | None = None
    channels: int | None = None
    size: tuple[int | None, int | None] = (None, None)
    batch: int | None = None
    range: str | None = None
    colours: str | None = None
    suiting: tuple[str, ...] = tuple(RANGES)
    usual: str | None = None
    normalisation: str = ""


class FaceEncoder(nn.Module):
    """An existing network from faces, or from what a defence sends of them, to embeddings; nothing to train.

    Pictures of another size are resized; free sizes mean 112 x 112. What the values of a picture are, :data:`RANGES`
    and :data:`COLOURS`, is what the file says or ``given`` does; else what is usual in the field, until :meth:`probe`
    has tried all on faces of known people. Representations that are no pictures, of other than three channels, are fed
    as they are sent. A network is tried on a face, and on two at once, when it is opened: one that cannot take several
    gets them one by one. The weights stay in the file: its digest, by which another file is found out, and the form of
    the input are what ``state_dict()`` carries of it.

    Args:
        path: the file, or the name of what stands for one.
        files: those that hold its weights, and it.
        digest: SHA-256 of all their bytes, in hexadecimal.

    Attributes:
        architecture: the network's name; empty where the file does not tell it.
        values: how many the network has learnt; None where the file does not tell it.
        layout: ``NCHW`` or ``NHWC``.
        channels: C of its input.
        input_size: (H, W) that the network takes.
        batch_size: faces per run where the file, the network or who brings it fixes it, else None.
        normalisation: the operations at the entry of the graph that scale its input, in words; empty if there are none.
        embedding_size: D.
        digest: uint8 (32,) buffer.
        form: int64 (2,) buffer, the input range and the order of colours as places in their lists.
    """

    #: What kind of file it comes from.
    format: ClassVar[str]

    digest: Tensor
    form: Tensor

    def __init__(self, path: Path, files: tuple[Path, ...], digest: str) -> None:
        super().__init__()
        self.path, self.files = path, files
        self._loaded = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        self.register_buffer("digest", self._loaded.clone())
        self.register_buffer("form", torch.zeros(2, dtype=torch.int64))
        self.architecture = ""
        self.values: int | None = None

    def take(self, told: Told, given: InputForm) -> None:
        """Settle what the input is by the file and by who brings it, and try it on a face.

        Raises:
            UsageError: they contradict each other.
            ValueError: the network fails.
        """
        (high, wide), asked = told.size, given.size or (None, None)
        self.layout = self._settled("layout", told.layout, given.layout, "NCHW")
        self.channels = told.channels or PICTURE
        self.input_size: tuple[int, int] = (
            self._settled("size", high, asked[0], SIDE),
            self._settled("size", wide, asked[1], SIDE),
        )
        self.batch_size: int | None = self._settled("batch", told.batch, given.batch, None)
        if (values := self.channels * math.prod(self.input_size) * (self.batch_size or 1)) > _MOST_VALUES:
            raise ValueError(f"{self.path} asks for {values:.3g} values a run: no face recogniser takes more than 3e7")
        self.normalisation = told.normalisation
        ranges, colours = list(told.suiting), list(COLOURS)
        if self.channels != PICTURE:
            if given.range is not None or given.colours is not None:
                raise UsageError(
                    f"{self.path} takes {self.channels} channels, as a defence sends them, and no pictures: leave out "
                    "the range and the colours of its input"
                )
            ranges, colours = ["0..1"], colours[:1]
        elif given.range is not None and given.range not in ranges:
            raise UsageError(
                f"{self.path} normalises its input itself ({told.normalisation}) for {' or '.join(ranges)} and not for "
                f"{given.range}: leave out the range of its input"
            )
        else:
            ranges = [span] if (span := given.range or told.range) else ranges
            ranges.sort(key=lambda name: (name != told.usual, list(RANGES).index(name)))
            colours = [order] if (order := given.colours or told.colours) else colours
        self._ranges = [list(RANGES).index(name) for name in ranges]
        self._colours = [COLOURS.index(name) for name in colours]
        self.form = torch.tensor([self._ranges[0], self._colours[0]], device=self.form.device)
        self.embedding_size = self._try()

    def _settled(self, what: str, told: Any, asked: Any, usual: Any) -> Any:
        if told is not None and asked is not None and told != asked:
            raise UsageError(
                f"{self.path} says that the {what} of its input is {told}, and {asked} was asked for: leave it out"
            )
        return next((value for value in (told, asked) if value is not None), usual)

    @property
    def sha256(self) -> str:
        """The digest of its files."""
        return bytes(self._loaded.tolist()).hex()

    @property
    def input_range(self) -> str:
        """What the network is fed, one of :data:`RANGES`."""
        return list(RANGES)[int(self.form[0])]

    @property
    def colours(self) -> str:
        """The order of its channels, one of :data:`COLOURS`."""
        return COLOURS[int(self.form[1])]

    @property
    def is_open(self) -> bool:
        """Whether it is still to be found out what the network is fed."""
        return len(self._ranges) * len(self._colours) > 1

    def feed(self, form: Tensor) -> None:
        """Settle what the network is fed, as :attr:`form` of it was found before.

        Raises:
            ValueError: its file, or who brings it, says otherwise.
        """
        if form.tolist() not in [[*each] for each in itertools.product(self._ranges, self._colours)]:
            raise ValueError(f"{self.path} is not fed in this form")
        self.form = form.to(self.form)

    def _try(self) -> int:
        """Embed a face, and two; those of a network that fails on two, or mixes them up, are run one by one.

        Returns:
            The size of the embeddings.
        """
        side = torch.linspace(0, 1, self.input_size[0])[:, None], torch.linspace(1, 0.2, self.input_size[1])
        picture = (side[0] * side[1]).expand(1, self.channels, -1, -1)
        faces = torch.cat((picture, 1 - picture.flip(2))).to(self.form.device)
        with torch.no_grad():
            alone = torch.cat([self(face[None]) for face in faces])
            if self.batch_size is None:
                try:
                    together = self(faces)
                except ValueError:
                    together = None
                if together is None or (together - alone).abs().max() > _ALIKE * alone.abs().max():
                    self.batch_size = 1
        return alone.shape[1]

    def forward(self, faces: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces (N, 3, H, W) in [0, 1], on their device.

        Of another number of channels: of representations (N, C, H, W) of its size.

        Raises:
            ValueError: the digest that was loaded is that of another file, the network fails, or the embeddings are not
                finite; representations of another shape.
        """
        if not torch.equal(self.digest.cpu(), self._loaded):
            raise ValueError(f"{self.path} is not the file that was fitted with: fit again")
        pixels = self.fed(faces)
        size = self.batch_size or max(1, len(pixels))
        parts = []
        for chunk in pixels.split(size):
            missing = 0 if self.batch_size is None else size - len(chunk)
            whole = torch.cat((chunk, chunk[-1:].expand(missing, *chunk.shape[1:]))) if missing else chunk
            parts.append(self._checked(whole)[: len(chunk)])
        embedded = torch.cat(parts).to(faces.device, torch.float32)
        if not torch.isfinite(embedded).all():
            raise ValueError(f"{self.path} returned embeddings that are not finite")
        return embedded

    def fed(self, faces: Tensor) -> Tensor:
        """What the network is fed of faces, or of representations, in its own layout.

        Raises:
            ValueError: representations of another shape.
        """
        if self.channels != PICTURE:
            expected = (self.channels, *self.input_size)
            if tuple(faces.shape[1:]) != expected:
                raise ValueError(f"{self.path} takes (N, {', '.join(map(str, expected))}), got {tuple(faces.shape)}")
            pixels = faces.float()
        else:
            scale, shift = RANGES[self.input_range]
            pixels = scale * resized(faces.float(), self.input_size) + shift
            pixels = pixels.flip(1) if self.colours == "BGR" else pixels
        return pixels if self.layout == "NCHW" else pixels.movedim(1, 3)

    def maps(self, faces: Tensor) -> Tensor:
        """The embeddings as maps of one place, (N, D, 1, 1), unless the network tells of its last feature map."""
        embeddings: Tensor = self(faces)
        return embeddings[..., None, None]

    @abstractmethod
    def run(self, pixels: Tensor) -> Tensor:
        """What the network makes of pixels in its layout; whatever it raises is reported as its failure."""

    def _checked(self, pixels: Tensor) -> Tensor:
        what = f"{self.path} fails on {len(pixels)} face(s) as {tuple(pixels.shape)} ({self.layout})"
        try:
            embeddings = self.run(pixels)
        except Exception as error:  # neither onnxruntime's nor other people's exceptions share a base class
            raise ValueError(f"{what}{self.explained(error)}") from error
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(pixels):
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"{what}: it returns {got}, expected ({len(pixels)}, D)")
        return embeddings

    def explained(self, error: Exception) -> str:
        """Why the network failed, in a few words."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (
            f": it is no recogniser of these, or a broken export ({lines[-1][:160] if lines else type(error).__name__})"
        )

    def probe(self, faces: Tensor, pairs: Tensor, same: Tensor) -> None:
        """Find the input range and the order of colours under which faces of different people are farthest apart.

        The measure is :func:`separation`. All ranges that neither the file nor who brings it rules out are tried, then
        the other order of colours, and where that is better the ranges again. What is usual stays unless another is
        clearly better.

        Args:
            faces: uint8 or float in [0, 1], (N, 3, H, W).
            pairs: int64 (2, P), which of them a pair shows.
            same: bool (P,), whether that is one person; both kinds must be there.
        """
        if not self.is_open:
            return
        faces = to_float(faces) if faces.dtype == torch.uint8 else faces

        @torch.no_grad()
        def found(form: tuple[int, int]) -> float:
            self.form.copy_(torch.tensor(form))
            try:
                embeddings = functional.normalize(torch.cat([self(batch) for batch in faces.split(64)]), dim=1)
            except ValueError:  # far out of its range a network may overflow
                return -math.inf
            return separation((embeddings[pairs[0]] * embeddings[pairs[1]]).sum(1), same)

        values: dict[tuple[int, int], float] = {}

        def best(forms: Iterable[tuple[int, int]]) -> tuple[int, int]:
            values.update([(form, found(form)) for form in forms if form not in values])
            most = max(values.values())
            good = [form for form, value in values.items() if value == most or _MARGIN * value >= most]
            return min(good, key=lambda form: (self._ranges.index(form[0]), self._colours.index(form[1])))

        span, colours = best((number, self._colours[0]) for number in self._ranges)
        if len(self._colours) > 1:
            span, colours = best([(span, self._colours[1])])
        # Under the wrong order of colours the ranges may have been hard to tell apart.
        self.form.copy_(torch.tensor(best((number, colours) for number in self._ranges)))


class BroughtRecogniser(Recogniser):
    """A recogniser that was brought along, as the provider's: a :class:`FaceEncoder`.

    It takes representations of ``shape`` (C, h, w): plain faces, or what a defence sends.

    Raises:
        ValueError: the network takes another shape; pictures alone are resized.
    """

    def __init__(self, encoder: FaceEncoder, shape: tuple[int, int, int]) -> None:
        nn.Module.__init__(self)
        takes = (encoder.channels, *encoder.input_size)
        if shape[0] != encoder.channels or (shape[0] != PICTURE and shape != takes):
            raise ValueError(f"{encoder.path} takes {_written(takes)}, and is sent {_written(shape)}")
        self.spec = RecogniserSpec(
            backbone=f"{encoder.format}:{encoder.path.stem}",
            representation_shape=shape,
            embedding_size=encoder.embedding_size,
        )
        self.encoder = encoder

    def forward(self, representation: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of representations (N, C, h, w), of pictures in [0, 1]."""
        embedding: Tensor = self.encoder(representation)
        return embedding

    def maps(self, representation: Tensor) -> Tensor:
        """The network's last feature map, (N, C', h', w'), where it tells of it, else its embeddings (N, D, 1, 1)."""
        return self.encoder.maps(representation)


def _written(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{channels} channels of {height} x {width}"


def separation(scores: Tensor, same: Tensor) -> float:
    """How far genuine scores lie above those of impostors, in their mean standard deviation (d', Daugman 2000).

    Args:
        scores: float (P,).
        same: bool (P,).

    Example:
        >>> import torch
        >>> separation(torch.tensor([3.0, 5.0, -1.0, 1.0]), torch.tensor([True, True, False, False]))
        4.0
    """
    genuine, impostor = scores[same].double(), scores[~same].double()
    spread = ((genuine.var(correction=0) + impostor.var(correction=0)) / 2).sqrt().clamp_min(1e-9)
    return float((genuine.mean() - impostor.mean()) / spread)


def resized(faces: Tensor, size: tuple[int, int]) -> Tensor:
    """Float pictures (N, 3, H, W) at another size: bilinear, with anti-aliasing, so no value leaves their range."""
    if tuple(faces.shape[-2:]) == size:
        return faces
    return functional.interpolate(faces, size, mode="bilinear", antialias=True)
