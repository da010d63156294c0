"""The result schema (version 2): what ``metrics.json`` holds.

Every figure is a :class:`Measure`: a value with its interval, the number of things it was computed
from and the direction it reads in; a figure that cannot be computed is null with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from bench.measures import KINDS, ResultModel, interval, kind_at, shown
from bench.measures import Direction as Direction
from bench.measures import Measure as Measure

SCHEMA_VERSION = "2"

#: Changes whenever figures of two versions cannot be compared any more (data, protocol, metric definitions).
PROTOCOL_VERSION = "2"


class Quartiles(ResultModel):
    median: float
    q1: float
    q3: float


class Throughput(ResultModel):
    """Speed of one stage: batched images per second and batch-1 latency."""

    images_per_second: Quartiles
    latency_ms: Quartiles
    batch: int
    repeats: int
    dtype: str
    device: str


class Verification(ResultModel):
    """How well a recogniser tells pairs apart."""

    accuracy: Measure
    auc: Measure
    eer: Measure
    tar_at_far: dict[str, Measure]
    accuracy_std: float | None = Field(None, description="standard deviation over the folds")
    pairs: int


class Protocol(ResultModel):
    """How well people of a further verification pack, who are not attacked, are told apart."""

    protected: Verification
    unprotected: Verification


class Identification(ResultModel):
    """How often a search in a gallery finds who is looked for."""

    rank1: Measure = Field(description="probes whose best match is of their person (closed set)")
    tpir_at_fpir: dict[str, Measure] = Field(description="probes found at a given share of false alarms (open set)")
    gallery: int = Field(description="templates that are searched, without distractors")
    probes: int
    mated: int = Field(description="probes whose person is in the gallery")


class TemplateRecognition(ResultModel):
    """How well templates of several images are recognised: 1:1, and 1:N in each gallery."""

    tar_at_far: dict[str, Measure] = Field({}, description="of pairs of templates; empty without a list of pairs")
    pairs: int = 0
    galleries: dict[str, Identification] = Field({}, description="by name; empty without lists of a search")
    mean: Identification | None = Field(None, description="the mean over the galleries")


class TemplateProtocol(ResultModel):
    """IJB-B or IJB-C: templates pooled of images, each of which was sent on its own."""

    templates: int
    images: int
    protected: TemplateRecognition
    unprotected: TemplateRecognition


class LargeGallery(Identification):
    """One image of each victim among distractors; the others are looked for."""

    rank1_among: dict[str, Measure] = Field(description="rank-1 by the number of distractors, of which each is a part")


class Distractors(ResultModel):
    """Identification of the victims among many others."""

    source: str = Field(description="the data set that the distractors come from")
    distractors: int
    protected: LargeGallery
    unprotected: LargeGallery


class Utility(Verification):
    unprotected: Verification
    protocols: dict[str, Protocol] = Field({}, description="of further verification packs, by name")
    templates: dict[str, TemplateProtocol] = Field({}, description="of benchmarks of templates (IJB-B, IJB-C), by name")
    distractors: Distractors | None = Field(None, description="large-gallery identification, where it was asked for")
    teacher: Verification | None = Field(None, description="of the teacher itself, on the same plain pairs")

    def templates_and_galleries(self) -> Iterator[tuple[str, str, dict[str, Measure]]]:
        """Of each benchmark of templates and of the distractors, behind the defence and without it, its figures.

        By the place of each below its own part, such as ``tar_at_far.1e-6`` or ``rank1``.
        """
        for name, protocol in self.templates.items():
            for of in ("protected", "unprotected"):
                part: TemplateRecognition = getattr(protocol, of)
                yield name, of, {**_rates("tar_at_far", part.tar_at_far), **_found(part.mean)}
        if (among := self.distractors) is not None:
            for of in ("protected", "unprotected"):
                gallery: LargeGallery = getattr(among, of)
                name = f"victims among {among.distractors:,} of {among.source}"
                yield name, of, {**_found(gallery), **_rates("rank1_among", gallery.rank1_among)}


def _rates(name: str, measures: dict[str, Measure]) -> dict[str, Measure]:
    return {f"{name}.{rate}": measure for rate, measure in measures.items()}


def _found(part: Identification | None) -> dict[str, Measure]:
    return {} if part is None else {"rank1": part.rank1, **_rates("tpir_at_fpir", part.tpir_at_fpir)}


class Linkage(ResultModel):
    """How well an attack tells whether two things show one person.

    Of a recovery attack, how well a judge does that looks at what was recovered in place of what was intercepted.
    """

    protected_plain: Verification = Field(description="an intercepted representation against a plain face")
    protected_protected: Verification = Field(description="two representations, intercepted independently")
    plain: Verification = Field(description="two plain faces under the same attack: the ceiling")
    rank1: Measure = Field(description="a representation finds its person among plain faces")
    d_sys: dict[str, Measure] = Field(
        description="global unlinkability measure, by kind of pair: 0 unlinkable, 1 fully linkable"
    )
    d_sys_chance: float | None = Field(
        None, description="what it comes to at most, on average, where nothing links (of independent pairs)"
    )
    judge: str | None = Field(None, description="of a recovery attack, the judge by whom most is linked")


class Identity(ResultModel):
    """Identity leakage under a judge: type I against the same image, type II against another of the person."""

    type1_tar: Measure
    type2_tar: Measure
    type1_far_1e3: Measure | None = Field(None, description="type I at the judge's threshold for FAR 1e-3")
    type2_far_1e3: Measure | None = Field(None, description="type II at the judge's threshold for FAR 1e-3")
    rank1: Measure
    cosine: Measure
    rank5: Measure | None = None
    rank20: Measure | None = None
    knn_distance: Measure | None = None


class Quality(ResultModel):
    """How near recovered faces come to the originals.

    Of several judges ``identity`` has, figure by figure, the value by which most leaks.
    """

    ssim: Measure
    psnr: Measure
    psnr_aligned: Measure
    ms_ssim: Measure
    lpips: Measure
    identity: Identity
    judges: dict[str, Identity] = Field({}, description="of a run with several judges, what each finds, by its name")

    def figure(self, name: str) -> Measure | None:
        """The figure of this name, of the picture or of the person; None where it is neither or was not asked for."""
        measure: Measure | None = getattr(self if name in Quality.model_fields else self.identity, name, None)
        return measure


class Recovery(Quality):
    """What a recovery attack got, between what trivial guesses get and what it gets out of unprotected faces."""

    floors: dict[str, Quality]
    ceiling: Quality

    def parts(self, label: str) -> dict[str, Quality]:
        """What the attack got, under ``label``; then each floor, and the ceiling."""
        floors = {f"floor: {name.replace('_', ' ')}": floor for name, floor in self.floors.items()}
        return {label: self, **floors, "ceiling": self.ceiling}


class StateInference(ResultModel):
    """How often the attack named what the defence had drawn."""

    faces: Measure = Field(description="share of interceptions of which every channel was put in its place")
    channels: Measure = Field(description="share of channels put in their place")
    chance: float | None = Field(None, description="faces of uniform guessing, where the states can be counted")


class TemplateProtection(ResultModel):
    """What a template defence does, in the terms of ISO/IEC 30136, whatever an attack makes of its templates.

    A system accepts at the threshold at which its own impostors, who show the claimed person's key, are accepted at a
    rate of 1e-2 or 1e-3.
    """

    key_stored: bool = Field(description="whether the key lies beside the template")
    verification: dict[str, Verification] = Field(
        description="of the data set's pairs: own (each person shows the own key), stolen (one key for all), unknown "
        "(who is to be verified shows a key that was just drawn)"
    )
    replay_far_1e2: Measure = Field(description="revoked templates that pass as templates under the new key")
    replay_far_1e3: Measure
    diverse_far_1e2: Measure = Field(description="images whose templates under two keys are not taken for one person's")
    diverse_far_1e3: Measure
    d_sys: Measure = Field(description="unlinkability of templates under two keys by the system's own comparison")
    d_sys_chance: float | None = Field(None, description="what it comes to at most where nothing links")
    maximal: Measure = Field(description="maximal linkability, in bits, of the same scores")


class Inversion(ResultModel):
    """What an attack makes of stolen templates: embeddings, held against the true ones."""

    records: int = Field(description="stolen templates of a person, each under another key")
    key: bool = Field(description="whether the keys were stolen with them")
    cosine: Measure = Field(description="cosine of estimated and true embedding")
    floor: Measure = Field(description="the same of the public faces' mean embedding")
    same_far_1e2: Measure = Field(description="estimates that pass against the stolen template, under its key")
    same_far_1e3: Measure
    renewed_far_1e2: Measure = Field(
        description="estimates that pass against another image's template under a new key, which is shown"
    )
    renewed_far_1e3: Measure
    d_sys: Measure = Field(description="unlinkability of estimates of templates under two keys, by their cosine")
    maximal: Measure = Field(description="maximal linkability, in bits, of the same scores")
    d_sys_plain: Measure = Field(description="the same of an estimate and an unprotected embedding")


class StrengthPoint(ResultModel):
    """What leaks to an attack of one budget."""

    budget: float
    values: dict[str, Measure]


class StrengthCurve(ResultModel):
    """Leakage against the attacker's budget; the last point is the run's own result."""

    axis: str = Field(description="what the budget counts")
    points: list[StrengthPoint] = Field(description="in ascending order of their budgets")
    gain_of_last_doubling: dict[str, Measure] = Field(
        description="metric -> the last point minus the one before it on the same victims, with the paired interval "
        "over identities; null where the two budgets are less than a factor 1.5 apart"
    )
    tolerance: dict[str, float] = Field(
        description="metric -> what the lower end of that interval must exceed to count as a gain"
    )
    unsaturated: bool | None = Field(description="whether any of these metrics gains; None where none could be judged")


class PluginInfo(ResultModel):
    name: str
    options: dict[str, Any]


class DefenseInfo(PluginInfo):
    representation_shape: tuple[int, int, int]
    views: int
    states: int | None
    entropy_bits: float
    bytes_per_face: int
    details: dict[str, Any] = Field({})

    @classmethod
    def of(cls, description: dict[str, Any]) -> Self:
        """From what a defence says of itself; what only it knows of goes to ``details``."""
        known = {key: value for key, value in description.items() if key in cls.model_fields}
        return cls(**known, details={key: value for key, value in description.items() if key not in known})


#: What is said, in these words, of an attack that gets no more than a trivial guess.
NO_BETTER = "no better than a floor: this says nothing about the defence"


class FloorTest(ResultModel):
    """Whether an attack gets more than a trivial guess would: paired differences over people, held against margins."""

    above: bool | None = Field(
        description="whether the lower end of one of these intervals exceeds its margin; null where there is none"
    )
    gains: dict[str, Measure] = Field(
        description="figure -> how much more leaks than to the floor that comes nearest, paired over the victims"
    )
    floors: dict[str, str] = Field(
        description="figure -> that floor; others: what the attack made of other people; guessing: of linkage"
    )
    margins: dict[str, float] = Field(description="figure -> what the lower end of its interval must exceed")

    def told(self) -> str:
        """The differences in one line."""
        parts = []
        for name, gain in self.gains.items():
            if gain.value is not None:
                kind, (low, high) = KINDS[name], gain.ci95 or (gain.value, gain.value)
                values = (f"{kind.scale * value:+.{kind.decimals}f}" for value in (gain.value, low, high))
                told = "{} {} [{}, {}]".format(kind.label, *values)
                parts.append(f"{told} against {self.floors[name].replace('_', ' ')}")
        return "; ".join(parts)


class AttackInfo(PluginInfo):
    knowledge: str
    saturated: bool | None = Field(
        description="whether more training would hardly have helped; null where nothing is trained or above_floor is "
        "false"
    )
    states_covered: bool | None
    above_floor: bool | None = Field(
        None, description="false: no better than a floor, so that its figures say nothing about the defence"
    )
    broken: bool | None = Field(
        None, description="whether it is no better than a floor where it has to be: on unprotected faces, or a canary"
    )
    floor_test: FloorTest | None = Field(None, description="of what the attack got, behind above_floor")
    plain_test: FloorTest | None = Field(None, description="of what it gets out of unprotected faces, behind broken")
    curve: list[tuple[int, float]] = Field([])
    details: dict[str, Any] = Field({})


class AttackResult(ResultModel):
    """What one attack of a run got."""

    attack: AttackInfo
    recovery: Recovery | None = None
    linkage: Linkage | None = None
    state_inference: StateInference | None = None
    inversion: Inversion | None = None
    strength: StrengthCurve | None = None

    def figure(self, name: str) -> Measure | None:
        """The figure ``name`` of :data:`bench.measures.KINDS`; None where this attack has none of that name."""
        return _at(self, KINDS[name].place)

    def ceiling(self, name: str) -> Measure | None:
        """The same figure of unprotected faces."""
        return _at(self, KINDS[name].ceiling)


def measures(node: Any, place: str = "") -> Iterator[tuple[str, Measure]]:
    """Every measure below a part of a result, with its dotted place."""
    if isinstance(node, Measure):
        yield place, node
    elif isinstance(node, BaseModel | dict | list):
        parts: Iterable[tuple[object, Any]] = enumerate(node) if isinstance(node, list) else dict(node).items()
        for name, part in parts:
            yield from measures(part, f"{place}.{name}" if place else str(name))


def _at(result: BaseModel, place: str) -> Measure | None:
    """The measure at a dotted place; None where any part of the way is missing."""
    node: Any = result
    for part in place.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
    return node if isinstance(node, Measure) else None


#: A judge that tells fewer plain pairs apart judges nothing.
LEAST_ACCURACY = 0.9


class EvaluatorInfo(ResultModel):
    """A recogniser that judges identity leakage: what it is fed, and how well it tells plain pairs apart."""

    name: str
    sha256: str | None = Field(description="of all bytes of its files; null if it was trained")
    files: list[str] = Field([], description="their names")
    layout: str | None = Field(None, description="order of the axes of its input: NCHW or NHWC")
    input_size: tuple[int, int] | None = Field(None, description="height and width in pixels; faces are resized to it")
    input_range: str | None = Field(None, description="what it is fed of faces x in [0, 1]")
    colours: str | None = Field(None, description="RGB or BGR")
    batch: int | None = Field(None, description="faces per run where its file or its graph fixes them")
    normalisation: str = Field("", description="operations at the entry of its graph that scale the input")
    accuracy: Measure = Field(description="share of the victims' plain pairs that it tells apart right (LFW View 2)")
    threshold: float = Field(description="cosine of best accuracy on these pairs, of type1_tar and type2_tar")
    far_at_threshold: float = Field(description="share of the impostor pairs that it accepts there")
    impostor_pairs: int = Field(0, description="how many impostor pairs there are")
    threshold_far_1e3: float | None = Field(None, description="lowest cosine that accepts a thousandth of them at most")
    accepted_far_1e3: int = Field(
        0, description="how many impostor pairs it accepts there: what the threshold rests on"
    )
    withheld: str | None = Field(None, description="why its figures are null, if they are")

    @field_validator("accuracy", mode="before")
    @classmethod
    def _without_interval(cls, accuracy: Any) -> Any:
        """A number, as results of before there were several judges have it."""
        return {"value": accuracy, "direction": "utility"} if isinstance(accuracy, float | int) else accuracy

    @property
    def told(self) -> str:
        """Its name, and how many plain pairs it tells apart, for captions."""
        accuracy = f"{shown('accuracy', self.accuracy)} % {interval('accuracy', self.accuracy)}".rstrip()
        return f"{self.name} ({accuracy} of plain pairs told apart{', its figures withheld' if self.withheld else ''})"


class TeacherInfo(ResultModel):
    """The recogniser whose embeddings of plain faces the provider's recognisers were trained by: what it is fed."""

    name: str
    sha256: str = Field(description="of all bytes of its files")
    files: list[str] = Field(description="their names")
    embedding_size: int = Field(description="dimensions of its embedding, and of the recognisers' trained by it")
    layout: str = Field(description="order of the axes of its input: NCHW or NHWC")
    input_size: tuple[int, int] = Field(description="height and width in pixels; faces are resized to it")
    input_range: str = Field(description="what it is fed of faces x in [0, 1]")
    colours: str = Field(description="RGB or BGR")
    batch: int | None = Field(None, description="faces per run where its file or its graph fixes them")
    normalisation: str = Field("", description="operations at the entry of its graph that scale the input")


