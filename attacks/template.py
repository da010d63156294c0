"""Template inversion: from what is stored to the embedding, and by a decoder back to the face."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, Capability, FitReport, Knowledge, Observation, RecoveryAttack
from attacks.parts.embedding import EmbeddingEstimator
from attacks.parts.exposure import Exposure, in_chunks
from attacks.parts.generator import DECODER_TRAINING, FaceDecoder, change_view, draw_views
from attacks.parts.losses import cosine, reconstruction
from attacks.parts.training import Trainer, TrainingOptions
from bench.images import to_float
from bench.randomness import derived
from defenses.template import TemplateDefense

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

    steps: int = Field(
        200, ge=1, le=100_000, description="Of a template defence, steps of the search for an embedding that fits."
    )
    network: Literal["mlp", "kan"] = Field(
        "mlp", description="Of a template defence whose keys are not known, what learns the embedding from examples."
    )
    map_epochs: int = Field(20, ge=1, le=1000, description="Epochs of that network's training.")


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
    """Public faces, varied, with their embeddings; and the loss of a decoder on them.

    Embeddings come from the client of a template defence, from the recogniser's weights, or from queries. Where they
    have no gradients each public face is embedded a few times, once for all, and the identity's loss falls away.
    """

    def __init__(self, attack: Template, trainer: Trainer) -> None:
        adversary = trainer.adversary
        self.options, self.network, self.trainer, self.seed = attack.options, attack.network, trainer, attack.seed
        self.inversion = attack.inversion
        self.exposure = Exposure(adversary, self.seed)
        self._countable = self.exposure.countable
        self._stored = attack.mechanism if isinstance(attack.mechanism, TemplateDefense) else None
        self._recogniser = None if adversary.recogniser is None else _frozen(adversary.recogniser, trainer.device)
        self._query = adversary.embed
        self._gradients = self._has_gradients()
        self.details: dict[str, Any] = {"gradients": self._gradients, "queries": 0}
        if not self._gradients:
            self._embed_all()

    def _has_gradients(self) -> bool:
        if self._stored is None and self._recogniser is None:
            return False
        with torch.enable_grad():
            face = self.trainer.floats(self.trainer.training[:1]).requires_grad_(True)
            return self._embed(face, "probe").requires_grad

    def embeddings_of(self, sample: Tensor) -> Tensor:
        """Unit embeddings of the faces at ``sample``, int64 (M,), varied: (M, D)."""
        numbers = itertools.count()
        return in_chunks(lambda index: self._shown(index, "statistics", next(numbers))[1], sample)

    @torch.no_grad()
    def _embed_all(self) -> None:
        """Embed every public face once per view."""
        everything, views, embeddings = torch.arange(len(self.trainer.faces)), [], []
        for number in range(self.options.views):
            view = self._draw(len(everything), "view", number)
            parts = [
                self._embed(change_view(self.trainer.floats(i), view[i]), "view", number, int(i[0]))
                for i in everything.split(64)
            ]
            views.append(view)
            embeddings.append(torch.cat(parts))
        self.views, self.embeddings = torch.stack(views), torch.stack(embeddings)
        if self._stored is None and self._recogniser is None:
            self.details["queries"] = self.options.views * len(everything)

    def _draw(self, count: int, *name: str | int) -> Tensor:
        size = self.network.decoder.image_size
        return draw_views(count, derived(self.seed, *name), shift=self.options.shift, size=size)

    @torch.no_grad()
    def _shown(self, index: Tensor, *name: str | int) -> tuple[Tensor, Tensor]:
        """Faces at ``index``, varied, float (b, 3, H, W) in [0, 1], and their embeddings (b, D), unit rows."""
        faces = self.trainer.floats(index)
        if not self._gradients:
            number = torch.randint(self.options.views, (len(index),), generator=derived(self.seed, *name))
            embeddings = self.embeddings[number.to(self.embeddings.device), index.to(self.embeddings.device)]
            return change_view(faces, self.views[number, index]), embeddings
        faces = change_view(faces, self._draw(len(index), *name, "view"))
        return faces, self._embed(faces, *name, "protect")

    def _embed(self, faces: Tensor, *name: str | int) -> Tensor:
        """Unit embeddings, the states noted; differentiable in ``faces`` where what makes them is."""
        if self._stored is not None:
            return self._stored.embed(faces, derived(self.seed, *name)).float()
        if self._recogniser is None:
            assert self._query is not None
            return self._query(faces)
        sent = self.exposure.protect(faces, *name)
        if self._countable and "validate" not in name:
            self.trainer.note(sent.state)
        return functional.normalize(self._recogniser(sent.representation).float(), dim=1)

    def _estimated(self, embeddings: Tensor, *name: str | int) -> Tensor:
        """Embeddings as they come out of stolen templates: from so near to the true ones as one template gives to all.

        What is decoded is never better than what was inverted, and a decoder that never saw anything worse than the
        truth would take its errors for features.
        """
        if self.inversion is None:
            return embeddings
        draws = derived(self.seed, *name, "estimated")
        near = float(self.inversion.near.clamp(0, 1))
        cosines = near + (1 - near) * torch.rand(len(embeddings), 1, generator=draws).to(embeddings)
        errors = torch.randn(embeddings.shape, generator=draws).to(embeddings) @ self.inversion.spread.T
        errors = functional.normalize(errors, dim=1)
        return functional.normalize(cosines * embeddings + (1 - cosines.square()).sqrt() * errors, dim=1)

    def loss(self, step: int) -> Tensor:
        """L1 + SSIM + identity between the faces of a step and what the decoder makes of their embeddings."""
        options = self.options
        faces, embeddings = self._shown(self.trainer.batch(step), "step", step)
        with self.trainer.fabric.autocast():
            made = self.network(self._estimated(embeddings, "step", step))
        loss = reconstruction(made, faces, options.ssim_weight)
        if options.identity_weight and self._gradients:
            again = self._embed(made.float(), "identity", step)
            loss = loss + options.identity_weight * cosine(again, embeddings).mean()
        return loss

    def recover(self, network: nn.Module, index: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Faces by ``network`` from their embeddings, and these faces."""
        faces, embeddings = self._shown(index, "validate", int(index[0]))
        with self.trainer.fabric.autocast():
            return network(self._estimated(embeddings, "validate", int(index[0]))), faces


