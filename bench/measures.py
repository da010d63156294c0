"""Every figure of a result, declared once: where it stands, which way it reads, how it is shown and guarded.

A new metric is a function that computes it, its field in :mod:`bench.results`, and its :class:`Kind` here. Results,
terminal, reports, gate, ``bench list metrics`` and docs/metrics.md read the rest from here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: What a higher value means: better recognition, more that leaks, less that leaks, or a higher price.
Direction = Literal["utility", "leakage", "privacy", "cost"]


#: No figure is larger, and its square is a number.
LARGEST = 1e15


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure as a metric computes it, or the reason why there is none.

    Attributes:
        value: the figure; None where it cannot be measured.
        ci95: lower and upper end of its 95 % confidence interval; None where there is none to give.
        n: how many images, pairs or probes the value was computed from.
        reason: why ``value`` or ``ci95`` is None; None where both are given.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None or self.ci95 is None) and not self.reason:
            raise ValueError("an estimate without a value or an interval must say why")
        if self.value is None and self.ci95 is not None:
            raise ValueError("an interval needs a value")


class ResultModel(BaseModel):
    """Part of what a command prints as JSON: unknown keys are errors, infinite numbers null."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Measure(ResultModel):
    """One figure as it stands in a result."""

    value: float | None = Field(description="the estimate; null with a reason where it cannot be measured")
    ci95: tuple[float, float] | None = Field(None, description="95 % interval from the bootstrap over identities")
    n: int = Field(0, ge=0, description="images or pairs it was computed from")
    direction: Direction = Field(description="what a higher value means")
    reason: str | None = Field(None, description="why the value is missing, or why it has no interval")

    @model_validator(mode="after")
    def _missing_has_reason(self) -> Self:
        if self.value is None and not self.reason:
            raise ValueError("a measure without a value needs a reason")
        if any(LARGEST < abs(number) < math.inf for number in (self.value or 0.0, *(self.ci95 or ()))):
            raise ValueError("no figure is so large")
        if self.ci95 is not None and self.ci95[0] > self.ci95[1]:
            raise ValueError("an interval begins at its lower end")
        return self

    @classmethod
    def of(cls, estimate: Estimate, direction: Direction) -> Self:
        """An estimate of a figure that reads in ``direction``; :meth:`Kind.measure` knows it by the figure."""
        return cls(value=estimate.value, ci95=estimate.ci95, n=estimate.n, direction=direction, reason=estimate.reason)


