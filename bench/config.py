"""The resolved configuration of a run: flag > ``BENCH_*`` environment > config file > preset > default."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from bench.budget import Budget
from bench.environment import read_environment
from bench.errors import MissingError, UsageError
from bench.plugins import explain
from bench.presets import DATASET_PRESETS, PRESETS
from bench.recognition.options import TrainingOptions


class Shares(BaseModel):
    """How the identities of a dataset are shared out; parts are disjoint and renormalised as needed.

    Attributes:
        provider: trains the recognisers (and trainable defences).
        public: what the attacker has.
        evaluator: trains the judging recogniser; unused when an evaluator file is given.
        victims: unused when the dataset has a verification set of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: float = Field(0.6, gt=0, lt=1)
    public: float = Field(0.16, gt=0, lt=1)
    evaluator: float = Field(0.12, ge=0, lt=1)
    victims: float = Field(0.12, ge=0, lt=1)


class RunConfig(BaseModel):
    """Everything that decides what a run computes, and where it puts it.

    Attributes:
        defense, attack, dataset, backbone: registry names.
        data_root: folder or file of the dataset.
        stream: whether the faces that recognisers train on stay on disk (datasets ``insightface``, ``folder`` and
            ``webdataset``).
        stream_images: public images, and victim images, of a streamed dataset that are held in memory at most.
        stream_on_error: whether a streamed image that cannot be decoded is refused, or left out and counted.
        preset: the layer of defaults that was used.
        knowledge: the adversary's rung.
        image_size: height and width of the faces in pixels.
        evaluator: an ONNX recogniser to judge identity leakage; None trains one.
        evaluator_backbone: architecture of the trained evaluator.
        seed: the one seed that all random streams derive from.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        probes: victim images to attack.
        queries: intercepted representations per victim image, each with a fresh state.
        bootstrap: replicates of the bootstrap over identities.
        batch_size: faces at once outside training.
        utility: whether recognition behind the defence is measured; without it no recogniser is trained that the
            attack does not need.
        budget: ``AXIS=VALUES`` of a strength curve (:class:`bench.budget.Budget`), or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    defense: str
    attack: str
    dataset: str = "synthetic"
    data_root: Path | None = None
    stream: bool = False
    stream_images: int = Field(20_000, ge=2)
    stream_on_error: Literal["refuse", "skip"] = "refuse"
    preset: Literal["quick", "cpu", "gpu", "paper"] = "cpu"
    knowledge: Literal["blackbox", "whitebox", "oracle"] = "whitebox"
    image_size: int = Field(112, ge=16, le=1024)
    backbone: str = "ir-18"
    evaluator: Path | None = None
    evaluator_backbone: str = "mobilefacenet"
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    out: Path = Path("runs")
    probes: PositiveInt = 256
    queries: PositiveInt = 1
    bootstrap: int = Field(1000, ge=100)
    batch_size: PositiveInt = 64
    utility: bool = True
    budget: str | None = None
    resume: bool = True
    dataset_options: dict[str, Any] = {}
    defense_options: dict[str, Any] = {}
    attack_options: dict[str, Any] = {}
    shares: Shares = Shares()
    training: TrainingOptions = TrainingOptions()

    @model_validator(mode="after")
    def _evaluator_differs(self) -> Self:
        if self.evaluator is None and self.evaluator_backbone == self.backbone:
            raise ValueError(
                f"evaluator_backbone must differ from backbone ({self.backbone!r}): it judges independently"
            )
        return self

    @field_validator("budget")
    @classmethod
    def _budget_is_readable(cls, text: str | None) -> str | None:
        if text is not None:
            Budget.parse(text)
        return text

    def identifying(self) -> dict[str, Any]:
        """The part that decides the figures: all but where files go and what is reused."""
        return self.model_dump(mode="json", exclude={"out", "resume"})


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; later layers win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = merge(merged[key], value)
            else:
                merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged


def parse_assignments(assignments: list[str], flag: str) -> dict[str, str]:
    """``["a=1", "b=x"]`` to a mapping.

    Raises:
        UsageError: an item without ``=`` or an empty key, or a key given twice.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"{flag} {assignment!r}: write key=value")
        if key in values:
            raise UsageError(f"{flag} {key} is given twice")
        values[key] = value.strip()
    return values


def nested(values: Mapping[str, Any], flag: str = "--set") -> dict[str, Any]:
    """``{"training.epochs": 3}`` to ``{"training": {"epochs": 3}}``.

    Raises:
        UsageError: a key is given a value and a part, named with its ``flag``.
    """
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"{flag} {dotted}: {parent} is set to a value already")
        if isinstance(node.get(leaf), dict):
            raise UsageError(f"{flag} {dotted}: a part of it is set already")
        node[leaf] = value
    return tree


def read_file(path: Path) -> dict[str, Any]:
    """A TOML config file.

    Raises:
        MissingError: it is not there.
        UsageError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(f"config file {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} is not valid TOML: {error}") from None


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None) -> RunConfig:
    """The configuration of a run from all its layers.

    Args:
        flags: what was given on the command line; absent flags must be left out.
        environment: usually ``os.environ``.
        file: a TOML file with the fields of :class:`RunConfig`.

    Raises:
        UsageError: an unknown key or an invalid value, in one line.
    """
    layers = [read_file(file) if file else {}, read_environment(environment), flags]
    asked = merge(*layers)
    preset = str(asked.get("preset", RunConfig.model_fields["preset"].default))
    dataset = str(asked.get("dataset", RunConfig.model_fields["dataset"].default))
    defaults = merge(PRESETS.get(preset, {}), DATASET_PRESETS.get(dataset, {}).get(preset, {}))
    try:
        return RunConfig.model_validate(merge(defaults, asked))
    except ValidationError as error:
        raise UsageError(explain(error, "configuration")) from None
