"""Template inversion: a decoder trained on public faces from the provider's embedding back to the face."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, Capability, EmbeddingQuery, FitReport, Knowledge, Observation, RecoveryAttack
from attacks.parts.exposure import Exposure, in_chunks
from attacks.parts.generator import DECODER_TRAINING, FaceDecoder, change_view, draw_views
from attacks.parts.losses import cosine, reconstruction
from attacks.parts.training import Trainer, TrainingOptions
from bench.images import to_float
from bench.randomness import derived
from defenses.base import TemplateDefense

#: Faces whose embeddings give the input statistics.
_STATISTICS_FACES = 2048
#: Directions of the embeddings with less than this share of the largest variance are not blown up to unit variance.
_FAINTEST = 1e-3


class TemplateOptions(TrainingOptions):
    """Options of :class:`Template`."""

    width: int = Field(
        64, ge=1, le=1024, description="Channels of the finest level, doubled per coarser level up to eight times."
    )
    ssim_weight: float = Field(default=0.75, ge=0, le=10, description="Weight of 1 - SSIM beside L1.")
    identity_weight: float = Field(
        0.025,
        ge=0,
        le=10,
        description="Weight of 1 - cosine of the recovered face's embedding to the template, where the recogniser's "
        "weights are known.",
    )
    images: int = Field(1_000_000, ge=1, description="Faces to train on in all, repeats counted.")
    views: int = Field(
        8,
        ge=1,
        le=1000,
        description="Embeddings queried per public face, each of another crop under a fresh state, where the "
        "recogniser can only be queried; with its weights every step draws afresh.",
    )
    shift: float = Field(
        0.03, ge=0, le=0.25, description="Largest shift of a training face, in widths; half are mirrored too."
    )
    warmup: float = Field(0.05, ge=0, le=0.5, description="Share of the training over which the rate rises.")
    decay: float = Field(
        default=0.4, ge=0, le=0.9, description="Share of the training, at its end, over which it falls."
    )


class TemplateDecoder(nn.Module):
    """Unit embedding (N, D) to face (N, 3, H, W) in [0, 1]: whitening, then a :class:`FaceDecoder`.

    Embeddings of a network of little training share most of their direction; the rest is what tells faces apart.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, embedding_size: int, image_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embedding_size))
        self.register_buffer("whitening", torch.eye(embedding_size))
        self.decoder = FaceDecoder(embedding_size, image_size, width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """float (N, D), unit rows, to float32 (N, 3, H, W) in [0, 1]."""
        faces: Tensor = self.decoder((embeddings - self.mean) @ self.whitening)
        return faces

    @torch.no_grad()
    def measure(self, embeddings: Tensor) -> None:
        """Set the whitening from embeddings (M, D)."""
        centred = (embeddings - embeddings.mean(dim=0)).double()
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        scales = variances.clamp(min=max(float(variances[-1]) * _FAINTEST, 1e-12)).rsqrt()
        self.mean.copy_(embeddings.mean(dim=0))
        self.whitening.copy_(directions * scales @ directions.T)


def _frozen(recogniser: nn.Module, device: torch.device) -> nn.Module:
    """A copy without gradients of its own: the provider's network keeps its gradients and its mode."""
    return copy.deepcopy(recogniser).requires_grad_(False).eval().to(device)


class _Examples:
    """Public faces, varied, with their embeddings; and the loss of a decoder on them."""

    def __init__(self, attack: Template, trainer: Trainer) -> None:
        adversary = trainer.adversary
        self.options, self.network, self.trainer, self.seed = attack.options, attack.network, trainer, attack.seed
        self._without_key, self.exposure = attack.without_key, Exposure(adversary, self.seed)
        self._countable = self.exposure.countable
        self.recogniser: nn.Module | None = None
        self.details: dict[str, Any] = {"gradients": adversary.recogniser is not None, "queries": 0}
        if adversary.recogniser is not None:
            self.recogniser = _frozen(adversary.recogniser, trainer.device)
        elif adversary.embed is not None:
            self._query(adversary.embed)

    def embeddings_of(self, sample: Tensor) -> Tensor:
        """Unit embeddings of the faces at ``sample``, int64 (M,), varied: (M, D)."""
        numbers = itertools.count()
        return in_chunks(lambda index: self._shown(index, "statistics", next(numbers))[1], sample)

    def _query(self, embed: EmbeddingQuery) -> None:
        """Embed every public face once per view."""
        everything, views, embeddings = torch.arange(len(self.trainer.faces)), [], []
        for number in range(self.options.views):
            view = self._draw(len(everything), "view", number)
            parts = [embed(change_view(self.trainer.floats(i), view[i])) for i in everything.split(64)]
            views.append(view)
            embeddings.append(torch.cat(parts))
        self.views, self.embeddings = torch.stack(views), torch.stack(embeddings)
        self.details["queries"] = self.options.views * len(everything)

    def _draw(self, count: int, *name: str | int) -> Tensor:
        size = self.network.decoder.image_size
        return draw_views(count, derived(self.seed, *name), shift=self.options.shift, size=size)

    @torch.no_grad()
    def _shown(self, index: Tensor, *name: str | int) -> tuple[Tensor, Tensor]:
        """Faces at ``index``, varied, float (b, 3, H, W) in [0, 1], and their embeddings (b, D), unit rows."""
        faces = self.trainer.floats(index)
        if self.recogniser is None:
            number = torch.randint(self.options.views, (len(index),), generator=derived(self.seed, *name))
            embeddings = self.embeddings[number.to(self.embeddings.device), index.to(self.embeddings.device)]
            return change_view(faces, self.views[number, index]), embeddings
        faces = change_view(faces, self._draw(len(index), *name, "view"))
        return faces, self._embed(faces, *name, "protect")

    def _embed(self, faces: Tensor, *name: str | int) -> Tensor:
        """Unit embeddings by the recogniser itself, the states noted; differentiable in ``faces``."""
        assert self.recogniser is not None
        sent = self.exposure.protect(faces, *name)
        if self._countable and "validate" not in name:
            self.trainer.note(sent.state)
        embeddings = self.recogniser(sent.representation).float()
        return functional.normalize(self._without_key(embeddings, sent.keys), dim=1)

    def loss(self, step: int) -> Tensor:
        """L1 + SSIM + identity between the faces of a step and what the decoder makes of their embeddings."""
        options = self.options
        faces, embeddings = self._shown(self.trainer.batch(step), "step", step)
        with self.trainer.fabric.autocast():
            made = self.network(embeddings)
        loss = reconstruction(made, faces, options.ssim_weight)
        if options.identity_weight and self.recogniser is not None:
            again = self._embed(made, "identity", step)
            loss = loss + options.identity_weight * cosine(again, embeddings).mean()
        return loss

    def recover(self, network: nn.Module, index: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Faces by ``network`` from their embeddings, and these faces."""
        faces, embeddings = self._shown(index, "validate", int(index[0]))
        with self.trainer.fabric.autocast():
            return network(embeddings), faces


class Template(RecoveryAttack):
    """Decoder from a stolen template to the face.

    In the way of NbNet, with the losses of Shahreza and Marcel but the perceptual one. Trained on public faces,
    protected afresh, and their embeddings. Where the recogniser's weights are known, the recovered faces are protected
    and embedded again, and those embeddings held against the templates, by gradients through both. Where it can only be
    queried, each public face is embedded a few times and that term falls away. Of k > 1 templates of a victim the
    average is decoded. Of a template defence the templates are what it stores; with a stolen key they are turned back
    first (:meth:`TemplateDefense.estimate`).
    """

    name = "template"
    summary = "decoder trained on public faces from the provider's embedding back to the face"
    cost = "fit: a decoder on public faces (minutes on a CPU); recovery: one pass a face"
    reference = "Mai et al. (NbNet), TPAMI 41(5), 2019; Shahreza and Marcel, 2024"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TEMPLATES, Capability.EMBEDDINGS})
    uses = frozenset({Capability.RECOGNISER, Capability.KEY})
    budgets: ClassVar = {"images": "images"}
    opens = frozenset({"mixture"})
    Options = TemplateOptions
    presets: ClassVar = {
        # Small batches and a higher rate make the most of the steps that two cores can afford.
        "quick": {"width": 16, "batch_size": 16, "learning_rate": 2e-3, "images": 2_400, "views": 4},
        "cpu": {"width": 24, "batch_size": 16, "learning_rate": 2e-3, "images": 24_000},
        "gpu": {"learning_rate": 2e-3, "images": 600_000},
    }
    options: TemplateOptions

    network: TemplateDecoder

    def build(self, adversary: Adversary) -> None:
        """Build the decoder for the size of the provider's embeddings, found out with one face."""
        face = to_float(adversary.faces[:1].to(self.device))
        if adversary.recogniser is not None:
            sent = Exposure(adversary, self.seed).protect(face, "probe")
            with torch.no_grad():
                embedding = _frozen(adversary.recogniser, self.device)(sent.representation)
            size = self.without_key(embedding, sent.keys).shape[1]
        elif adversary.embed is not None:
            size = adversary.embed(face).shape[1]
        else:
            raise ValueError(f"{self.name} needs the recogniser's weights or embedding queries")
        network = TemplateDecoder(size, adversary.faces.shape[-1], self.options.width)
        self.network = network.to(memory_format=torch.channels_last)

    def without_key(self, templates: Tensor, keys: Tensor | None) -> Tensor:
        """Templates (N, T); at ``oracle``, where a template defence's key is stolen, what they tell of embeddings."""
        if keys is None or self.adversary.knowledge is not Knowledge.ORACLE:
            return templates
        mechanism = self.mechanism
        return mechanism.estimate(templates, keys) if isinstance(mechanism, TemplateDefense) else templates

    def fit(self, adversary: Adversary) -> FitReport:
        """Train on public faces; some identities are held out for the loss curve."""
        trainer = Trainer(self.name, adversary, self.seed, self.options)
        examples = _Examples(self, trainer)
        self.network.measure(examples.embeddings_of(trainer.sample(_STATISTICS_FACES, "statistics")))
        self.network.decoder.set_mean(trainer.mean_face())
        report = trainer.train_on_faces(
            self.network, examples.loss, examples.recover, images=self.options.images, **DECODER_TRAINING
        )
        return replace(report, details={**report.details, **examples.details})

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W) in [0, 1]."""
        templates, keys, size = observation.templates, observation.keys, len(self.network.mean)
        assert templates is not None  # they are among the needs
        if keys is not None:
            flat = self.without_key(templates.flatten(0, 1), keys.flatten(0, 1))
            templates = flat.unflatten(0, templates.shape[:2])
        if templates.shape[-1] != size:
            raise ValueError(f"{self.name} was trained on templates of {size} values, got {templates.shape[-1]}")
        unit = functional.normalize(templates.to(self.network.mean), dim=2)
        unit = functional.normalize(unit.mean(dim=1), dim=1)
        return in_chunks(self.network, unit)