@dataclass(frozen=True, slots=True)
class Guard:
    """How the gate guards a figure unless its baseline says otherwise.

    Attributes:
        tolerance: change in the harmful direction that nobody minds, in the figure's own unit.
        seed_sd: standard deviation between runs of other seeds beyond the choice of victims, assumed as far as the
            baseline's own runs do not tell (:func:`bench.gate.comparison.moderated`).
        repeat_sd: the same between runs of one seed that were trained anew: other threads, another machine.
        limit: the value at which everything is lost; None where there is none.
    """

    tolerance: float
    seed_sd: float
    repeat_sd: float
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One figure.

    Attributes:
        heading: of its column.
        place: where it stands in the result of an attack or of a run, dotted.
        direction: what a higher value means.
        meaning: one sentence for people who see it for the first time.
        unit: after the heading; empty for a figure without one.
        ends: the lowest and the highest value that it can take.
        decimals: shown at most; fewer where the interval is wide.
        short: heading where there is little room; empty for ``heading``.
        headline: whether the summary of a report has a column of it.
        guess: what guessing gets; None where that has to be measured.
        guard: how the gate guards it; None for a figure that it does not guard.
        canary: how it guards the same figure of unprotected faces: where that gets worse, the attack broke.
    """

    heading: str
    place: str
    direction: Direction
    meaning: str
    unit: str = ""
    ends: tuple[float, float] = (-math.inf, math.inf)
    decimals: int = 3
    short: str = ""
    headline: bool = False
    guess: float | None = None
    guard: Guard | None = None
    canary: Guard | None = None

    @property
    def scale(self) -> float:
        """What a stored value is multiplied with to be shown: rates are stored as shares of 1."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def span(self) -> str:
        """The values that it can take, in words, as they are shown."""
        low, high = (self.scale * end for end in self.ends)
        if math.isinf(high):
            return "" if math.isinf(low) else f"{low:g} and above"
        if math.isinf(low):
            return f"at most {high:g} {self.unit}"
        return f"{low:g}..{high:g}" + " %" * (self.unit == "%")

    @property
    def label(self) -> str:
        """Heading and unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    @property
    def column(self) -> str:
        """Heading and unit for the narrow columns of a terminal."""
        return f"{self.short or self.heading} {self.unit}".strip()

    @property
    def group(self) -> str:
        """What it tells of: utility, recovery, identity, linkage, state inference, defense or throughput."""
        parts = self.place.split(".")
        return "identity" if "identity" in parts else parts[0].replace("_", " ")

    @property
    def ceiling(self) -> str:
        """Where the same figure of unprotected faces stands; empty where there is none."""
        for protected, plain in _UNPROTECTED.items():
            if self.place.startswith(protected):
                return plain + self.place.removeprefix(protected)
        return ""

    @property
    def leaks(self) -> int:
        """+1 where a higher value leaks more, -1 where a lower one does, 0 where it tells of utility or cost."""
        return {"leakage": 1, "privacy": -1}.get(self.direction, 0)

    def measure(self, estimate: Estimate) -> Measure:
        """An estimate of this figure as it stands in a result."""
        return Measure.of(estimate, self.direction)


_UNPROTECTED = {
    "utility.": "utility.unprotected.",
    "recovery.": "recovery.ceiling.",
    "linkage.protected_plain.": "linkage.plain.",
}


_rate = partial(Kind, unit="%", ends=(0.0, 1.0), decimals=1)
_LINKAGE = "linkage.protected_plain"
#: Guards of rates: of what leaks of faces, of what links, and of recognition.
_LEAKED = Guard(0.03, 0.03, 0.015, limit=1.0)
_LINKED = Guard(0.02, 0.05, 0.03, limit=1.0)
_RECOGNISED = Guard(0.02, 0.05, 0.03, limit=0.5)

# A table: name, then heading, place, direction and meaning, then what sets it apart.
# fmt: off
#: Name of each figure -> what there is to know of it, in the order in which figures are listed.
KINDS: Mapping[str, Kind] = MappingProxyType({
    "accuracy": _rate(
        "accuracy", "utility.accuracy", "utility",
        "Recognition behind the defence: share of face pairs told apart right (LFW View 2).", guard=_RECOGNISED),
    "auc": _rate(
        "AUC", "utility.auc", "utility",
        "Area under the ROC curve of the pairs behind the defence.", guard=_RECOGNISED),
    "eer": _rate(
        "EER", "utility.eer", "cost", "Error rate at which FAR and 1 - TAR are equal."),
    "tar_at_far": _rate(
        "TAR@FAR", "utility.tar_at_far", "utility",
        "Genuine pairs accepted at a given share of accepted impostors: 1 - FNMR at FMR (ISO/IEC 19795-1)."),
    "identified": _rate(
        "rank-1 identification", "utility.identification.rank1", "utility",
        "Probes whose best match in a gallery is of their person (closed set)."),
    "tpir_at_fpir": _rate(
        "TPIR@FPIR", "utility.identification.tpir_at_fpir", "utility",
        "Probes found in a gallery at a given share of searches that raise a false alarm (open set)."),
    "ssim": Kind(
        "SSIM", "recovery.ssim", "leakage",
        "Structural similarity of recovered and original face; 1 is the original.", ends=(-1.0, 1.0), headline=True,
        guard=Guard(0.01, 0.007, 0.004, limit=1.0), canary=Guard(0.03, 0.007, 0.004, limit=0.0)),
    "psnr": Kind(
        "PSNR", "recovery.psnr", "leakage",
        "Peak signal-to-noise ratio of the recovered face; punishes brightness shifts.",
        unit="dB", ends=(-math.inf, 100.0), decimals=2, headline=True),
    "psnr_aligned": Kind(
        "PSNR aligned", "recovery.psnr_aligned", "leakage",
        "PSNR after the best affine fit of each colour: what a person would still see.",
        unit="dB", ends=(-math.inf, 100.0), decimals=2, short="aligned", headline=True, guard=Guard(0.25, 0.4, 0.15)),
    "ms_ssim": Kind(
        "MS-SSIM", "recovery.ms_ssim", "leakage", "Structural similarity over several scales.", ends=(0.0, 1.0)),
    "lpips": Kind(
        "LPIPS", "recovery.lpips", "privacy",
        "Perceptual distance to the original (v0.1, AlexNet); 0 is the original.", ends=(0.0, math.inf), headline=True,
        guard=Guard(0.01, 0.01, 0.004, limit=0.0)),
    "type1_tar": _rate(
        "type I", "recovery.identity.type1_tar", "leakage",
        "Recovered faces that the evaluator accepts as the same image's person.", headline=True, guard=_LEAKED),
    "type2_tar": _rate(
        "type II", "recovery.identity.type2_tar", "leakage",
        "Recovered faces that the evaluator accepts against another image of the person.",
        headline=True, guard=_LEAKED),
    "type1_far_1e3": _rate(
        "type I @1e-3", "recovery.identity.type1_far_1e3", "leakage",
        "As type I, at the evaluator's threshold for a false acceptance rate of 1e-3.", headline=True),
    "type2_far_1e3": _rate(
        "type II @1e-3", "recovery.identity.type2_far_1e3", "leakage",
        "Recovered faces accepted against another image of the person, at the evaluator's threshold for FAR 1e-3.",
        headline=True),
    "rank1": _rate(
        "rank-1", "recovery.identity.rank1", "leakage",
        "Recovered faces whose nearest face in the gallery is of the right person (Success@1).",
        headline=True, guard=_LEAKED),
    "rank5": _rate(
        "rank-5", "recovery.identity.rank5", "leakage", "As rank-1, among the five nearest (Success@5)."),
    "rank20": _rate(
        "rank-20", "recovery.identity.rank20", "leakage", "As rank-1, among the twenty nearest (Success@20)."),
    "cosine": Kind(
        "cosine", "recovery.identity.cosine", "leakage",
        "Cosine of the evaluator's embeddings of recovered and original face.", ends=(-1.0, 1.0), headline=True,
        guard=Guard(0.02, 0.02, 0.01, limit=1.0), canary=Guard(0.05, 0.02, 0.01)),
    "knn_distance": Kind(
        "distance", "recovery.identity.knn_distance", "privacy",
        "Distance to the nearest plain face of the same person.", ends=(0.0, 2.0)),
    "linkage": _rate(
        "linkage", f"{_LINKAGE}.accuracy", "leakage",
        "Pairs of a protected and a plain face told apart right; 50 % is guessing.",
        headline=True, guess=0.5, guard=_LINKED),
    "linkage_auc": _rate(
        "linkage AUC", f"{_LINKAGE}.auc", "leakage",
        "Area under the ROC curve of an attack that links; 50 % is guessing.",
        guess=0.5, guard=_LINKED, canary=Guard(0.03, 0.05, 0.03, limit=0.5)),
    "linkage_eer": _rate(
        "linkage EER", f"{_LINKAGE}.eer", "privacy", "Equal error rate of an attack that links."),
    "linkage_tar_at_far": _rate(
        "linkage TAR@FAR", f"{_LINKAGE}.tar_at_far", "leakage",
        "Genuine pairs linked at a given share of linked impostors."),
    "linkage_rank1": _rate(
        "linkage rank-1", "linkage.rank1", "leakage",
        "Representations whose nearest plain face is of the right person.", guard=_LEAKED),
    "d_sys": Kind(
        "D_sys", "linkage.d_sys.protected_plain", "leakage",
        "Global unlinkability measure: 0 unlinkable, 1 fully linkable.", ends=(0.0, 1.0), headline=True),
    "state_faces": _rate(
        "states", "state_inference.faces", "leakage",
        "Interceptions of which the attack names all that was drawn.", guard=_LEAKED),
    "state_channels": _rate(
        "channels", "state_inference.channels", "leakage", "Channels that the attack puts in their place."),
    "embedding_cosine": Kind(
        "embedding cosine", "inversion.cosine", "leakage",
        "Cosine of the embedding that is made of stolen templates and the true one.", ends=(-1.0, 1.0), headline=True),
    "pass_same": _rate(
        "pass", "inversion.same_far_1e2", "leakage",
        "Estimates that pass against the stolen template, where 1 % of impostors do.", headline=True),
    "pass_same_1e3": _rate(
        "pass @1e-3", "inversion.same_far_1e3", "leakage", "As pass, where 0.1 % of impostors do."),
    "pass_renewed": _rate(
        "pass renewed", "inversion.renewed_far_1e2", "leakage",
        "Estimates that pass against another image's template under a new key, where 1 % of impostors do.",
        headline=True),
    "pass_renewed_1e3": _rate(
        "pass renewed @1e-3", "inversion.renewed_far_1e3", "leakage", "As pass renewed, where 0.1 % of impostors do."),
    "estimate_d_sys": Kind(
        "D_sys inverted", "inversion.d_sys", "leakage",
        "Unlinkability of what is made of templates under two keys: 0 unlinkable, 1 fully linkable.", ends=(0.0, 1.0)),
    "estimate_maximal": Kind(
        "maximal linkability inverted", "inversion.maximal", "leakage",
        "Maximal linkability of what is made of templates under two keys.", unit="bits", ends=(0.0, 1.0), decimals=2),
    "estimate_d_sys_plain": Kind(
        "D_sys inverted-plain", "inversion.d_sys_plain", "leakage",
        "Unlinkability of what is made of a template and an unprotected embedding.", ends=(0.0, 1.0)),
    "own_accuracy": _rate(
        "own key", "template.verification.own.accuracy", "utility",
        "Pairs told apart right where each person shows the own key."),
    "stolen_accuracy": _rate(
        "stolen key", "template.verification.stolen.accuracy", "utility",
        "Pairs told apart right where all show one key: what the face alone tells."),
    "unknown_accuracy": _rate(
        "unknown key", "template.verification.unknown.accuracy", "leakage",
        "Pairs told apart right where a key is shown that was just drawn; 50 % is guessing."),
    "replay": _rate(
        "replay", "template.replay_far_1e2", "leakage",
        "Revoked templates that pass under the new key, where 1 % of impostors do."),
    "replay_1e3": _rate(
        "replay @1e-3", "template.replay_far_1e3", "leakage", "As replay, where 0.1 % of impostors do."),
    "diverse": _rate(
        "diverse", "template.diverse_far_1e2", "privacy",
        "Images whose templates under two keys are not taken for one person's, where 1 % of impostors are."),
    "diverse_1e3": _rate(
        "diverse @1e-3", "template.diverse_far_1e3", "privacy", "As diverse, where 0.1 % of impostors are."),
    "template_d_sys": Kind(
        "D_sys templates", "template.d_sys", "leakage",
        "Unlinkability of templates under two keys, as the system compares: 0 unlinkable, 1 fully linkable.",
        ends=(0.0, 1.0)),
    "template_maximal": Kind(
        "maximal linkability", "template.maximal", "leakage",
        "Maximal linkability of templates under two keys.", unit="bits", ends=(0.0, 1.0), decimals=2),
    # Declared, not measured: how much an attacker has to guess. Exact, so the slightest loss counts.
    "entropy_bits": Kind(
        "entropy", "defense.entropy_bits", "privacy",
        "Binary logarithm of the number of states that can be drawn, each alike.",
        unit="bits", ends=(0.0, math.inf), decimals=2, guard=Guard(0.01, 0.0, 0.0, limit=0.0)),
    "bytes": Kind(
        "sent", "defense.bytes_per_face", "cost",
        "Bytes that leave the client per face.", unit="bytes", ends=(0.0, math.inf), decimals=0),
    "protect": Kind(
        "protect", "throughput.protect", "utility",
        "Faces that a client protects in a second, batched.", unit="faces/s", ends=(0.0, math.inf), decimals=0),
    "recover": Kind(
        "attack", "throughput.recover", "utility",
        "Faces that the fitted attack processes in a second, batched.",
        unit="faces/s", ends=(0.0, math.inf), decimals=0),
})
# fmt: on

_PLACES = {kind.place: kind for kind in KINDS.values()}
#: Parts of a place that say whose figure it is, not which.
_WHOSE = (
    (re.compile(r"^attacks\.[^.]+\."), ""),
    (re.compile(r"^worst_case\."), "recovery."),
    (re.compile(r"^utility\.protocols\..+\.(protected|unprotected)(?=\.)"), "utility"),
    (re.compile(r"^utility\.templates\..+\.(galleries\.[^.]+|mean)(?=\.)"), "utility.identification"),
    (re.compile(r"^utility\.templates\..+\.(protected|unprotected)(?=\.)"), "utility"),
    (re.compile(r"^utility\.distractors\.(protected|unprotected)(?=\.)"), "utility.identification"),
    (re.compile(r"(?<=^utility\.identification\.rank1)_among\..*"), ""),
    (re.compile(r"\.(ceiling|unprotected|teacher|floors\.[^.]+)(?=\.)"), ""),
    (re.compile(r"\.judges\.[^.]+(?=\.)"), ".identity"),
    (re.compile(r"^evaluator(s\.[^.]+)?(?=\.accuracy$)"), "utility"),
    (re.compile(r"^linkage\.(protected_protected|plain)(?=\.)"), _LINKAGE),
    (re.compile(r"(?<=^linkage\.d_sys\.).*"), "protected_plain"),
    (re.compile(r"(?<=\.tar_at_far)\..*|(?<=\.tpir_at_fpir)\..*"), ""),
)


def kind_at(place: str) -> Kind | None:
    """What is known of the figure at a dotted place in a result: of an attack, a floor, a ceiling or the worst case.

    Example:
        >>> kind_at("recovery.ceiling.ssim").heading, kind_at("linkage.plain.eer").direction, kind_at("recovery")
        ('SSIM', 'privacy', None)
    """
    for pattern, replacement in _WHOSE:
        place = pattern.sub(replacement, place)
    return _PLACES.get(place)


#: Shown where there is no figure.
MISSING = "–"


def decimals(kind: Kind, measure: Measure) -> int:
    """Decimals worth showing: the wider half of the interval keeps two significant digits, no more.

    Example:
        >>> wide = Measure(value=0.478, ci95=(0.331, 0.6), direction="leakage")
        >>> decimals(KINDS["type1_tar"], wide)
        0
    """
    if measure.value is None or measure.ci95 is None:
        return kind.decimals
    half = kind.scale * max(measure.ci95[1] - measure.value, measure.value - measure.ci95[0])
    if half <= 0:
        return kind.decimals
    return min(kind.decimals, max(0, 1 - math.floor(math.log10(half))))


def shown(name: str, measure: Measure | None) -> str:
    """The value of ``measure`` in the unit of the figure ``name``; a dash where there is none."""
    if measure is None or measure.value is None:
        return MISSING
    kind = KINDS[name]
    return f"{kind.scale * measure.value:.{decimals(kind, measure)}f}"


def interval(name: str, measure: Measure | None) -> str:
    """The interval as ``[low, high]``, rounded as the value is; empty where there is none."""
    if measure is None or measure.value is None or measure.ci95 is None:
        return ""
    kind = KINDS[name]
    digits = decimals(kind, measure)
    low, high = (f"{kind.scale * end:.{digits}f}" for end in measure.ci95)
    return f"[{low}, {high}]"


def leak(name: str, measure: Measure | None) -> float:
    """How much leaks by this figure, on a scale where more is worse; minus infinity where it was not measured."""
    if measure is None or measure.value is None:
        return -math.inf
    return KINDS[name].leaks * measure.value