class Template(RecoveryAttack):
    """Decoder from a stolen template to the face.

    In the way of NbNet, with the losses of Shahreza and Marcel but the perceptual one. Trained on public faces,
    protected afresh, and their embeddings. Where the recogniser's weights are known, the recovered faces are protected
    and embedded again, and those embeddings held against the templates, by gradients through both. Where it can only be
    queried, each public face is embedded a few times and that term falls away. Of k > 1 templates of a victim the
    average is decoded. Of a template defence the templates are what it stores, k of them under k keys: the embedding
    is estimated first (:class:`attacks.parts.embedding.EmbeddingEstimator`), under the keys where they are stolen or
    lie beside the templates.
    """

    name = "template"
    summary = "stolen templates inverted to the embedding, and by a decoder to the face"
    cost = "fit: a decoder on public faces (minutes on a CPU); recovery: one pass a face, for stored templates a search"
    reference = "Mai et al. (NbNet), TPAMI 41(5), 2019; Shahreza and Marcel, 2024"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TEMPLATES, Capability.EMBEDDINGS})
    uses = frozenset({Capability.RECOGNISER, Capability.KEY})
    budgets: ClassVar = {"images": "images"}
    opens = frozenset({"mixture"})
    Options = TemplateOptions
    presets: ClassVar = {
        # Small batches and a higher rate make the most of the steps that two cores can afford.
        "quick": {"width": 16, "batch_size": 16, "learning_rate": 2e-3, "images": 2_400, "views": 4, "steps": 60},
        "cpu": {"width": 24, "batch_size": 16, "learning_rate": 2e-3, "images": 24_000},
        "gpu": {"learning_rate": 2e-3, "images": 600_000},
    }
    options: TemplateOptions

    network: TemplateDecoder
    inversion: EmbeddingEstimator | None

    def build(self, adversary: Adversary) -> None:
        """Build the decoder for the size of the provider's embeddings, found out with one face."""
        face, options = to_float(adversary.faces[:1].to(self.device)), self.options
        self.inversion = None
        with torch.no_grad():
            if isinstance(mechanism := self.mechanism, TemplateDefense):
                size = mechanism.embed(face, derived(self.seed, "probe")).shape[1]
                with_keys = mechanism.key_stored or adversary.knowledge is Knowledge.ORACLE
                self.inversion = EmbeddingEstimator(
                    mechanism, size, with_keys=with_keys, kind=options.network, steps=options.steps, seed=self.seed
                )
            elif adversary.recogniser is not None:
                sent = Exposure(adversary, self.seed).protect(face, "probe").representation
                size = _frozen(adversary.recogniser, self.device)(sent).shape[1]
            elif adversary.embed is not None:
                size = adversary.embed(face).shape[1]
            else:
                raise ValueError(f"{self.name} needs the recogniser's weights or embedding queries")
        network = TemplateDecoder(size, adversary.faces.shape[-1], options.width)
        self.network = network.to(memory_format=torch.channels_last)

    def fit(self, adversary: Adversary) -> FitReport:
        """Train on public faces; some identities are held out for the loss curve."""
        trainer = Trainer(self.name, adversary, self.seed, self.options)
        examples = _Examples(self, trainer)
        embeddings = examples.embeddings_of(trainer.sample(_STATISTICS_FACES, "statistics"))
        self.network.measure(embeddings)
        self.network.decoder.set_mean(trainer.mean_face())
        inverted: dict[str, Any] = {}
        if self.inversion is not None:
            for done, total in self.inversion.fit(embeddings, epochs=self.options.map_epochs):
                adversary.report(done, total)
            inverted = {"inversion": self.inversion.method, "public_cosine": float(self.inversion.near)}
        report = trainer.train_on_faces(
            self.network, examples.loss, examples.recover, images=self.options.images, **DECODER_TRAINING
        )
        return replace(report, details={**report.details, **examples.details, **inverted})

    def infer_embeddings(self, observation: Observation) -> Tensor | None:
        """Embeddings (N, D) that are made of a template defence's templates; None of any other defence."""
        if self.inversion is None:
            return None
        stored = observation.representations[..., 0, 0]
        estimated: Tensor = self.inversion(stored, observation.keys if self.inversion.with_keys else None)
        return estimated

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W) in [0, 1]."""
        if (estimated := self.infer_embeddings(observation)) is not None:
            return in_chunks(self.network, estimated)
        templates, size = observation.templates, len(self.network.mean)
        assert templates is not None  # they are among the needs
        if templates.shape[-1] != size:
            raise ValueError(f"{self.name} was trained on templates of {size} values, got {templates.shape[-1]}")
        unit = functional.normalize(templates.to(self.network.mean), dim=2)
        unit = functional.normalize(unit.mean(dim=1), dim=1)
        return in_chunks(self.network, unit)
