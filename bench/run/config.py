"""The resolved configuration of a run: flag > ``BENCH_*`` environment > config file > preset > default."""

from __future__ import annotations

import difflib
import functools
import itertools
import logging
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bench import plugins
from bench.data.loaders import MAIN, ROLES, DataName
from bench.errors import DataError, MissingError, UsageError
from bench.files import decode_text, parse_json, write_text
from bench.nets.options import AS_READ, InputForm
from bench.plugins import Option, describe, explain
from bench.recognition.options import PUBLISHED, TrainingOptions

#: The axes that every attack has: public faces, and interceptions per victim image.
DATA = "data"
INTERCEPTIONS = "k"

#: A single value V stands for these parts of it, each twice the one before.
_PARTS = (1 / 8, 1 / 4, 1 / 2, 1)

#: Budgets nearer than this factor are no doubling: that they hardly differ says nothing about saturation.
DOUBLING = 1.5


@dataclass(frozen=True, slots=True)
class Budget:
    """An axis and at least two rising values on it; the last is the run's own.

    Attributes:
        axis: ``data``, ``k``, or one that the attack names.
        values: for ``data`` all shares in (0, 1] of the public faces, or all whole numbers of them above 1; for every
            other axis whole numbers above 0.
    """

    axis: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"k=1,2,4"``, or ``"k=8"`` for an eighth, a quarter, half and all of it (whole numbers where those are due).

        Raises:
            ValueError: anything else.
        """
        axis, equals, listed = (part.strip() for part in text.partition("="))
        if not equals or not axis or not listed:
            raise ValueError(f"write AXIS=VALUES, such as {DATA}=0.25,0.5,1 or {INTERCEPTIONS}=1,2,4,8")
        try:
            values = [float(value) for value in listed.split(",")]
        except ValueError:
            raise ValueError(f"{listed!r} is not a list of numbers") from None
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError("budgets are above 0")
        shares = axis == DATA and all(value <= 1 for value in values)
        if len(values) == 1:
            values = [values[0] * part for part in _PARTS]
            if not shares:
                values = [float(math.floor(value)) for value in values]
                values = sorted({value for value in values if value >= 1})
        if not shares and not all(value.is_integer() and value >= 1 for value in values):
            also = ", or all shares up to 1" if axis == DATA else ""
            raise ValueError(f"budgets of {axis} are whole numbers{also}, got {listed}")
        if axis == DATA and not shares and min(values) <= 1:
            raise ValueError(f"budgets of {DATA} are all shares up to 1 or all numbers of faces, got {listed}")
        if len(values) < 2 or any(after <= before for before, after in itertools.pairwise(values)):
            raise ValueError(f"at least two budgets are needed, each above the one before, got {listed}")
        return cls(axis, tuple(values))


#: How the rendered identities are shared out.
_SYNTHETIC_SHARES = {"provider": 0.4, "public": 0.25, "evaluator": 0.12, "victims": 0.15}

#: For hundreds of identities instead of the published tens of thousands: a gentler margin, and augmentation that takes
#: away the shortcuts which small sets offer (crop, exposure, colour).
_SMALL_SET = {
    "head": "cosface",
    "scale": 24.0,
    "margin": 0.1,
    "learning_rate": 0.15,
    "augmentation": {
        "shift": 0.08,
        "zoom": 0.12,
        "brightness": 0.2,
        "contrast": 0.3,
        "saturation": 0.4,
        "grey": 0.05,
    },
}


def _synthetic(identities: int, images: int, **more: Any) -> Mapping[str, Any]:
    options = {"identities": identities, "images_per_identity": images}
    return {"dataset_options": options, "shares": _SYNTHETIC_SHARES, **more}


#: Dataset -> preset -> fields of a run. Only the synthetic dataset is as large as one asks for.
DATASET_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "synthetic": {
        "quick": _synthetic(80, 10),
        # Thousands of images, not tens of thousands: smaller batches for more steps, of an optimiser that needs fewer.
        # The judge has a fourth of the people: one that has seen 50 tells too few others apart to judge, and with 84 it
        # hardly does.
        "cpu": _synthetic(
            460,
            16,
            shares={"provider": 0.365, "public": 0.228, "evaluator": 0.27, "victims": 0.137},
            training={
                "optimiser": "muon",
                "epochs": 6,
                "batch_size": 64,
                "learning_rate": 0.15,
                "schedule": "linear",
                "warmup_epochs": 0.5,
                "views": 1,
            },
        ),
        "gpu": _synthetic(4000, 24),
        "paper": _synthetic(4000, 24),
    }
}

#: Preset name -> fields of :class:`bench.run.config.RunConfig`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # For CI: everything runs, nothing is converged.
    "quick": {
        "image_size": 64,
        "backbone": "ir-tiny",
        "evaluator_backbone": "mobilefacenet-tiny",
        "probes": 64,
        "bootstrap": 300,
        "training": {**_SMALL_SET, "epochs": 4, "views": 1, "batch_size": 64},
    },
    # Two cores, some minutes.
    "cpu": {
        "image_size": 64,
        "backbone": "ir-tiny",
        "evaluator_backbone": "mobilefacenet-tiny",
        "training": {**_SMALL_SET, "epochs": 12},
    },
    # One accelerator: 112 px and the published network widths.
    "gpu": {"image_size": 112, "backbone": "ir-18", "probes": 1000, "training": {**_SMALL_SET, "epochs": 24}},
    "paper": {
        "image_size": 112,
        "backbone": "ir-50",
        "probes": 1000,
        "training": {**PUBLISHED.model_dump(exclude_unset=True), "compile": True},
    },
}


#: A few hundred labels add nothing to a teacher's embeddings. The gradient of 1 - cos is small beside that of a margin
#: head, whose learning rates fit with this weight.
_TAUGHT = {
    "classification": 0.0,
    "distillation": 50.0,
    "optimiser": "sgd",
    "batch_size": 64,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "views": 1,
}

#: Preset -> fields of a run, above those of the preset, where a teacher is given. Nobody has published such a schedule.
TEACHER_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"training": _TAUGHT},
    # A quarter of an hour on two cores for some 17,000 images behind a defence, half of it for plain ones.
    "cpu": {"training": {**_TAUGHT, "epochs": 20}},
    "gpu": {"training": _TAUGHT},
}


class Shares(BaseModel):
    """How the identities of a dataset are shared out; parts are disjoint and renormalised as needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: float = Field(0.6, gt=0, lt=1, description="Identities that train the recognisers and the defence.")
    public: float = Field(0.16, gt=0, lt=1, description="Identities that the attacker has.")
    evaluator: float = Field(
        0.12, ge=0, lt=1, description="Identities that train the judging recogniser; unused with an evaluator file."
    )
    victims: float = Field(
        0.12, ge=0, lt=1, description="Victims; unused when the dataset has a verification set of its own."
    )


