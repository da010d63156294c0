"""A face prior of the attacker's own: networks that turn a code into a face, trained on public faces."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, AttackOptions, FitReport
from attacks.parts.losses import reconstruction
from attacks.parts.training import Trainer, TrainingOptions
from attacks.parts.unet_network import zeroed
from bench.randomness import derived, seeded

#: How a network that ends in a :class:`FaceDecoder` is trained, of :class:`attacks.parts.training.Training`.
DECODER_TRAINING: Mapping[str, Any] = {"least_steps": 100, "average_buffers": False}
#: The coarsest grid of a decoder has at least this side, and its widest level this many times the finest one's width.
_COARSEST = 4
_WIDEST = 8
#: Of WGAN-GP (Gulrajani et al., NeurIPS 2017): weight of the gradient penalty.
_PENALTY = 10.0


def _levels(image_size: int) -> int:
    """How often a face can be halved until its side would fall below the coarsest grid's."""
    return max(1, int(math.log2(image_size / _COARSEST)))


def _widths(image_size: int, width: int) -> list[int]:
    """Channels per level, from the coarsest grid to half of the face's resolution."""
    levels = _levels(image_size)
    return [width * min(_WIDEST, 2 ** (levels - 1 - level)) for level in range(levels)]


def _convolution(inputs: int, outputs: int, stride: int = 1, *, normalised: bool = True) -> list[nn.Module]:
    """A 3x3 convolution, normalised over the batch where that is wanted, and a leaky ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=not normalised)
    normalisation = [nn.BatchNorm2d(outputs)] if normalised else []
    return [convolution, *normalisation, nn.LeakyReLU(0.2, inplace=True)]


class FaceDecoder(nn.Module):
    """Code (N, D) to face (N, 3, H, W) in [0, 1].

    A linear layer to a coarse grid, then per level nearest-neighbour up-sampling and a convolution (which, unlike a
    de-convolution, leaves no chequerboard); the last level is a convolution to four sub-pixels a pixel, for the full
    resolution is what costs. Any size: where it is no power of two times the coarsest grid, the face is decoded a
    little larger and interpolated. What the layers say is added to the logits of the mean public face and starts at
    zero, so that an untrained decoder returns the mean face.
    """

    mean_logit: Tensor

    def __init__(self, code_size: int, image_size: int, width: int) -> None:
        super().__init__()
        self.code_size, self.image_size = code_size, image_size
        widths = _widths(image_size, width)
        self.grid = math.ceil(image_size / 2 ** len(widths))
        self.register_buffer("mean_logit", torch.zeros(3, image_size, image_size))
        self.spread = nn.Linear(code_size, widths[0] * self.grid**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.LeakyReLU(0.2, inplace=True)]
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), *_convolution(wide, narrow)]
        layers += _convolution(widths[-1], widths[-1])
        self.layers = nn.Sequential(*layers)
        self.head = zeroed(nn.Conv2d(widths[-1], 3 * 4, 3, padding=1))

    def set_mean(self, mean_face: Tensor) -> None:
        """The face, float (3, H, W) in [0, 1], that the decoder starts from."""
        self.mean_logit.copy_(torch.logit(mean_face.float(), eps=1e-3))

    def forward(self, code: Tensor) -> Tensor:
        """float (N, D) to float32 (N, 3, H, W) in [0, 1]."""
        x = self.spread(code).unflatten(1, (-1, self.grid, self.grid))
        x = self.layers(x.contiguous(memory_format=torch.channels_last))
        x = functional.pixel_shuffle(self.head(x), 2).float()
        if x.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            x = functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return torch.sigmoid(x + self.mean_logit)


def _shrinking(image_size: int, width: int, normalised: bool) -> nn.Sequential:
    """Convolutions of stride two from a face, of pixels gathered in squares of two, to the coarsest grid."""
    widths = _widths(image_size, width)[::-1]
    layers: list[nn.Module] = []
    for before, after in zip([3 * 4, *widths], [*widths, widths[-1]], strict=False):
        layers += _convolution(before, after, stride=2 if layers else 1, normalised=normalised)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(_COARSEST), nn.Flatten())


def _gather(faces: Tensor) -> Tensor:
    """Faces, float in [0, 1], with pixels gathered in squares of two, about zero: (N, 12, H/2, W/2), H rounded up."""
    odd = faces.shape[-1] % 2
    padded = functional.pad(faces, (0, odd, 0, odd), mode="replicate") if odd else faces
    return functional.pixel_unshuffle(4 * padded - 2, 2)


class FaceGenerator(nn.Module):
    """A variational auto-encoder of faces (Kingma and Welling, ICLR 2014): codes are about N(0, 1) per value.

    Its decoder alone is the generator; the encoder gives the codes that an attack may start from.
    """

    def __init__(self, latent_size: int, image_size: int, width: int) -> None:
        super().__init__()
        self.latent_size, self.image_size = latent_size, image_size
        self.encoder = _shrinking(image_size, width, normalised=True)
        self.posterior = nn.Linear(_widths(image_size, width)[0] * _COARSEST**2, 2 * latent_size)
        self.decoder = FaceDecoder(latent_size, image_size, width)

    def forward(self, latent: Tensor) -> Tensor:
        """Codes, float (N, L), to faces, float32 (N, 3, H, W) in [0, 1]; differentiable."""
        faces: Tensor = self.decoder(latent)
        return faces

    def distribution(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32 (N, L) each, of the codes of faces (N, 3, H, W) in [0, 1]."""
        x = self.encoder(_gather(faces).contiguous(memory_format=torch.channels_last))
        mean, log_variance = self.posterior(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 5)

    def encode(self, faces: Tensor) -> Tensor:
        """The likeliest codes, float32 (N, L), of faces, float (N, 3, H, W) in [0, 1]."""
        return self.distribution(faces)[0]


