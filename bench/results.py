"""The result schema (version 1): what ``metrics.json`` holds.

Every figure is a :class:`Measure`: a value with its interval, the number of things it was computed
from and the direction it reads in; a figure that cannot be computed is null with a reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = "1"

#: Changes whenever figures of two versions cannot be compared any more (data, protocol, metric definitions).
PROTOCOL_VERSION = "1"

Direction = Literal["utility", "privacy"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Measure(_Model):
    """One figure.

    Attributes:
        value: the estimate, or None with a ``reason``.
        ci95: 95 % interval from the bootstrap over identities, or None.
        n: images or pairs it was computed from.
        higher_is_better_for: whom a higher value suits.
        reason: why the value is missing, or why it has no interval.
    """

    value: float | None
    ci95: tuple[float, float] | None = None
    n: int = 0
    higher_is_better_for: Direction
    reason: str | None = None

    @model_validator(mode="after")
    def _missing_has_reason(self) -> Self:
        if self.value is None and not self.reason:
            raise ValueError("a measure without a value needs a reason")
        return self


class Quartiles(_Model):
    median: float
    q1: float
    q3: float


class Throughput(_Model):
    """Speed of one stage: batched images per second and batch-1 latency."""

    images_per_second: Quartiles
    latency_ms: Quartiles
    batch: int
    repeats: int
    dtype: str
    device: str


class Verification(_Model):
    """How well a recogniser tells pairs apart."""

    accuracy: Measure
    auc: Measure
    eer: Measure
    tar_at_far: dict[str, Measure]
    accuracy_std: float | None = Field(None, description="standard deviation over the folds")
    pairs: int


class Utility(Verification):
    unprotected: Verification


class Linkage(_Model):
    """How well an attack tells whether two things show one person.

    Attributes:
        protected_plain: an intercepted representation against a plain face.
        protected_protected: two representations, intercepted independently.
        plain: two plain faces under the same attack: the ceiling.
        rank1: a representation finds its person among plain faces.
        d_sys: global unlinkability measure, by kind of pair: 0 unlinkable, 1 fully linkable.
        d_sys_chance: what it comes to at most, on average, where nothing links (of independent pairs).
    """

    protected_plain: Verification
    protected_protected: Verification
    plain: Verification
    rank1: Measure
    d_sys: dict[str, Measure]
    d_sys_chance: float | None = None


class Identity(_Model):
    """Identity leakage under the evaluator (DESIGN: type I against the same image, type II another)."""

    type1_tar: Measure
    type2_tar: Measure
    rank1: Measure
    cosine: Measure
    rank5: Measure | None = None
    knn_distance: Measure | None = None


class Quality(_Model):
    """How near recovered faces come to the originals."""

    ssim: Measure
    psnr: Measure
    psnr_aligned: Measure
    ms_ssim: Measure
    lpips: Measure
    identity: Identity


class Recovery(Quality):
    """Of a composite attack the figures are the pointwise worst case; ``members`` holds those of each attack."""

    floors: dict[str, Quality]
    ceiling: Quality
    members: dict[str, Quality] = {}


class StateInference(_Model):
    """How often the attack named what the defence had drawn.

    Attributes:
        faces: share of interceptions of which every channel was put in its place.
        channels: share of channels put in their place.
        chance: ``faces`` of uniform guessing, where the states can be counted.
    """

    faces: Measure
    channels: Measure
    chance: float | None = None


class StrengthPoint(_Model):
    """What leaks to an attack of one budget."""

    budget: float
    values: dict[str, Measure]


class StrengthCurve(_Model):
    """Leakage against the attacker's budget; the last point is the run's own result.

    Attributes:
        axis: what the budget counts.
        points: in ascending order of their budgets.
        gain_of_last_doubling: metric -> the last point minus the one before it on the same victims, with the paired
            interval over identities; null where the two budgets are less than a factor 1.5 apart.
        tolerance: metric -> what the lower end of that interval must exceed to count as a gain.
        unsaturated: whether any of these metrics gains; None where none could be judged.
    """

    axis: str
    points: list[StrengthPoint]
    gain_of_last_doubling: dict[str, Measure]
    tolerance: dict[str, float]
    unsaturated: bool | None


class PluginInfo(_Model):
    name: str
    options: dict[str, Any]


class DefenseInfo(PluginInfo):
    representation_shape: tuple[int, int, int]
    views: int
    states: int | None
    entropy_bits: float
    bytes_per_face: int
    details: dict[str, Any] = {}

    @classmethod
    def of(cls, description: dict[str, Any]) -> Self:
        """From what a defence says of itself; what only it knows of goes to ``details``."""
        own = {key: value for key, value in description.items() if key in cls.model_fields}
        return cls(**own, details={key: value for key, value in description.items() if key not in own})


class AttackInfo(PluginInfo):
    knowledge: str
    saturated: bool | None
    states_covered: bool | None
    curve: list[tuple[int, float]] = []
    details: dict[str, Any] = {}
    members: dict[str, AttackInfo] = {}


class EvaluatorInfo(_Model):
    name: str
    sha256: str | None
    accuracy: float
    threshold: float
    far_at_threshold: float


class DatasetInfo(_Model):
    name: str
    synthetic: bool
    image_size: int
    identities: dict[str, int]
    images: dict[str, int]
    pairs: int
    probes: int
    skipped: int
    details: dict[str, Any] = {}


class RunResult(_Model):
    """``metrics.json``. Of a failed or cancelled run only the head is there."""

    schema_: str = Field(SCHEMA_VERSION, alias="schema")
    protocol: str = PROTOCOL_VERSION
    run_id: str
    status: Literal["success", "error", "cancelled"]
    error: str | None = None
    warnings: list[str] = []
    defense: DefenseInfo | None = None
    attack: AttackInfo | None = None
    evaluator: EvaluatorInfo | None = None
    dataset: DatasetInfo | None = None
    utility: Utility | None = None
    recovery: Recovery | None = None
    linkage: Linkage | None = None
    state_inference: StateInference | None = None
    strength: StrengthCurve | None = None
    throughput: dict[str, Throughput] | None = None
    seconds: dict[str, float] = {}
    cached: list[str] = []
    peak_memory: dict[str, int] = {}

    def to_json(self) -> str:
        """The document as stored."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def read_result(path: Path) -> RunResult:
    """The result of a run directory or of its ``metrics.json``.

    Raises:
        OSError, pydantic.ValidationError: it cannot be read or is not of this schema.
    """
    if path.is_dir():
        path = path / "metrics.json"
    return RunResult.model_validate_json(path.read_bytes())


class PlannedStage(_Model):
    """One stage of ``--dry-run``; ``seconds`` is None where there is nothing to time it by."""

    name: str
    what: str
    cached: bool
    seconds: float | None = None


class RunPlan(_Model):
    """What ``bench run --dry-run`` prints."""

    run_id: str
    device: str
    precision: str
    config: dict[str, Any]
    stages: list[PlannedStage]
    seconds: float


if __name__ == "__main__":  # writes the shipped JSON schema
    import json

    target = Path(__file__).parent / "schema" / f"metrics-{SCHEMA_VERSION}.json"
    target.write_text(json.dumps(RunResult.model_json_schema(by_alias=True), indent=2) + "\n", encoding="utf-8")