#: Settings that name a data set beside the main one.
SETS = (*ROLES, "distractors")

#: Settings that came after the first runs, which keep their names where these are not given.
_LATER = (
    *("limit", "recogniser", "recogniser_input", "plain_recogniser", "plain_recogniser_input"),
    *("template", "verify", *SETS, "source_options"),
)


def listed(files: str) -> list[str]:
    """The files in a text with commas between them; one whose name holds a comma stands alone."""
    # Unlike Path.is_file before Python 3.13, this says no of what no system takes for a path.
    whole = os.path.isfile(files)  # noqa: PTH113
    return [files] if whole else [part for name in files.split(",") if (part := name.strip())]


class RunConfig(BaseModel):
    """Everything that decides what a run computes, and where it puts it.

    The only declaration of a setting: flags, ``BENCH_*`` variables, keys of a config file and of ``--set``, docs/cli.md
    and ``bench list settings`` are made from these fields. What is not given comes from the preset, then from here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    defense: str = Field(description="Defence to test (bench list defenses), or a chain of them: A+B.")
    attack: str = Field(description="Attack to run against it, or several: A,B (bench list attacks).")
    dataset: str = Field("synthetic", description="Dataset (bench list datasets).")
    data_root: Path | None = Field(None, description="Folder or file of the dataset.")
    train_data: str | None = Field(
        None,
        description="Data set of the people that recognisers and defences are trained on, in place of a share of the "
        "dataset.",
        json_schema_extra={"metavar": "DATASET:PATH"},
    )
    attack_data: str | None = Field(
        None,
        description="Data set of the people that the attacker has.",
        json_schema_extra={"metavar": "DATASET:PATH"},
    )
    victims: str | None = Field(
        None,
        description="Data set of the victims, such as folder:PATH of photographs of your own.",
        json_schema_extra={"metavar": "DATASET:PATH"},
    )
    stream: bool = Field(
        False,
        description="Leave the faces that recognisers train on on the disk (datasets insightface, folder, webdataset).",
    )
    stream_images: int = Field(
        20_000, ge=2, description="Public images, and victim images, of a streamed dataset held in memory at most."
    )
    stream_on_error: Literal["refuse", "skip"] = Field(
        "refuse", description="A streamed image that cannot be decoded is refused, or left out and counted."
    )
    limit: int | None = Field(
        None,
        ge=2,
        description="For a quick look: at most so many faces of the dataset, of whole identities drawn at random.",
    )
    preset: Literal["quick", "cpu", "gpu", "paper"] = Field("cpu", description="Layer of defaults.")
    knowledge: Literal["blackbox", "whitebox", "oracle"] = Field("whitebox", description="What the adversary knows.")
    image_size: int = Field(112, ge=16, le=1024, description="Height and width of the faces in pixels.")
    backbone: str = Field("ir-18", description="Recogniser network (bench list backbones).")
    evaluator: tuple[Path, ...] = Field(
        (),
        description="Recogniser of plain faces that judges identity leakage, a file as for --recogniser, or several: "
        "A,B; without any, one is trained.",
        json_schema_extra={"metavar": "FILE[,FILE]"},
    )
    teacher: Path | None = Field(
        None,
        description="Recogniser of plain faces that the provider's recognisers learn to agree with, a file as for "
        "--recogniser.",
        json_schema_extra={"metavar": "FILE"},
    )
    recogniser: Path | None = Field(
        None,
        description="Recogniser that the provider brings along, of what the defence sends: a file (ONNX, torch.export, "
        "TorchScript, safetensors, state_dict) or the name of a plug-in; none is trained in its place.",
        json_schema_extra={"metavar": "FILE"},
    )
    recogniser_input: InputForm = AS_READ
    plain_recogniser: Path | None = Field(
        None,
        description="Recogniser of plain faces, of these kinds, for the figures without the defence; without it one is "
        "trained.",
        json_schema_extra={"metavar": "FILE"},
    )
    plain_recogniser_input: InputForm = AS_READ
    template: str | None = Field(
        None, description="Template defence of what is stored of a face, behind the defence: as --defense A+TEMPLATE."
    )
    verify: tuple[Path, ...] = Field(
        (),
        description="InsightFace packs to verify beside the victims, and ijbb, ijbc (folders): names in the data root "
        "or paths, A,B, or none; by default all .bin that lie beside the one that the victims come from.",
        json_schema_extra={"metavar": "PACK[,PACK]"},
    )
    distractors: str | None = Field(
        None,
        description="Data set of other people among whom the victims are identified, from the disk: folder:PATH, "
        "insightface:PATH or webdataset:PATH.",
        json_schema_extra={"metavar": "DATASET:PATH"},
    )
    evaluator_backbone: str = Field("mobilefacenet", description="Network of the trained evaluator.")
    seed: int = Field(0, ge=0, lt=2**63, description="The one seed that all randomness derives from.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    out: Path = Field(Path("runs"), description="Folder for runs and their cache.")
    probes: int = Field(256, ge=1, description="Victim images to attack.")
    queries: int = Field(1, ge=1, description="Intercepted representations per victim image, a fresh state each.")
    bootstrap: int = Field(1000, ge=100, description="Replicates of the bootstrap over identities.")
    batch_size: int = Field(64, ge=1, description="Faces at once outside training.")
    utility: bool = Field(
        True, description="Measure recognition behind the defence; without it the attack alone is run."
    )
    budget: str | None = Field(
        None,
        description="Strength curve over what the attacker spends: data (public faces), k (interceptions per face) or "
        "an axis of the attack (bench list attacks), such as data=0.25,0.5,1, or k=8 for 1,2,4,8.",
        json_schema_extra={"metavar": "AXIS=VALUES"},
    )
    resume: bool = Field(True, description="Reuse what earlier runs computed.")
    logger: Literal["tensorboard", "mlflow", "wandb"] | None = Field(
        None, description="Also log training curves and final figures there; needs the extra of that name."
    )
    dataset_options: dict[str, Any] = Field({}, description="Options of the dataset.")
    source_options: dict[str, dict[str, Any]] = Field(
        {}, description="Options of data sets of their own, such as source_options.victims.crop=0.8."
    )
    defense_options: dict[str, Any] = Field({}, description="Options of the defence (-o).")
    attack_options: dict[str, Any] = Field({}, description="Options of the attack (-a).")
    shares: Shares = Shares()
    training: TrainingOptions = TrainingOptions()

    @model_validator(mode="before")
    @classmethod
    def _preset_below(cls, given: Any) -> Any:
        """Merge the layers of the preset below what was given, also in a nested model."""
        if not isinstance(given, Mapping):
            return given
        asked = {
            name: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
            for name, value in given.items()
        }
        if (template := asked.pop("template", None)) is not None:
            before = asked.get("defense", "none")
            asked["defense"] = template if before == "none" else f"{before}+{template}"
        preset, dataset = (str(asked.get(name, cls.model_fields[name].default)) for name in ("preset", "dataset"))
        return merge(*preset_layers(preset, dataset, taught=asked.get("teacher") is not None), asked)

    @model_validator(mode="after")
    def _evaluator_differs(self) -> Self:
        of_one_kind = self.evaluator_backbone.removesuffix("-tiny") == self.backbone.removesuffix("-tiny")
        if not self.evaluator and of_one_kind:
            raise ValueError(
                f"evaluator_backbone ({self.evaluator_backbone!r}) must differ from backbone ({self.backbone!r}): it "
                "judges independently"
            )
        return self

    @model_validator(mode="after")
    def _options_have_a_source(self) -> Self:
        if unknown := {role for role in self.source_options if role not in SETS or getattr(self, role) is None}:
            raise ValueError(f"source_options.{min(unknown)}: there is no {min(unknown)} that it could be for")
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if self.teacher is None and not self.training.classification:
            raise ValueError("training.classification=0 leaves nothing to learn from without a teacher: give --teacher")
        return self

    @field_validator("evaluator", "verify", mode="before")
    @classmethod
    def _files_are_a_list(cls, given: Any) -> Any:
        return listed(given) if isinstance(given, str) else [given] if isinstance(given, Path) else given or ()

    @property
    def roles(self) -> tuple[str, ...]:
        """The settings that name a data set of its own for some of the parts."""
        return tuple(role for role in ROLES if getattr(self, role) is not None)

    @property
    def home(self) -> str:
        """The setting that names the data set of the victims."""
        return "victims" if self.victims is not None else MAIN

    def data_of(self, role: str) -> DataName:
        """The data set that a setting names: one of :data:`SETS` that is given, or the main one."""
        return DataName(self.dataset, self.data_root) if role == MAIN else DataName.parse(getattr(self, role))

    def options_of(self, role: str) -> dict[str, Any]:
        """The options of this data set; those of rendered faces come from the preset."""
        if role == MAIN:
            return self.dataset_options
        preset = DATASET_PRESETS.get(self.data_of(role).dataset, {}).get(self.preset, {})
        return merge(preset.get("dataset_options", {}), self.source_options.get(role, {}))

    @field_validator(*SETS)
    @classmethod
    def _data_set_is_known(cls, text: str | None) -> str | None:
        if text is not None:
            DataName.parse(text)
        return text

    @field_validator("budget")
    @classmethod
    def _budget_is_readable(cls, text: str | None) -> str | None:
        if text is not None:
            Budget.parse(text)
        return text

    @property
    def labels_only(self) -> TrainingOptions:
        """How what learns from labels alone is trained beside a teacher: as without one, but for what was asked for."""
        plain, taught = (
            TrainingOptions(**merge(*preset_layers(self.preset, self.dataset, taught=taught)).get("training", {}))
            for taught in (False, self.teacher is not None)
        )
        unasked = [
            name for name in TrainingOptions.model_fields if getattr(self.training, name) == getattr(taught, name)
        ]
        return self.training.model_copy(update={name: getattr(plain, name) for name in unasked})

    def identifying(self) -> dict[str, Any]:
        """The part that decides the figures: all but where files go and what is reused."""
        unset = {name for name in _LATER if getattr(self, name) in (None, (), {}, AS_READ)}
        return self.model_dump(mode="json", exclude={"out", "resume", "logger", *unset})


#: Settings of nested models that have a flag and a variable all the same.
PROMOTED = frozenset({"training.head"})

PREFIX = "BENCH_"

#: Variables that are no settings of a run, and what they say.
OTHER_VARIABLES: Mapping[str, str] = {
    "BENCH_LPIPS_WEIGHTS": "file with AlexNet's weights",
    "BENCH_CACHE": "folder for downloads, and for lists that were made once",
    "BENCH_DEBUG": "show the traceback of an internal error",
}


class Setting(Option):
    """A setting of a run and its names.

    Attributes:
        flag: of ``bench run``, with dashes; None where only ``--set``, ``-o`` or ``-a`` gives it.
        variable: of the environment; None where there is none.
        presets: preset -> the value that it sets.
        taught: preset -> the value that it sets where a teacher is given.
    """

    flag: str | None = None
    variable: str | None = None
    presets: Mapping[str, Any] = Field(default_factory=dict)
    taught: Mapping[str, Any] = Field(default_factory=dict)


@functools.cache
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of the fields of :class:`RunConfig`."""
    rows = []
    for option in describe(RunConfig):
        named = option.name in PROMOTED or ("." not in option.name and option.type != "table")
        leaf = option.name.rpartition(".")[2]
        rows.append(
            Setting(
                **dict(option),
                flag=f"--{leaf.replace('_', '-')}" if named else None,
                variable=f"{PREFIX}{leaf.upper()}" if named else None,
                presets=_set_by(PRESETS, option.name),
                taught=_set_by(TEACHER_PRESETS, option.name),
            )
        )
    return tuple(rows)


