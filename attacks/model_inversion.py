"""Model inversion: gradients through defence and recogniser towards a face with the victim's embedding."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, Capability, FitReport, Knowledge, Observation, RecoveryAttack
from attacks.parts import losses
from attacks.parts.generator import (
    FaceGenerator,
    GeneratorOptions,
    build_generator,
    change_view,
    draw_views,
    fit_generator,
)
from attacks.parts.training import Trainer
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense

#: Faces at once where no gradient is needed.
_CHUNK = 64
#: Public faces that are embedded, how often each (every other time mirrored), and identities told apart among them.
_PUBLIC_FACES = 8192
_PUBLIC_ROUNDS = 4
_PUBLIC_CLASSES = 512
#: Faces of a public identity whose mean embedding is its class centre.
_ENROLMENT = 8
#: Weights of the prior to choose from, and how much worse than the best the chosen one may recover public faces.
_WEIGHTS = (0.001, 0.01, 0.1, 1.0, 10.0)
_TOLERANCE = 0.02
#: Strengths of the ridge regression to choose from, as shares of the embeddings' mean variance.
_RIDGES = tuple(10.0**power for power in range(-5, 3))
#: Adam's momentum (GMI, KED-MI), and the share of the steps over which its rate falls to zero at the end.
_MOMENTUM = 0.9
_FALL = 0.3
#: Without a generator: pictures, each of half the last one's resolution, that a face is a sum of.
_OCTAVES = 4
#: Brings the total variation of a face, about 0.1, to the size of the penalty of a code.
_VARIATION = 10.0
#: Largest shift and change of scale of the views by which an outcome is judged.
_VIEW_SHIFT = 0.04
_VIEW_ZOOM = 0.05
#: Rate of Adam with a generator, in standard deviations of what is not known of a code, and without, in grey levels.
_CODE_STEP = 0.1
_PIXEL_STEP = 0.01


class ModelInversionOptions(GeneratorOptions):
    """Options of :class:`ModelInversion`, beside those of the generator."""

    prior: Literal["generator", "none"] = Field(
        "generator",
        description="generator: a generator of faces trained on public ones, whose codes are optimised (GMI, KED-MI); "
        "none: pixels are, from the mean public face on (Fredrikson et al. 2015).",
    )
    target: Literal["template", "class"] = Field(
        default="template", description="template: the intercepted one; class: the enrolled class centre."
    )
    loss: Literal["cosine", "poincare", "max-margin", "logit"] = Field(
        "cosine",
        description="cosine to the target; or, on similarities to the target and to the class centres of public "
        "identities, max-margin (PLG-MI), poincare (PPA) or logit (LOMMA, with its regulariser).",
    )
    steps: int = Field(200, ge=1, le=1_000_000, description="Gradient steps per victim.")
    starts: int = Field(
        default=3, ge=1, le=1000, description="Starting points per victim, of which the best outcome is kept."
    )
    states: int = Field(
        default=2, ge=1, le=1000, description="Fresh states drawn per step, over which the loss is averaged."
    )
    step_size: float | None = Field(
        None, gt=0, le=100, description="Rate of Adam; none for 0.1 with a generator, 0.01 grey levels of 1 without."
    )
    batch_size: int = Field(256, ge=1, le=65536, description="Faces at once through the recogniser.")
    selection_views: int = Field(
        16, ge=1, le=1000, description="Random views, each under a fresh state, that an outcome is judged by (PPA)."
    )
    prior_weight: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Weight of the prior beside the loss: how far a code is from where public faces of such embeddings "
        "lie, or, without a generator, the total variation. None chooses among 0.001, 0.01, 0.1, 1 and 10 by attacking "
        "held-out public faces.",
    )
    tuning_faces: int = Field(
        default=32, ge=1, le=10_000, description="Held-out public faces that the weight of the prior is chosen on."
    )
    feature_weight: float = Field(default=0.01, ge=0, le=1000, description="Weight of LOMMA's regulariser.")


class CodeEstimate(nn.Module):
    """What public faces say of a generator's code given an embedding: normal about a linear estimate.

    Codes are in standard deviations of those of public faces. The estimate is a ridge regression; its error, measured
    on identities held out, is what remains to be found by gradients.
    """

    code_mean: Tensor
    code_std: Tensor
    embedding_mean: Tensor
    weight: Tensor
    error: Tensor

    def __init__(self, embedding_size: int, latent_size: int) -> None:
        super().__init__()
        self.register_buffer("code_mean", torch.zeros(latent_size))
        self.register_buffer("code_std", torch.ones(latent_size))
        self.register_buffer("embedding_mean", torch.zeros(embedding_size))
        self.register_buffer("weight", torch.zeros(embedding_size, latent_size))
        self.register_buffer("error", torch.ones(latent_size))

    @torch.no_grad()
    def fit(self, codes: Tensor, embeddings: Tensor, held_out: Tensor) -> None:
        """Fit to pairs (M, L), (M, D); choose the ridge and measure the error by the ``held_out`` ones, bool (M,)."""
        known = ~held_out
        self.code_mean.copy_(codes[known].mean(dim=0))
        # A value of the code that never varies says nothing.
        self.code_std.copy_(codes[known].std(dim=0, correction=0).clamp(min=1e-3))
        self.embedding_mean.copy_(embeddings[known].mean(dim=0))
        x = (embeddings - self.embedding_mean).double()
        y = ((codes - self.code_mean) / self.code_std).double()
        variances, axes = torch.linalg.eigh(x[known].T @ x[known])
        projected = axes.T @ (x[known].T @ y[known])
        best = torch.tensor(torch.inf)
        for ridge in _RIDGES:
            weight = axes @ (projected / (variances + ridge * variances.mean() + 1e-12)[:, None])
            error = (y[held_out] - x[held_out] @ weight).square().mean(dim=0)
            if error.mean() < best:
                best = error.mean().cpu()
                self.weight.copy_(weight)
                self.error.copy_(error.sqrt().clamp(min=0.05))

    def code(self, embeddings: Tensor, surprise: Tensor) -> Tensor:
        """Codes (N, L) that differ from those expected of embeddings (N, D) by ``surprise`` (N, L) in errors."""
        expected = (embeddings - self.embedding_mean) @ self.weight
        return self.code_mean + self.code_std * (expected + self.error * surprise)


# Of what is optimised in place of the faces of some targets: ``variables``; ``faces()``, (N, 3, H, W) in [0, 1],
# differentiable in them; ``penalty(faces)``, (N,), how unlikely these are; and Adam's usual ``step_size``.


class _Codes:
    """Codes of a generator, by their distance to those expected of the target."""

    step_size = _CODE_STEP

    def __init__(
        self, network: FaceGenerator, estimate: CodeEstimate, targets: Tensor, starts: int, generator: torch.Generator
    ) -> None:
        """Of each target's (N, D) ``starts``, the first is the expected code, the others are draws about it."""
        self._network, self._estimate = network, estimate
        self._targets = targets.repeat_interleave(starts, dim=0)
        surprise = torch.randn(len(self._targets), network.latent_size, generator=generator)
        surprise[::starts] = 0
        self.variables = [surprise.to(targets)]

    def faces(self) -> Tensor:
        made: Tensor = self._network(self._estimate.code(self._targets, self.variables[0]))
        return made

    def penalty(self, faces: Tensor) -> Tensor:
        return self.variables[0].square().mean(dim=1)