class RecogniserInfo(ResultModel):
    """A recogniser that somebody brought along: what it is, and what it is fed."""

    name: str = Field(description="of its file, or of the plug-in")
    sha256: str = Field(description="of all bytes of its files, or of the plug-in's weights")
    files: list[str] = Field(description="their names")
    format: str = Field(description="onnx, torch.export, torchscript, safetensors, state_dict or plug-in")
    architecture: str = Field("", description="name of the network, where its file tells it")
    values: int | None = Field(None, description="how many values it has learnt, where its file tells")
    channels: int = Field(description="of its input; three are a picture's")
    input_size: tuple[int, int] = Field(description="height and width of its input; pictures are resized to it")
    layout: str = Field(description="order of the axes of its input: NCHW or NHWC")
    input_range: str | None = Field(None, description="what it is fed of pictures x in [0, 1]; null: as it is sent")
    colours: str | None = Field(None, description="RGB or BGR; null of what is no picture")
    batch: int | None = Field(None, description="faces per run where its file or its graph fixes them")
    normalisation: str = Field("", description="operations at the entry of its graph that scale the input")
    embedding_size: int = Field(description="dimensions of its embedding")


class DatasetInfo(ResultModel):
    name: str = Field(description="of the data set that the victims come from")
    sources: dict[str, str] = Field({}, description="the data set of each role, where they come from several")
    synthetic: bool
    image_size: int
    identities: dict[str, int]
    images: dict[str, int]
    pairs: int
    probes: int
    skipped: int
    details: dict[str, Any] = Field({})