def _set_by(presets: Mapping[str, Mapping[str, Any]], dotted: str) -> dict[str, Any]:
    return {name: value for name, fields in presets.items() if (value := _dig(fields, dotted)) is not None}


def _dig(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def preset_layers(preset: str, dataset: str, *, taught: bool = False) -> tuple[Mapping[str, Any], ...]:
    """What a preset sets, and what it sets for one dataset and under a teacher; later ones win, unknown set nothing."""
    layers = PRESETS.get(preset, {}), DATASET_PRESETS.get(dataset, {}).get(preset, {})
    return (*layers, TEACHER_PRESETS.get(preset, {})) if taught else layers


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings among the ``BENCH_*`` variables; empty ones count as absent, and unknown ones are warned of."""
    names = {setting.variable: setting.name for setting in settings() if setting.variable}
    for name in unknown_variables(environment):
        logging.getLogger("bench").warning("bench: unknown environment variable %s", name)
    return nested({name: environment[variable] for variable, name in names.items() if environment.get(variable)})


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """The ``BENCH_*`` variables that mean nothing here, each with the nearest one that does."""
    known = [*OTHER_VARIABLES, *(setting.variable for setting in settings() if setting.variable)]
    unknown = sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
    near = [difflib.get_close_matches(name, known, n=1, cutoff=0.75) for name in unknown]
    return [f"{name} (did you mean {match[0]}?)" if match else name for name, match in zip(unknown, near, strict=True)]


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
        UsageError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(decode_text(path.read_bytes()))
    except FileNotFoundError:
        raise MissingError(f"config file {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise UsageError(f"config file {path} is not valid TOML: {error}") from None


def write_config(config: RunConfig, path: Path) -> None:
    """Write all settings of a run to a TOML file, from which :func:`resolve` reads an equal configuration.

    Raises:
        UsageError: the file is there already.
    """
    if path.exists():
        raise UsageError(f"{path} exists: choose another file to write the settings to")
    write_text(path, tomli_w.dumps(_without_none(config.model_dump(mode="json"))))


def _without_none(value: Any) -> Any:
    """What TOML, which has no such value, can hold of a document."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value if inner is not None] if isinstance(value, list) else value


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
    try:
        return RunConfig.model_validate(merge(*layers))
    except ValidationError as error:
        absent = [str(problem["loc"][0]) for problem in error.errors() if problem["type"] == "missing"]
        there: dict[str, Iterable[str]] = {"defense": plugins.defenses(), "attack": plugins.attacks()}
        if lists := [f"--{name} is missing: available: {', '.join(there[name])}" for name in absent if name in there]:
            raise UsageError("; ".join(lists)) from None
        raise UsageError(explain(error, "configuration")) from None


def run_config(run: Path) -> RunConfig:
    """The resolved configuration of the run in the folder ``run``.

    Raises:
        MissingError: it is no run.
        DataError: its manifest is damaged or of another version.
    """
    path = run / "manifest.json"
    try:
        return RunConfig.model_validate(parse_json(path.read_bytes())["config"])
    except FileNotFoundError as error:
        raise MissingError(f"{run} is no run: it has no manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
