"""Options of recogniser training, and the margin heads by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bench.nets.options import AugmentationOptions
from bench.registry import Registry, target

if TYPE_CHECKING:
    from torch import nn

#: Options that a head takes beside its sizes and scale.
_PLAIN = ("margin", "label_smoothing")
_COMBINED = ("margin", "angle_factor", "cosine_margin")
_HEAD_OPTIONS = {
    "combined": (*_COMBINED, "label_smoothing"),
    "partial-fc": (*_COMBINED, "sample_rate", "interclass_filter"),
}


class TrainingOptions(BaseModel):
    """How a recogniser is trained. Frozen; unknown names are errors.

    The defaults of the optimiser (SGD, momentum 0.9, weight decay 5e-4) are those of ArcFace; see :data:`PUBLISHED`
    for the whole published schedule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(24, ge=1, description="Passes over the images, each with `views` copies of every image.")
    batch_size: int = Field(128, ge=2, description="Copies per step, over all processes together.")
    views: int | None = Field(
        None,
        ge=1,
        description="Protected copies of each image per epoch, each with its own state; null: what the defence asks.",
    )
    optimiser: Literal["sgd", "muon"] = Field(
        "sgd",
        description="sgd, or muon: steps of convolutions and linear layers are orthogonal matrices, and those of the "
        "rest SGD's. Half as many steps train as far, where steps are few; each takes a tenth longer or more.",
    )
    learning_rate: float = Field(
        0.1, gt=0, description="Learning rate at its peak; of muon's matrices, a step's share of their norm."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay of SGD, on all learned values.")
    schedule: Literal["cosine", "linear", "step"] = Field(
        "cosine",
        description="How the rate falls from its peak: to zero along a cosine or a line, or by ten at each milestone.",
    )
    milestones: tuple[int, ...] = Field((), description="Epochs after which schedule step divides.")
    warmup_epochs: float = Field(1.0, ge=0, description="Epochs of linear warm-up from zero; may be a fraction.")
    clip_gradient_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient; null for no limit.")
    head: str = Field("arcface", description="Margin head: arcface, combined, cosface or partial-fc.")
    embedding_size: int = Field(256, ge=2, description="Dimensions of the embedding; under a teacher, as many as its.")
    classification: float = Field(
        1.0, ge=0, le=1000, description="Weight of the margin head's loss; 0, under a teacher only, leaves it out."
    )
    distillation: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="Weight of the teacher's loss, the mean of 1 - cos(embedding, the teacher's of the same face).",
    )
    scale: float = Field(32.0, gt=0, description="Radius s of the sphere on which logits live.")
    margin: float = Field(0.3, ge=0, description="Margin m of cos(m1 t + m) - m3, in radians; of cosface it is m3.")
    angle_factor: float = Field(1.0, ge=1, le=4, description="Margin m1 of combined and partial-fc.")
    cosine_margin: float = Field(
        0.0, ge=0, lt=1, description="Margin m3 of combined and partial-fc; with margin=0 they are CosFace."
    )
    margin_warmup_epochs: float = Field(
        0.0, ge=0, description="Epochs over which the margins grow from none, as small training sets may need."
    )
    sample_rate: float = Field(
        0.1, gt=0, le=1, description="Of partial-fc: share of the identities whose centres take part in a step."
    )
    interclass_filter: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Of partial-fc: negatives of a higher cosine are left out; 0.4 in the paper, null for none.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread over all identities; not with partial-fc."
    )
    label_noise: float = Field(
        0.0, ge=0, lt=1, description="Share of the training images that get another identity's label, for experiments."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the embedding layer.")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto", description="Precision: auto is bfloat16 where the hardware computes in it, else float32."
    )
    compile: bool = Field(
        False,
        description="On a CUDA device, compile the network (torch.compile): a minute at first, a third of the time of "
        "each step of large maps saved. Worth it from some ten thousand steps on; not with head partial-fc.",
    )
    sync_batch_norm: bool = Field(
        True, description="Normalise by the batch of all processes, not by each one's part of it."
    )
    augmentation: AugmentationOptions = Field(
        AugmentationOptions(), description="What is varied on the faces before they are protected."
    )

    @property
    def head_options(self) -> dict[str, Any]:
        """Keyword arguments of the head beside its sizes."""
        return {"scale": self.scale, **{name: getattr(self, name) for name in _HEAD_OPTIONS.get(self.head, _PLAIN)}}

    @model_validator(mode="after")
    def _head_takes_its_options(self) -> Self:
        taken = _HEAD_OPTIONS.get(self.head, _PLAIN)
        for name in sorted({name for names in _HEAD_OPTIONS.values() for name in names} | set(_PLAIN)):
            if name not in taken and getattr(self, name) != type(self).model_fields[name].default:
                heads = ", ".join(head for head, names in _HEAD_OPTIONS.items() if name in names)
                raise ValueError(
                    f"head {self.head} takes no {name}"
                    + (f"; it belongs to head {heads}" if heads else "; leave it out")
                )
        # At and beyond this margin the target lies below every angle that it can reach.
        limit = 1 if self.head == "cosface" else math.pi / 2
        if self.margin >= limit:
            raise ValueError(f"margin of head {self.head} must lie in [0, {limit:.4g}), got {self.margin}")
        if self.head == "partial-fc" and self.precision == "16-mixed":
            raise ValueError("head partial-fc computes in 32-true or bf16-mixed: its centres' gradients need the range")
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if not self.classification and not self.distillation:
            raise ValueError("classification and distillation are both 0: there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> Self:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones: the epochs after which the learning rate is divided")
        if self.schedule != "step" and self.milestones:
            raise ValueError("milestones belong to schedule 'step'; leave them out or choose schedule=step")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones must be positive and ascending, got {list(self.milestones)}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) cannot exceed epochs ({self.epochs})")
        return self


#: ArcFace as PartialFace and its relatives train it (Mi et al., ICCV 2023, section 5.1): batch 64 in all.
PUBLISHED = TrainingOptions(
    epochs=24,
    batch_size=64,
    learning_rate=0.1,
    schedule="step",
    milestones=(10, 18, 22),
    warmup_epochs=0,
    head="arcface",
    embedding_size=512,
    scale=64.0,
    margin=0.5,
)


#: Margin heads by name; all are called with embeddings and labels and give a loss and hits.
HEADS: Registry[type[nn.Module]] = Registry("head")
HEADS.add("arcface", target("bench.nets.heads:ArcFace"))
HEADS.add("combined", target("bench.nets.heads:ArcFace"))
HEADS.add("cosface", target("bench.nets.heads:CosFace"))
HEADS.add("partial-fc", target("bench.recognition.partial_fc:PartialFC"))