class RunResult(ResultModel):
    """``metrics.json``. Of a failed or cancelled run only the head is there.

    A run of one attack has ``attack``, ``recovery``, ``linkage``, ``state_inference``, ``strength`` at the top. One of
    several has ``attacks`` instead and, of those that recover faces, the pointwise worst case. One judge is the
    ``evaluator``, several are ``evaluators``.
    """

    schema_: Literal["2"] = Field("2", alias="schema")
    protocol: str = PROTOCOL_VERSION
    run_id: str
    status: Literal["success", "error", "cancelled"]
    error: str | None = None
    warnings: list[str] = Field([])
    defense: DefenseInfo | None = None
    attack: AttackInfo | None = None
    evaluator: EvaluatorInfo | None = None
    evaluators: dict[str, EvaluatorInfo] = Field({}, description="of a run with several judges, each by its name")
    teacher: TeacherInfo | None = Field(None, description="of the recognisers behind the defence and without it")
    recognisers: dict[str, RecogniserInfo] = Field(
        {}, description="that were brought along instead of being trained, by their settings"
    )
    dataset: DatasetInfo | None = None
    utility: Utility | None = None
    recovery: Recovery | None = None
    linkage: Linkage | None = None
    state_inference: StateInference | None = None
    inversion: Inversion | None = None
    template: TemplateProtection | None = Field(None, description="of a template defence")
    strength: StrengthCurve | None = None
    attacks: dict[str, AttackResult] = Field({}, description="of a run of several attacks, what each got, by its name")
    failed: dict[str, str] = Field(
        {}, description="of several attacks those that gave up, and why: the worst case is incomplete without them"
    )
    worst_case: Recovery | None = Field(
        None,
        description="per victim and figure, the value under the recovery attack from which most leaks; its floor "
        "pointwise_worst is made of the floors in the same way",
    )
    worst_case_test: FloorTest | None = Field(None, description="of the worst case, against floors of the same kind")
    throughput: dict[str, Throughput] | None = None
    seconds: dict[str, float] = Field({})
    cached: list[str] = Field([])
    peak_memory: dict[str, int] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, document: Any) -> Any:
        try:
            return upgrade(document) if isinstance(document, dict) else document
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is not a result of schema 1 either: {error!r}") from None

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.attacks and (self.attack or self.recovery or self.linkage):
            raise ValueError("the figures of several attacks stand in attacks and worst_case alone")
        return self

    @property
    def attack_results(self) -> dict[str, AttackResult]:
        """By its name, what each attack got; also of a run of one."""
        if self.attacks or self.attack is None:
            return self.attacks
        only = AttackResult(**{name: getattr(self, name) for name in AttackResult.model_fields})
        return {self.attack.name: only}

    @property
    def judges(self) -> dict[str, EvaluatorInfo]:
        """The recognisers that judged identity leakage, by name; also the one of a run with one."""
        return self.evaluators if self.evaluator is None else {self.evaluator.name: self.evaluator}

    def to_json(self) -> str:
        """The document as stored."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def read_result(path: Path) -> RunResult:
    """The result of a run directory or of its ``metrics.json``, of this schema or of version 1.

    Raises:
        OSError, pydantic.ValidationError: it cannot be read or is not of these schemas.
    """
    if path.is_dir():
        path = path / "metrics.json"
    return RunResult.model_validate_json(path.read_bytes())


#: Figures in the strength curves of linkage attacks, as version 1 called them.
_RENAMED = {"accuracy": "linkage", "auc": "linkage_auc", "rank1": "linkage_rank1"}


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """A document of schema 1 as one of this schema; any other as it is.

    Version 1 knew two directions only, and kept what the members of its ``composite`` attack got inside the worst case.
    The ceiling of a member was not stored: it gets that of the whole.
    """
    if document.get("schema") != "1":
        return document
    document = {**document, "schema": SCHEMA_VERSION}
    attack, recovery = document.get("attack") or {}, document.get("recovery") or {}
    infos, qualities = attack.get("members"), recovery.get("members")
    document |= {name: _without_members(document.get(name)) for name in ("attack", "recovery")}
    if infos and qualities:
        bounds = {"floors": recovery["floors"], "ceiling": recovery["ceiling"]}
        parts = {name: {**qualities[name], **bounds} for name in infos}
        document["attacks"] = {n: {"attack": _without_members(infos[n]), "recovery": parts[n]} for n in infos}
        document |= {"attack": None, "recovery": None, "worst_case": document["recovery"]}
    if document.get("linkage") and (curve := document.get("strength")):
        document["strength"] = {
            **curve,
            "points": [{**point, "values": _renamed(point["values"])} for point in curve["points"]],
            **{name: _renamed(curve[name]) for name in ("gain_of_last_doubling", "tolerance")},
        }
    directed: dict[str, Any] = _directed(document, "")
    return directed


def _without_members(part: dict[str, Any] | None) -> dict[str, Any] | None:
    return part and {name: value for name, value in part.items() if name != "members"}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in values.items()}


def _directed(node: Any, place: str) -> Any:
    """``node`` with the direction of every measure, which version 1 stored as whom a higher value suits."""
    if isinstance(node, list):
        return [_directed(item, f"{place}.") for item in node]
    if not isinstance(node, dict):
        return node
    if "higher_is_better_for" not in node:
        return {name: _directed(item, f"{place}.{name}".lstrip(".")) for name, item in node.items()}
    kind = kind_at(place)
    direction = "leakage" if kind is None or place.startswith("strength.") else kind.direction
    return {name: item for name, item in node.items() if name != "higher_is_better_for"} | {"direction": direction}


class Reliance(ResultModel):
    """How far a recogniser or an attack relies on each frequency: 192 values, number 64 colour + 8u + v (Y, Cb, Cr).

    A value is null where no face at hand sends the frequency; all are where the reason says why.
    """

    occlusion: list[float | None] | None = Field(
        description="how far it moves without the frequency: 1 - cosine of the embeddings, or mean squared difference "
        "of the recovered pictures"
    )
    gradient: list[float | None] | None = Field(
        description="squared Frobenius norm of its Jacobian, of the unit embedding or of the recovered picture"
    )
    reasons: dict[str, str] = Field({}, description="why one of them is missing")


class Expression(ResultModel):
    """Whether a classifier that is trained on what a defence sends of rendered faces tells their expressions apart."""

    protected: Measure = Field(description="share of expressions told right")
    unprotected: Measure = Field(description="the same of a classifier trained on the plain faces")
    chance: float
    classes: list[str]
    trained_on: int = Field(description="faces, of other people")


class Explanation(ResultModel):
    """``explain.json``: what ``bench explain`` finds of a run."""

    run_id: str
    faces: int = Field(description="victim images that were looked at")
    sent: list[int] | None = Field(
        description="how many of them send each of the 192 frequencies; null of a defence that sends none"
    )
    recogniser: Reliance | None = None
    attacks: dict[str, Reliance] = Field({})
    expression: Expression | None = None


class PlannedStage(ResultModel):
    """One stage of ``--dry-run``.

    ``cached`` is None where that is not known without reading the data, ``seconds`` where there is nothing to go by.
    """

    name: str
    what: str
    cached: bool | None
    seconds: float | None = None


class RunPlan(ResultModel):
    """What ``bench run --dry-run`` prints.

    ``config`` holds all options of the plug-ins as they are resolved, ``seconds`` is the sum of those that are known,
    and ``notes`` say what is not.
    """

    run_id: str
    device: str
    precision: str
    config: dict[str, Any]
    stages: list[PlannedStage]
    seconds: float
    notes: tuple[str, ...] = ()


if __name__ == "__main__":  # writes the shipped JSON schema
    import json

    target = Path(__file__).parent / "schema" / f"metrics-{SCHEMA_VERSION}.json"
    target.write_text(json.dumps(RunResult.model_json_schema(by_alias=True), indent=2) + "\n", encoding="utf-8")
