"""A face prior of the attacker's own: networks that turn a code into a face, trained on public faces."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import AttackOptions, FitReport, Report, no_report
from attacks.parts.exposure import chunks, split_identities
from attacks.parts.training import Descent, EpochBatches, Plateau, Player, SeenStates, WarmHoldDecay
from bench.images import ssim, to_float
from bench.randomness import derived, seeded

#: Held-out faces that give the loss curve, and faces at once outside training.
_VALIDATION_FACES = 256
_CHUNK = 64
#: Before so many steps at the full learning rate, a flat loss is no plateau: training has hardly begun.
_LEAST_STEPS = 100
#: The coarsest grid of a decoder has at least this side, and its widest level this many times the finest one's width.
_COARSEST = 4
_WIDEST = 8
#: Of WGAN-GP (Gulrajani et al., NeurIPS 2017): weight of the gradient penalty.
_PENALTY = 10.0


# -- networks -----------------------------------------------------------------------------------------


def _levels(image_size: int) -> int:
    """How often a face can be halved until its side would fall below the coarsest grid's."""
    return max(1, int(math.log2(image_size / _COARSEST)))


def _widths(image_size: int, width: int) -> list[int]:
    """Channels per level, from the coarsest grid to half of the face's resolution."""
    levels = _levels(image_size)
    return [width * min(_WIDEST, 2 ** (levels - 1 - level)) for level in range(levels)]


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
        """
        Args:
            code_size: D.
            image_size: H = W.
            width: channels of the finest level; they double per coarser level, up to eight times.
        """
        super().__init__()
        self.code_size, self.image_size = code_size, image_size
        widths = _widths(image_size, width)
        self.grid = math.ceil(image_size / 2 ** len(widths))
        self.register_buffer("mean_logit", torch.zeros(3, image_size, image_size))
        self.spread = nn.Linear(code_size, widths[0] * self.grid**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.LeakyReLU(0.2, inplace=True)]
        for wide, narrow in itertools.pairwise(widths):
            layers += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(wide, narrow, 3, padding=1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[-1]),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        self.layers = nn.Sequential(*layers)
        head = nn.Conv2d(widths[-1], 3 * 4, 3, padding=1)
        nn.init.zeros_(head.weight)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
        self.head = head

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
        layers.append(nn.Conv2d(before, after, 3, padding=1, stride=2 if layers else 1, bias=not normalised))
        if normalised:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
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
        """
        Args:
            latent_size: L, values in a code.
            image_size: H = W of the faces.
            width: channels of the finest level of either half.
        """
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


# -- views --------------------------------------------------------------------------------------------