class _Pixels:
    """Pixels about the mean face, as a sum of pictures of falling resolution.

    Such a sum can show no more than pixels can, but a step moves large shapes as readily as single pixels (Olah et al.
    2017, 'Feature Visualization', on preconditioning). Pixels alone end in noise that fools only the attacked network.
    """

    step_size = _PIXEL_STEP

    def __init__(self, mean_face: Tensor, count: int, starts: int, generator: torch.Generator) -> None:
        """Of each of ``count`` targets' ``starts``, the first is the mean face, the others have smooth noise on it."""
        self._mean_face = mean_face
        size = mean_face.shape[-1]
        sides = [max(1, -(-size // 2**octave)) for octave in range(_OCTAVES)]
        pictures = [torch.zeros(count * starts, 3, side, side) for side in sides]
        noise = 0.1 * torch.randn(pictures[-1].shape, generator=generator)
        noise[::starts] = 0
        pictures[-1] = noise
        self.variables = [picture.to(mean_face) for picture in pictures]

    def faces(self) -> Tensor:
        size = self._mean_face.shape[-2:]
        total = self._mean_face.expand(len(self.variables[0]), -1, -1, -1)
        for picture in self.variables:
            total = total + functional.interpolate(picture, size, mode="bilinear", align_corners=False)
        # Straight through: a pixel beyond the range still feels the gradient that could bring it back.
        return total + (total.clamp(0, 1) - total).detach()

    def penalty(self, faces: Tensor) -> Tensor:
        return _VARIATION * losses.total_variation(faces)


@dataclass(frozen=True, slots=True)
class _Goal:
    """What the faces of N victims are to match.

    Attributes:
        targets: (N, D), unit rows.
        each: (N, k, D), unit rows, the target of each interception where its state is known, else None.
        states: int64 (N, k, S), those states, else None.
    """

    targets: Tensor
    each: Tensor | None = None
    states: Tensor | None = None

    def pick(self, index: Tensor | slice) -> _Goal:
        """The goal of some of the victims, or of victims repeated."""
        each = None if self.each is None else self.each[index]
        return _Goal(self.targets[index], each, None if self.states is None else self.states[index])

    def draw(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Targets (N, D) and states (N, S), None for fresh ones, of draw ``number``: interceptions in turn."""
        if self.each is None or self.states is None:
            return self.targets, None
        interception = number % self.each.shape[1]
        return self.each[:, interception], self.states[:, interception]


class ModelInversion(RecoveryAttack):
    """Model inversion with or without a generative prior.

    Minimises the loss between the target and the embedding of the face, averaged over the defence's states, by
    gradients through recogniser and defence. At ``oracle`` each interception is matched under its own known state
    instead. Several templates of a victim are averaged.
    """

    name = "model-inversion"
    summary = "gradients through defence and recogniser to a face with the victim's embedding"
    cost = "fit: a small generator (minutes on a CPU); recovery: steps x starts x states passes a face"
    reference = (
        "Fredrikson et al., CCS 2015; Zhang et al. (GMI), CVPR 2020; Chen et al. (KED-MI), ICCV 2021; "
        "Struppek et al. (PPA), ICML 2022; Yuan et al. (PLG-MI), AAAI 2023; Nguyen et al. (LOMMA), CVPR 2023"
    )
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.RECOGNISER, Capability.TEMPLATES})
    needs_gradients = True
    budgets: ClassVar = {"steps": "steps"}
    opens = frozenset({"mixture"})
    Options = ModelInversionOptions
    presets: ClassVar = {
        "quick": {
            **{"latent_size": 64, "generator_width": 16, "generator_images": 2_400, "generator_batch_size": 16},
            **{"steps": 24, "starts": 1, "states": 1, "tuning_faces": 8, "batch_size": 64},
        },
        "cpu": {
            **{"latent_size": 96, "generator_width": 24, "generator_images": 24_000, "generator_batch_size": 16},
            **{"steps": 60, "starts": 2, "states": 1, "selection_views": 8, "batch_size": 64},
        },
        "gpu": {"adversarial": 0.002},
        # GMI and KED-MI: 1,500 steps at 0.02 from five starts, over the codes of a generator trained against a critic.
        "paper": {"adversarial": 0.002, "steps": 1500, "starts": 5, "states": 1, "step_size": 0.02},
    }
    options: ModelInversionOptions

    generator: FaceGenerator | None
    estimate: CodeEstimate | None
    mean_face: Tensor
    mean_embedding: Tensor
    centres: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    prior_weight: Tensor

    def inapplicable(self, defense: Defense) -> str | None:
        """It follows the gradient of the embedding in the face."""
        return None if defense.differentiable else f"{defense.name} has no gradient in the face to follow"

    def build(self, adversary: Adversary) -> None:
        """Build generator and buffers for the adversary's faces and recogniser."""
        faces, identities = adversary.faces, adversary.identities
        if adversary.recogniser is None:
            raise ValueError(f"{self.name} needs the recogniser's weights")
        # A copy: the provider's keeps its gradients and its mode. In a tuple: no part of this attack's weights.
        self._recogniser = (copy.deepcopy(adversary.recogniser).requires_grad_(False).eval().to(self.device),)
        with torch.no_grad():
            size = self._embed(to_float(faces[:1].to(self.device)), derived(self.seed, "probe")).shape[1]
        self.generator, self.estimate = None, None
        if self.options.prior == "generator":
            self.generator = build_generator(self.options, faces.shape[-1], self.seed)
            self.estimate = CodeEstimate(size, self.options.latent_size)
        self.register_buffer("mean_face", torch.zeros(faces.shape[1:]))
        self.register_buffer("mean_embedding", torch.zeros(size))
        self.register_buffer("centres", torch.zeros(min(len(torch.unique(identities)), _PUBLIC_CLASSES), size))
        self.register_buffer("feature_mean", torch.zeros(size))
        self.register_buffer("feature_std", torch.ones(size))
        self.register_buffer("prior_weight", torch.zeros(()))

    def _embed(self, faces: Tensor, generator: torch.Generator, states: Tensor | None = None) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces protected under ``states``, or fresh ones."""
        sent = self.mechanism.protect(faces, generator, state=states)
        embeddings: Tensor = self._recogniser[0](sent.representation).float()
        return embeddings

    # -- fitting --------------------------------------------------------------------------------------

    def fit(self, adversary: Adversary) -> FitReport:
        """Train the generator on public faces, embed public faces, and choose the weight of the prior on them."""
        trainer = self.options.trainer(adversary, self.seed)
        report = FitReport() if self.generator is None else fit_generator(self.generator, trainer, self.options)
        self._learn(trainer)
        details = dict(report.details)
        if self.estimate is not None:
            details["code_error"] = float(self.estimate.error.square().mean())
        if self.options.prior_weight is None:
            details["prior_weights"] = self._choose_weight(trainer)
        else:
            self.prior_weight.fill_(self.options.prior_weight)
        details["prior_weight"] = float(self.prior_weight)
        return replace(report, details=details)

    @torch.no_grad()
    def _learn(self, trainer: Trainer) -> None:
        """Set all buffers but the weight from embeddings of public faces."""
        identities, count = trainer.adversary.identities, len(trainer.faces)
        self.mean_face.copy_(trainer.mean_face(torch.arange(count)))
        # Random, but the first face of each identity before all second ones.
        order = torch.randperm(count, generator=derived(self.seed, "public"))
        order = order[_occurrence(identities[order]).argsort(stable=True)][:_PUBLIC_FACES]
        generator = derived(self.seed, "public states")
        features, codes = [], []
        for number in range(_PUBLIC_ROUNDS):
            for index in order.split(_CHUNK):
                shown = trainer.floats(index)
                shown = shown.flip(-1) if number % 2 else shown
                features.append(self._embed(shown, generator))
                if self.generator is not None:
                    codes.append(self.generator.encode(shown))
        known = torch.cat(features)
        units = functional.normalize(known, dim=1)
        self.mean_embedding.copy_(units.mean(dim=0))
        self.feature_mean.copy_(known.mean(dim=0))
        self.feature_std.copy_(known.std(dim=0, correction=0).clamp(min=1e-6))
        names = torch.unique(identities[order])
        names = names[torch.randperm(len(names), generator=generator)[: len(self.centres)]].sort().values
        row = torch.searchsorted(names, identities[order]).clamp(max=len(names) - 1)
        member = (names[row] == identities[order]).repeat(_PUBLIC_ROUNDS).to(self.device)
        row = row.repeat(_PUBLIC_ROUNDS).to(self.device)
        total = torch.zeros_like(self.centres).index_add_(0, row[member], units[member])
        self.centres.copy_(functional.normalize(total, dim=1))
        if self.estimate is not None:
            unseen = torch.isin(order, trainer.held_out).repeat(_PUBLIC_ROUNDS).to(self.device)
            self.estimate.fit(torch.cat(codes), units, unseen)

    def _choose_weight(self, trainer: Trainer) -> dict[str, float]:
        """Set the weight of the prior to the lightest that recovers held-out public faces about as well as any.

        A light prior follows the template more closely, which is the person's; one too light ends in faces that only
        the attacked recogniser takes for the person. The second shows in the distance to the true faces.

        Returns:
            For each weight the distance, L1 + SSIM as the generator is trained with, of recovered to true faces.
        """
        generator = derived(self.seed, "tuning")
        order = torch.randperm(len(trainer.held_out), generator=generator)
        chosen = trainer.held_out[order[: self.options.tuning_faces]]
        with torch.no_grad():
            true = trainer.floats(chosen)
            sent = self.mechanism.protect(true, generator)
            embedded = functional.normalize(self._recogniser[0](sent.representation).float(), dim=1)
            if self.options.target == "class":
                goal = _Goal(self._centres_without(trainer, chosen, embedded, generator))
            elif self.adversary.knowledge is Knowledge.ORACLE and sent.state is not None:
                goal = _Goal(embedded, embedded[:, None], sent.state[:, None].to(self.device))
            else:
                goal = _Goal(embedded)
        distances = {}
        for weight in _WEIGHTS:
            self.prior_weight.fill_(weight)
            with torch.enable_grad():
                made = self._recover(goal, "tuning")
            distances[weight] = float(losses.reconstruction(made, true, self.options.generator_ssim))
        enough = (1 + _TOLERANCE) * min(distances.values())
        self.prior_weight.fill_(min(weight for weight, distance in distances.items() if distance <= enough))
        return {f"{weight:g}": distance for weight, distance in distances.items()}

    def _centres_without(
        self, trainer: Trainer, chosen: Tensor, embedded: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The class centre of each chosen public face, from other faces of its identity; its own where it has none."""
        centres, identities = [], trainer.adversary.identities
        for face, embedding in zip(chosen.tolist(), embedded, strict=True):
            others = (identities == identities[face]).nonzero().flatten()
            others = others[others != face][:_ENROLMENT]
            if len(others):
                embedding = functional.normalize(self._embed(trainer.floats(others), generator), dim=1).mean(dim=0)
            centres.append(functional.normalize(embedding, dim=0))
        return torch.stack(centres)

    # -- recovering -----------------------------------------------------------------------------------

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W) in [0, 1]."""
        return self._recover(self._goal(observation), "run")

    def _goal(self, observation: Observation) -> _Goal:
        device, what = self.device, self.options.target
        known = observation.templates if what == "template" else observation.enrolled
        if known is None:
            raise ValueError(f"{self.name} was handed no {what} to invert")
        if known.shape[-1] != len(self.mean_embedding):
            raise ValueError(
                f"{self.name} was handed a {what} of {known.shape[-1]} values, the recogniser's embeddings have "
                f"{len(self.mean_embedding)}"
            )
        known = functional.normalize(known.to(device, torch.float32), dim=-1)
        if what == "class":
            return _Goal(known)
        targets = functional.normalize(known.mean(dim=1), dim=1)
        if observation.states is None:
            return _Goal(targets)
        return _Goal(targets, known, observation.states.to(device))

    def _recover(self, goal: _Goal, name: str) -> Tensor:
        """Faces (N, 3, H, W) for a goal, some victims at a time; ``name`` names the draws."""
        victims = max(1, self.options.batch_size // (self.options.starts * self.options.states))
        starts = range(0, len(goal.targets), victims)
        parts = ((goal.pick(slice(start, start + victims)), derived(self.seed, name, start)) for start in starts)
        return torch.cat([self._invert(part, draws) for part, draws in parts])

    def _invert(self, goal: _Goal, generator: torch.Generator) -> Tensor:
        """The best face for each of the goal's N victims."""
        options = self.options
        space: _Codes | _Pixels
        if self.generator is None or self.estimate is None:
            space = _Pixels(self.mean_face, len(goal.targets), options.starts, generator)
        else:
            space = _Codes(self.generator, self.estimate, goal.targets, options.starts, generator)
        each = torch.arange(len(goal.targets), device=goal.targets.device).repeat_interleave(options.starts)
        goal = goal.pick(each)
        rate = options.step_size or space.step_size
        for variable in space.variables:
            variable.requires_grad_()
        optimizer = torch.optim.Adam(space.variables, lr=rate, betas=(_MOMENTUM, 0.999))
        fall = max(1, round(_FALL * options.steps))
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (options.steps - step) / fall)
            faces = space.faces()
            loss = self._loss(faces, goal, step, generator) + self.prior_weight * space.penalty(faces)
            # The sum, so that no victim's or start's steps depend on the others.
            gradients = torch.autograd.grad(loss.sum(), space.variables)
            if not all(torch.isfinite(value).all() for value in (loss, *gradients)):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step + 1}; try a lower step_size (now {rate:g})"
                )
            for variable, gradient in zip(space.variables, gradients, strict=True):
                variable.grad = gradient
            optimizer.step()
        with torch.no_grad():
            return self._best(space, goal, generator)

    def _loss(self, faces: Tensor, goal: _Goal, step: int, generator: torch.Generator) -> Tensor:
        """Loss (N,), averaged over draws of the state."""
        total = faces.new_zeros(len(faces))
        for number in range(self.options.states):
            targets, states = goal.draw(step * self.options.states + number)
            total = total + self._mismatch(self._embed(faces, generator, states), targets)
        return total / self.options.states

    def _mismatch(self, features: Tensor, targets: Tensor) -> Tensor:
        if self.options.loss == "cosine":
            return losses.cosine(features, targets)
        # About the mean embedding, for those of a network of little training share most of their direction.
        mean = self.mean_embedding
        unit = functional.normalize(features, dim=1) - mean
        logits = losses.class_logits(unit, targets - mean, functional.normalize(self.centres - mean, dim=1))
        if self.options.loss == "max-margin":
            return losses.max_margin(logits)
        if self.options.loss == "poincare":
            return losses.poincare(logits)
        unlike = losses.feature_distance(features, self.feature_mean, self.feature_std)
        return losses.negative_logit(logits) + self.options.feature_weight * unlike

    def _best(self, space: _Codes | _Pixels, goal: _Goal, generator: torch.Generator) -> Tensor:
        """Of each victim's outcomes the one most similar to the target over random views, less its penalty."""
        options, faces = self.options, space.faces()
        if options.starts == 1:
            return faces
        score = -self.prior_weight * space.penalty(faces)
        for number in range(options.selection_views):
            targets, states = goal.draw(number)
            views = draw_views(len(faces), generator, shift=_VIEW_SHIFT, zoom=_VIEW_ZOOM, size=faces.shape[-1])
            features = self._embed(change_view(faces, views).clamp(0, 1), generator, states)
            score -= losses.cosine(features, targets) / options.selection_views
        best = score.view(-1, options.starts).argmax(dim=1)
        chosen: Tensor = faces.unflatten(0, (-1, options.starts))[torch.arange(len(best), device=best.device), best]
        return chosen


def _occurrence(labels: Tensor) -> Tensor:
    """int64 (N,): how many earlier entries have the same label.

    >>> _occurrence(torch.tensor([5, 3, 5, 5]))
    tensor([0, 0, 1, 2])
    """
    order = labels.argsort(stable=True)
    ranked = labels[order]
    first = torch.searchsorted(ranked, ranked)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(labels)) - first)