class Critic(nn.Module):
    """Scores how much a face looks like a real one, up to an offset (WGAN); no normalisation over the batch."""

    def __init__(self, image_size: int, width: int) -> None:
        super().__init__()
        self.trunk = _shrinking(image_size, width, normalised=False)
        self.score = nn.Linear(_widths(image_size, width)[0] * _COARSEST**2, 1)

    def forward(self, faces: Tensor) -> Tensor:
        """float (N, 3, H, W) in [0, 1] to (N,)."""
        score: Tensor = self.score(self.trunk(_gather(faces))).squeeze(1)
        return score


def draw_views(count: int, generator: torch.Generator, *, shift: float, zoom: float = 0.0, size: int) -> Tensor:
    """Random small changes of the crop, for :func:`change_view`: float32 (count, 4).

    The columns are mirrored or not (-1 or 1, at even odds), zoom and the shifts right and down, at most by shares
    ``zoom`` of the scale and ``shift`` of the width, ``size`` pixels. Without zoom the shifts are whole pixels, so that
    nothing is blurred.
    """
    uniform = torch.rand(count, 4, generator=generator)
    mirrored = torch.where(uniform[:, 0] < 0.5, -1.0, 1.0)
    scale = 1 + zoom * (2 * uniform[:, 1] - 1)
    pixels = size * shift * (2 * uniform[:, 2:] - 1)
    shifts = 2 * (pixels if zoom else pixels.round()) / size
    return torch.cat((mirrored[:, None], scale[:, None], shifts), dim=1)


def change_view(faces: Tensor, views: Tensor) -> Tensor:
    """Faces, float (N, 3, H, W), mirrored, scaled and shifted by ``views`` (N, 4); borders are repeated.

    Differentiable in ``faces``; stays within their range.
    """
    views = views.to(faces)
    maps = faces.new_zeros(len(faces), 2, 3)
    maps[:, 0, 0] = views[:, 0] / views[:, 1]
    maps[:, 1, 1] = 1 / views[:, 1]
    maps[:, :, 2] = -views[:, 2:] / views[:, 1:2]
    maps[:, 0, 2] *= views[:, 0]
    grid = functional.affine_grid(maps, list(faces.shape), align_corners=False)
    return functional.grid_sample(faces, grid, mode="bilinear", padding_mode="border", align_corners=False)


class GeneratorOptions(AttackOptions):
    """Options of :func:`fit_generator`, for attacks to inherit."""

    latent_size: int = Field(128, ge=2, le=4096, description="Values in a code of the generator.")
    generator_width: int = Field(
        32, ge=1, le=1024, description="Channels of the finest level, doubled per coarser level up to eight times."
    )
    generator_images: int = Field(
        default=400_000, ge=1, description="Faces to train the generator on in all, repeats counted."
    )
    generator_batch_size: int = Field(64, ge=2, le=65536, description="Faces per step of the generator.")
    generator_learning_rate: float = Field(
        default=2e-3, gt=0, le=1, description="Learning rate of Adam for the generator."
    )
    generator_kl: float = Field(
        0.003, ge=0, le=100, description="Weight of the divergence of the codes from N(0, 1), per value of the code."
    )
    generator_ssim: float = Field(default=1.0, ge=0, le=10, description="Weight of 1 - SSIM beside L1.")
    adversarial: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Weight of the score of a critic trained in turn (WGAN-GP); 0 for none. Sharper faces, at about "
        "three times the cost.",
    )
    generator_shift: float = Field(
        0.03, ge=0, le=0.25, description="Largest shift of a training face, in widths; half are mirrored too."
    )
    generator_validation: float = Field(
        default=0.1, gt=0, lt=1, description="Share of the public identities held out for the generator's loss curve."
    )

    def trainer(self, adversary: Adversary, seed: int) -> Trainer:
        """Of the generator, on the adversary's public faces."""
        training = TrainingOptions(
            batch_size=self.generator_batch_size,
            learning_rate=self.generator_learning_rate,
            validation=self.generator_validation,
            warmup=0.05,
            decay=0.4,
        )
        return Trainer("the generator", adversary, seed, training, fit=self)