def draw_views(count: int, generator: torch.Generator, *, shift: float, zoom: float = 0.0, size: int) -> Tensor:
    """Random small changes of the crop, for :func:`change_view`: float32 (count, 4).

    The columns are mirrored or not (-1 or 1, at even odds), zoom and the shifts right and down. Without zoom the
    shifts are whole pixels, so that nothing is blurred.

    Args:
        count: how many.
        generator: a CPU generator.
        shift: largest shift, as a share of the width.
        zoom: largest change of scale, as a share.
        size: width of the faces in pixels.
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


# -- training -----------------------------------------------------------------------------------------


def hold_out(identities: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (training, held out) of public faces: the split by identities that a training with ``seed`` makes.

    Raises:
        ValueError: fewer than two identities.
    """
    return split_identities(identities, share, derived(seed, "identities"))


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how fast a decoder is trained.

    Attributes:
        images: faces to train on in all, repeats counted.
        batch_size: faces per step (fewer where there are fewer).
        learning_rate: of Adam, held after a linear warm-up, then decayed linearly to zero.
        validation: share of the identities held out for the loss curve.
        warmup: share of the training over which the rate rises.
        decay: share of the training over which it falls.
        plateau: relative gain of the last doubling below which the training counts as saturated.
        betas: of Adam.
    """

    images: int
    batch_size: int
    learning_rate: float
    validation: float = 0.1
    warmup: float = 0.05
    decay: float = 0.4
    plateau: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)


class DecoderTraining(ABC):
    """The training of a network that ends in a :class:`FaceDecoder`; a subclass says what it minimises.

    Every draw derives from the seed and the number of the step, so that a resumed training equals an unbroken one.

    Attributes:
        network: trained in place; its averaged weights are what :meth:`run` leaves in it.
        critic: trained in turn with the network where there is one, never averaged.
        seen: the states trained on.
    """

    def __init__(
        self,
        network: nn.Module,
        faces: Tensor,
        identities: Tensor,
        plan: TrainingPlan,
        *,
        seed: int,
        fabric: Fabric,
        critic: nn.Module | None = None,
    ) -> None:
        """
        Args:
            network: on Fabric's device.
            faces: uint8 (M, 3, H, W), public faces.
            identities: int64 (M,).
            plan: length and speed.
            seed: of all draws.
            fabric: device and precision.
            critic: see above.

        Raises:
            ValueError: fewer than two identities.
        """
        self.network, self.critic, self.plan = network, critic, plan
        self.seed, self.fabric = seed, fabric
        self.seen = SeenStates()
        self.faces = faces.to(fabric.device)
        self.training, held_out = hold_out(identities, plan.validation, seed)
        # A short training is not worth a long validation.
        most = min(_VALIDATION_FACES, max(_CHUNK, plan.images // 50))
        order = torch.randperm(len(held_out), generator=derived(seed, "validation"))
        self.held_out = held_out[order[:most]]

    @abstractmethod
    def loss(self, index: Tensor, step: int) -> Tensor:
        """What the network minimises: a scalar for the faces at ``index`` (int64 (b,), on the CPU)."""

    @abstractmethod
    def recover(self, network: nn.Module, index: Tensor) -> tuple[Tensor, Tensor]:
        """Faces by ``network`` and what they should be, (b, 3, H, W) each, for the held-out faces at ``index``."""

    def critic_loss(self, index: Tensor, step: int) -> Tensor:
        """What the critic minimises."""
        raise NotImplementedError(f"{type(self).__name__} has a critic and no loss for it")

    def mean_face(self) -> Tensor:
        """Mean of the training faces and their mirror images: float32 (3, H, W) in [0, 1]."""
        total = torch.zeros(self.faces.shape[1:], dtype=torch.float64, device=self.faces.device)
        for index in self.training.split(1024):
            total += self.faces[index.to(self.faces.device)].double().sum(dim=0)
        mean = total / (255 * len(self.training))
        return ((mean + mean.flip(-1)) / 2).float()

    def run(
        self, what_is_trained: str, *, report: Report = no_report, folder: Path | None = None, fit: dict[str, Any]
    ) -> FitReport:
        """Train.

        Args:
            what_is_trained: as messages call it.
            report: called as ``report(done, total, loss=, images_per_second=)``, counting images.
            folder: for a checkpoint; one found there is resumed.
            fit: JSON values that tell this training from others; a checkpoint of another one is refused.

        Raises:
            ValueError: a checkpoint of another training.
            FloatingPointError: the loss is not finite.
        """
        plan, fabric = self.plan, self.fabric
        batches = EpochBatches(self.training, plan.batch_size, self.seed)
        played = [(self.network, self.loss)]
        if self.critic is not None:
            played.insert(0, (self.critic, self.critic_loss))
        players = [
            Player(
                module,
                # Fused: one kernel instead of a loop over parameters, on CPU and GPU alike.
                torch.optim.Adam(
                    module.parameters(),
                    lr=plan.learning_rate,
                    betas=plan.betas,
                    fused=fabric.device.type in ("cpu", "cuda"),
                ),
                lambda step, loss=loss: loss(batches(step), step),  # type: ignore[misc]
            )
            for module, loss in played
        ]
        stored = {"network": self.network}
        if self.critic is not None:
            stored["critic"] = self.critic
        described = {**asdict(plan), "betas": list(plan.betas)}
        outcome = Descent(
            what=what_is_trained,
            players=players,
            batch_size=batches.size,
            learning_rate=plan.learning_rate,
            schedule=WarmHoldDecay(math.ceil(plan.images / batches.size), plan.warmup, plan.decay),
            rule=Plateau(relative=plan.plateau),
            validate=self._validate,
            floor=self._floor(),
            least_steps=_LEAST_STEPS,
            average_buffers=False,
            fabric=fabric,
            report=report,
            folder=folder,
            stored=stored,
            fit={**fit, "seed": self.seed, "faces": list(self.faces.shape), "plan": described},
            seen=self.seen,
        ).run()
        return FitReport(
            saturated=outcome.saturated,
            states_seen=self.seen.states,
            curve=outcome.curve,
            details={
                **outcome.details(),
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "training_faces": len(self.training),
                "validation_faces": len(self.held_out),
            },
        )

    def _floor(self) -> float:
        """L1 of the mean face on held-out identities."""
        held_out = to_float(self.faces[self.held_out.to(self.faces.device)])
        return float((held_out - self.mean_face()).abs().mean())

    @torch.no_grad()
    def _validate(self, network: nn.Module) -> float:
        """L1 on held-out identities, the same draws every time."""
        total = 0.0
        for index in chunks(self.held_out, _CHUNK):
            faces, target = self.recover(network, index)
            total += float((faces - target).abs().mean()) * len(index)
        return total / len(self.held_out)


# -- the generator ------------------------------------------------------------------------------------


class GeneratorOptions(AttackOptions):
    """Options of :func:`fit_generator`, for attacks to inherit.

    Attributes:
        latent_size: values in a code.
        generator_width: channels of the finest level; they double per coarser level, up to eight times.
        generator_images: faces to train on in all, repeats counted.
        generator_batch_size: faces per step.
        generator_learning_rate: of Adam.
        generator_kl: weight of the divergence of the codes from N(0, 1), per value of the code.
        generator_ssim: weight of 1 - SSIM beside L1.
        adversarial: weight of the score of a critic trained in turn (WGAN-GP); 0 for none. Sharper faces, at about
            three times the cost.
        generator_shift: largest shift of a training face, as a share of its width; half of the faces are mirrored too.
        generator_validation: share of the public identities held out for the loss curve.
    """

    latent_size: int = Field(default=128, ge=2, le=4096)
    generator_width: int = Field(default=32, ge=1, le=1024)
    generator_images: int = Field(default=400_000, ge=1)
    generator_batch_size: int = Field(default=64, ge=2, le=65536)
    generator_learning_rate: float = Field(default=2e-3, gt=0, le=1, allow_inf_nan=False)
    generator_kl: float = Field(default=0.003, ge=0, le=100, allow_inf_nan=False)
    generator_ssim: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    adversarial: float = Field(default=0.0, ge=0, le=10, allow_inf_nan=False)
    generator_shift: float = Field(default=0.03, ge=0, le=0.25)
    generator_validation: float = Field(default=0.1, gt=0, lt=1)


class _GeneratorTraining(DecoderTraining):
    """L1 + SSIM of the reconstruction, divergence of the codes and, where asked for, what a critic says."""

    network: FaceGenerator

    def __init__(self, options: GeneratorOptions, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.options = options

    def _targets(self, index: Tensor, step: int) -> Tensor:
        faces = to_float(self.faces[index.to(self.faces.device)])
        views = draw_views(
            len(faces), derived(self.seed, "views", step), shift=self.options.generator_shift, size=faces.shape[-1]
        )
        return change_view(faces, views)

    def _make(self, faces: Tensor, *name: str | int) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions, mean and log variance of the codes; where there is a critic, as many faces drawn besides.

        One batch of both: batch norm must not see two kinds of them and end up with the statistics of neither.
        """
        generator = derived(self.seed, *name)
        with self.fabric.autocast():
            mean, log_variance = self.network.distribution(faces)
            codes = mean + torch.randn(mean.shape, generator=generator).to(mean) * (log_variance / 2).exp()
            if self.critic is not None:
                codes = torch.cat((codes, torch.randn(mean.shape, generator=generator).to(mean)))
            made: Tensor = self.network(codes)
        return made, mean, log_variance

    def loss(self, index: Tensor, step: int) -> Tensor:
        options, faces = self.options, self._targets(index, step)
        made, mean, log_variance = self._make(faces, "codes", step)
        again = made[: len(faces)]
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss = functional.l1_loss(again, faces) + options.generator_kl * divergence
        if options.generator_ssim:
            loss = loss + options.generator_ssim * (1 - ssim(again, faces)).mean()
        if self.critic is not None:
            with self.fabric.autocast():
                score = self.critic(made)
            loss = loss - options.adversarial * score.float().mean()
        return loss

    def critic_loss(self, index: Tensor, step: int) -> Tensor:
        """That of WGAN-GP (Gulrajani et al., NeurIPS 2017); half of the made faces are reconstructions, half drawn."""
        assert self.critic is not None
        with torch.no_grad():
            real = self._targets(index, step)
            made = self._make(real, "critic codes", step)[0]
            # Of each face either the reconstruction or the drawn one.
            made = torch.cat((made[: len(real) // 2], made[len(real) + len(real) // 2 :]))
            mix = torch.rand(len(real), 1, 1, 1, generator=derived(self.seed, "critic mix", step)).to(real)
        # No autocast: second derivatives need the full precision.
        between = (mix * real + (1 - mix) * made).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss: Tensor = self.critic(made).mean() - self.critic(real).mean() + _PENALTY * penalty
        return loss

    def recover(self, network: nn.Module, index: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(network, FaceGenerator)
        faces = to_float(self.faces[index.to(self.faces.device)])
        with self.fabric.autocast():
            made: Tensor = network(network.encode(faces))
        return made, faces


def build_generator(options: GeneratorOptions, image_size: int, seed: int) -> FaceGenerator:
    """A generator with fresh weights, the same for the same ``seed``; the global generator is left as it was."""
    with seeded(seed, "generator weights"):
        generator = FaceGenerator(options.latent_size, image_size, options.generator_width)
    return generator.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, unused-ignore]


def fit_generator(
    generator: FaceGenerator,
    faces: Tensor,
    identities: Tensor,
    options: GeneratorOptions,
    *,
    seed: int,
    fabric: Fabric,
    report: Report = no_report,
    folder: Path | None = None,
) -> FitReport:
    """Train ``generator`` in place on public faces; some identities are held out for the loss curve.

    Args:
        generator: from :func:`build_generator`, on Fabric's device.
        faces: uint8 (M, 3, H, H), H = ``generator.image_size``.
        identities: int64 (M,).
        options: how.
        seed: of all draws.
        fabric: device and precision.
        report: progress, in images.
        folder: for a checkpoint; one found there is resumed.

    Returns:
        The curve of the reconstruction's L1 on held-out identities, and whether it has plateaued.

    Raises:
        ValueError: fewer than two identities, or a checkpoint of another training.
        FloatingPointError: the loss is not finite.
    """
    critic = None
    if options.adversarial:
        with seeded(seed, "critic weights"):
            critic = Critic(generator.image_size, options.generator_width).to(fabric.device)
    plan = TrainingPlan(
        images=options.generator_images,
        batch_size=options.generator_batch_size,
        learning_rate=options.generator_learning_rate,
        validation=options.generator_validation,
        betas=(0.5, 0.9) if critic is not None else (0.9, 0.999),
    )
    training = _GeneratorTraining(options, generator, faces, identities, plan, seed=seed, fabric=fabric, critic=critic)
    generator.decoder.set_mean(training.mean_face())
    return training.run(
        "the generator",
        report=report,
        folder=folder,
        fit={"generator": options.model_dump(mode="json", include=_FIELDS)},
    )


_FIELDS = set(GeneratorOptions.model_fields)
