"""Options of recogniser training, and the precision that ``auto`` stands for."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bench.recognition.augmentation import AugmentationOptions

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class TrainingOptions(BaseModel):
    """How a recogniser is trained. Frozen; unknown names are errors.

    The defaults of the optimiser (SGD, momentum 0.9, weight decay 5e-4) are those of ArcFace; see :data:`PUBLISHED`
    for the whole published schedule.

    Attributes:
        epochs: passes over the images, each with :attr:`views` copies of every image.
        batch_size: copies per step and process.
        views: protected copies of each image per epoch, each with a state of its own; None for as many as
            the defence asks for.
        learning_rate: at its peak.
        momentum: of SGD.
        weight_decay: on all learned values.
        schedule: ``cosine`` from the peak to zero, or ``step``: divided by ten at each milestone.
        milestones: epochs after which ``step`` divides.
        warmup_epochs: epochs of linear warm-up from zero; may be a fraction.
        clip_gradient_norm: largest norm of the gradient; None for no limit.
        head: margin head, a name in :data:`bench.recognition.heads.HEADS`.
        embedding_size: D.
        scale: s of the margin head.
        margin: m of the margin head.
        margin_warmup_epochs: epochs over which the margin grows from zero. A full margin from the start asks of
            random embeddings what they cannot give, and small training sets may never recover from it.
        label_smoothing: share of the target spread over all identities.
        dropout: before the embedding layer.
        precision: ``auto`` is bfloat16 where the hardware computes in it, else float32.
        augmentation: what is varied on the faces before they are protected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(24, ge=1)
    batch_size: int = Field(128, ge=2)
    views: int | None = Field(None, ge=1)
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = Field(1.0, ge=0)
    clip_gradient_norm: float | None = Field(None, gt=0)
    head: str = "arcface"
    embedding_size: int = Field(256, ge=2)
    scale: float = Field(32.0, gt=0)
    margin: float = Field(0.3, ge=0)
    margin_warmup_epochs: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    augmentation: AugmentationOptions = AugmentationOptions()

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> Self:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones: the epochs after which the learning rate is divided")
        if self.schedule == "cosine" and self.milestones:
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


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 faster than in float32.

    CUDA from Ampere on; processors with AVX512-BF16 or AMX. A processor that only emulates bfloat16 is slower in it
    than in float32, which is why oneDNN's own 'supported' is not asked.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Private in torch 2.6 to 2.x and without a public counterpart: absent simply means float32.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in probes)
    return False


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """The Fabric precision that ``precision`` stands for on ``device``.

    Raises:
        ValueError: an unknown name.
    """
    match precision:
        case "auto":
            return "bf16-mixed" if native_bfloat16(device) else "32-true"
        case "32-true" | "bf16-mixed" | "16-mixed":
            return precision
        case _:
            raise ValueError(f"unknown precision {precision!r}: auto, 32-true, bf16-mixed or 16-mixed")