class GeneratorLosses:
    """L1 + SSIM of the reconstruction, divergence of the codes and, where asked for, what a critic says."""

    def __init__(
        self, options: GeneratorOptions, trainer: Trainer, network: FaceGenerator, critic: Critic | None
    ) -> None:
        self.options, self.trainer, self.network, self.critic = options, trainer, network, critic

    def _targets(self, step: int) -> Tensor:
        """The faces of a step, varied."""
        faces, draws = self.trainer.floats(self.trainer.batch(step)), derived(self.trainer.seed, "views", step)
        shift, size = self.options.generator_shift, faces.shape[-1]
        return change_view(faces, draw_views(len(faces), draws, shift=shift, size=size))

    def _make(self, faces: Tensor, *name: str | int) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions, mean and log variance of the codes; where there is a critic, as many faces drawn besides.

        One batch of both: batch norm must not see two kinds of them and end up with the statistics of neither.
        """
        generator = derived(self.trainer.seed, *name)
        with self.trainer.fabric.autocast():
            mean, log_variance = self.network.distribution(faces)
            codes = mean + torch.randn(mean.shape, generator=generator).to(mean) * (log_variance / 2).exp()
            if self.critic is not None:
                codes = torch.cat((codes, torch.randn(mean.shape, generator=generator).to(mean)))
            made: Tensor = self.network(codes)
        return made, mean, log_variance

    def generator(self, step: int) -> Tensor:
        """What the generator minimises in a step."""
        options, faces = self.options, self._targets(step)
        made, mean, log_variance = self._make(faces, "codes", step)
        again = made[: len(faces)]
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss = reconstruction(again, faces, options.generator_ssim) + options.generator_kl * divergence
        if self.critic is not None:
            with self.trainer.fabric.autocast():
                score = self.critic(made)
            loss = loss - options.adversarial * score.float().mean()
        return loss

    def rival(self, step: int) -> Tensor:
        """What the critic minimises in a step (Gulrajani et al., NeurIPS 2017).

        Half of the made faces are reconstructions, half drawn.
        """
        assert self.critic is not None
        with torch.no_grad():
            real = self._targets(step)
            made = self._make(real, "critic codes", step)[0]
            # Of each face either the reconstruction or the drawn one.
            made = torch.cat((made[: len(real) // 2], made[len(real) + len(real) // 2 :]))
            mix = torch.rand(len(real), 1, 1, 1, generator=derived(self.trainer.seed, "critic mix", step)).to(real)
        # No autocast: second derivatives need the full precision.
        between = (mix * real + (1 - mix) * made).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss: Tensor = self.critic(made).mean() - self.critic(real).mean() + _PENALTY * penalty
        return loss

    def recover(self, network: nn.Module, index: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Reconstructions of the faces at ``index``, and these."""
        assert isinstance(network, FaceGenerator)
        faces = self.trainer.floats(index)
        with self.trainer.fabric.autocast():
            made: Tensor = network(network.encode(faces))
        return made, faces


def build_generator(options: GeneratorOptions, image_size: int, seed: int) -> FaceGenerator:
    """A generator with fresh weights, the same for the same ``seed``; the global generator is left as it was."""
    with seeded(seed, "generator weights"):
        generator = FaceGenerator(options.latent_size, image_size, options.generator_width)
    return generator.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, unused-ignore]


def fit_generator(generator: FaceGenerator, trainer: Trainer, options: GeneratorOptions) -> FitReport:
    """Train ``generator``, on the trainer's device; the loss curve is L1 of the reconstruction of held-out faces.

    Raises:
        ValueError: fewer than two identities, or a checkpoint of another training.
        FloatingPointError: the loss is not finite.
    """
    critic = None
    if options.adversarial:
        with seeded(trainer.seed, "critic weights"):
            critic = Critic(generator.image_size, options.generator_width).to(trainer.device)
    losses = GeneratorLosses(options, trainer, generator, critic)
    generator.decoder.set_mean(trainer.mean_face())
    betas = (0.9, 0.999) if critic is None else (0.5, 0.9)
    return trainer.train_on_faces(
        generator,
        losses.generator,
        losses.recover,
        images=options.generator_images,
        rival=None if critic is None else (critic, losses.rival),
        optimizer=functools.partial(torch.optim.Adam, betas=betas),
        **DECODER_TRAINING,
    )
