"""What each stage's key depends on: a setting or a listed module changes it if and only if it should."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_models import linear_model

from bench import plugins
from bench.run import stage
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages
from bench.run.config import RunConfig, resolve
from bench.run.machines import choose_machine
from bench.run.provider import Stages
from bench.run.stage import CODE, code_version, plugin_code

BASE = {"defense": "partialface", "attack": "unet", "preset": "quick"}
MACHINE = choose_machine("cpu", "32-true")

#: Stages from the data to the victims; each depends on those that it is made of.
DATA, DEFENSE, RECOGNISER, EVALUATOR = "data", "defense", "recogniser", "evaluator"
VERIFY, EVALUATE, FIT, RECOVER, LINK = "verify", "evaluate", "fit", "recover", "link"
TRAINED = {RECOGNISER, EVALUATOR, VERIFY, EVALUATE}
ATTACKS = {FIT, RECOVER, LINK}
EVERYTHING = {DATA, *TRAINED, *ATTACKS}


def keys(**changes):
    """Stage -> key, without rendering a face or training anything."""
    config = resolve({**BASE, **changes}, {})
    stages = Stages(config, machine=MACHINE, cache=None, bars=None, log=None)
    attacks = AttackStages(stages)
    defense, plain = (
        plugins.make_defense(name, dict(options), config.preset, config.image_size)
        for name, options in ((config.defense, config.defense_options), ("none", {}))
    )
    attack_config = AttackConfig(config.attack, config.preset, config.attack_options, interceptions=config.queries)
    linkage = AttackConfig("linkage", config.preset, interceptions=config.queries)
    return {
        DATA: stages.data_key,
        DEFENSE: stages.defense_key(defense),
        RECOGNISER: stages.recogniser_key(defense, "provider"),
        EVALUATOR: stages.recogniser_key(plain, "evaluator"),
        VERIFY: stages.verification_job(defense).key,
        EVALUATE: stages.evaluation_job().key,
        FIT: attacks.fit_job(attack_config, defense).key,
        RECOVER: attacks.recover_job(attack_config, defense).key,
        LINK: attacks.link_job(linkage, defense).key,
    }


def changed(**changes):
    before, after = keys(), keys(**changes)
    return {name for name in before if before[name] != after[name]}


#: Setting -> a change of it, and the stages that are made anew.
SETTINGS = {
    "defense": ("blur", {DEFENSE, RECOGNISER, VERIFY, *ATTACKS}),
    "defense_options": ({"subset": 2}, {DEFENSE, RECOGNISER, VERIFY, *ATTACKS}),
    "attack": ("linear", {FIT, RECOVER}),
    "attack_options": ({"images": 100}, {FIT, RECOVER}),
    "dataset_options": ({"identities": 90}, EVERYTHING),
    "image_size": (48, {*EVERYTHING, DEFENSE}),
    "limit": (300, EVERYTHING),
    "seed": (1, EVERYTHING),
    "shares": ({"provider": 0.3}, EVERYTHING - {DATA}),
    "backbone": ("ir-18", {RECOGNISER, VERIFY}),
    "evaluator_backbone": ("ir-18", {EVALUATOR, EVALUATE}),
    "training": ({"epochs": 2}, TRAINED),
    "knowledge": ("oracle", ATTACKS),
    "queries": (2, {RECOVER, LINK}),
    "probes": (9, ATTACKS),  # intercepted traffic is of faces that are not attacked
    "batch_size": (8, {VERIFY, EVALUATE, RECOVER, LINK}),
}
#: They decide nothing that a stage keeps, are no value of their own, or name files (which have tests of their own).
WITHOUT_A_STAGE = {
    "bootstrap",
    "verify",
    "distractors",
    "utility",
    "budget",
    "resume",
    "logger",
    "out",
    "device",
    "preset",
    "template",
}
FILES = {
    "dataset",
    "data_root",
    "train_data",
    "attack_data",
    "victims",
    "source_options",
    "evaluator",
    "teacher",
    "stream",
    "stream_images",
    "stream_on_error",
}
FILES |= {"recogniser", "recogniser_input", "plain_recogniser", "plain_recogniser_input"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_the_keys_of_what_depends_on_it(setting):
    value, expected = SETTINGS[setting]
    assert changed(**{setting: value}) == expected


def test_every_setting_is_accounted_for():
    assert set(RunConfig.model_fields) == {*SETTINGS, *WITHOUT_A_STAGE, *FILES}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bootstrap", 200),
        ("utility", False),
        ("budget", "k=1,2"),
        ("resume", False),
        ("out", "x"),
        ("verify", "none"),
        ("logger", "wandb"),
    ],
)
def test_a_setting_that_no_stage_depends_on_changes_nothing(setting, value):
    assert changed(**{setting: value}) == set()


#: Kind of stage in :data:`CODE` -> the stages whose keys hold it.
HELD_BY = {
    "rendered faces": EVERYTHING,
    "split": EVERYTHING,
    "recogniser": TRAINED,
    "verification": {VERIFY},
    "evaluation": {EVALUATE},
    "attack": ATTACKS,
    "victims": {RECOVER, LINK},
}


@pytest.mark.parametrize(("kind", "module"), [(kind, module) for kind in HELD_BY for module in CODE[kind]])
def test_a_change_of_a_listed_module_makes_its_stages_anew(kind, module, monkeypatch):
    before = keys()
    monkeypatch.setattr(stage, "code_version", lambda name: "edited" if name == module else code_version(name))
    after = keys()
    expected = set().union(*(stages for other, stages in HELD_BY.items() if module in CODE[other]))
    # Plug-ins are built of networks, too.
    for attack, made in (
        ("attacks.unet", {FIT, RECOVER, LINK}),
        ("attacks.linkage", {LINK}),
        ("attacks.linear", {LINK}),
    ):
        if module in plugin_code(attack):
            expected |= made
    assert {name for name in before if before[name] != after[name]} == expected


@pytest.mark.parametrize(
    ("module", "counts"), [("defenses.partialface", True), ("defenses.noise", True), ("defenses.blur", False)]
)
def test_the_code_of_a_chain_is_that_of_its_members(module, counts, monkeypatch):
    chained = {"defense": "partialface+noise"}
    before = keys(**chained)
    version = code_version
    monkeypatch.setattr(stage, "code_version", lambda name: "changed" if name == module else version(name))
    assert (keys(**chained)[DEFENSE] != before[DEFENSE]) == counts


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("attacks.unet", {FIT, RECOVER, LINK}),  # linkage by recovered faces is built of recovery attacks
        ("attacks.linear", {LINK}),
        ("attacks.linkage", {LINK}),
        ("attacks.base", ATTACKS),
        ("defenses.partialface", {DEFENSE, RECOGNISER, VERIFY, *ATTACKS}),
        ("defenses.none", {EVALUATOR, EVALUATE}),
        ("defenses.base", {*TRAINED, *ATTACKS, DEFENSE}),
        ("attacks.template", set()),
        ("bench.data.tools", set()),
        ("bench.commands", set()),
        ("reports", set()),
    ],
)
def test_the_code_of_a_plugin_is_its_own_and_what_it_is_built_of(module, expected, monkeypatch):
    before = keys()
    monkeypatch.setattr(stage, "code_version", lambda name: "edited" if name == module else code_version(name))
    after = keys()
    assert {name for name in before if before[name] != after[name]} == expected


def test_every_listed_module_exists():
    for module in {module for modules in CODE.values() for module in modules}:
        assert len(code_version(module)) == 64


def version_of(tmp_path, monkeypatch, text):
    (tmp_path / "some_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    code_version.cache_clear()
    try:
        return code_version("some_module")
    finally:
        code_version.cache_clear()


CODE_TEXT = 'def f(x):\n    """Told."""\n    return x + 1\n'


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('# a comment\ndef f(x):\n    """Told otherwise."""\n\n    return x + 1  # why\n', True),
        (CODE_TEXT.replace("1", "2"), False),
        (CODE_TEXT.replace("x", "y"), False),
    ],
)
def test_what_is_told_of_code_is_no_code(tmp_path, monkeypatch, text, same):
    assert (version_of(tmp_path, monkeypatch, CODE_TEXT) == version_of(tmp_path, monkeypatch, text)) is same


def test_an_evaluator_is_known_by_its_bytes(tmp_path):
    file = tmp_path / "judge.onnx"
    file.write_bytes(b"one")
    before = keys(evaluator=str(file))[EVALUATE]
    assert keys(evaluator=str(file))[EVALUATE] == before
    file.write_bytes(b"two")
    assert keys(evaluator=str(file))[EVALUATE] != before


def test_an_evaluator_in_two_files_is_known_by_both(tmp_path):
    path, weights = tmp_path / "judge.onnx", np.eye(12, dtype=np.float32)
    linear_model(path, weights, ("n", 3, 2, 2), external="judge.onnx.data")
    graph, before = path.read_bytes(), keys(evaluator=str(path))[EVALUATE]
    linear_model(path, 2 * weights, ("n", 3, 2, 2), external="judge.onnx.data")
    assert path.read_bytes() == graph
    assert keys(evaluator=str(path))[EVALUATE] != before


def test_a_teacher_is_known_by_its_bytes_and_not_by_its_place(tmp_path):
    def key(name, content):
        (tmp_path / name).write_bytes(content)
        return keys(attack="linkage", attack_options={"teacher": str(tmp_path / name)})[FIT]

    assert key("a.onnx", b"one") == key("b.onnx", b"one") != key("b.onnx", b"two")


def test_a_teacher_decides_recognisers_alone_and_is_known_by_its_bytes(tmp_path):
    first, copy, other = (tmp_path / f"{name}.onnx" for name in ("first", "copy", "other"))
    first.write_bytes(b"one")
    copy.write_bytes(b"one")
    other.write_bytes(b"two")
    assert changed(teacher=str(first)) == {RECOGNISER, VERIFY}
    assert keys(teacher=str(first)) == keys(teacher=str(copy))
    before, after = keys(teacher=str(first)), keys(teacher=str(other))
    assert {name for name in before if before[name] != after[name]} == {RECOGNISER, VERIFY}
    # What is fitted without the teacher is the same under its presets; what was asked for holds for all.
    asked = {"preset": "cpu", "defense": "partialface"}
    before, after = keys(**asked), keys(**asked, teacher=str(first))
    assert {name for name in before if before[name] != after[name]} == {RECOGNISER, VERIFY}
    assert (
        keys(**asked, training={"epochs": 3})[EVALUATOR]
        == keys(**asked, training={"epochs": 3}, teacher=str(first))[EVALUATOR]
    )
    assert before[DEFENSE] == after[DEFENSE]


def test_the_platform_is_part_of_what_is_trained(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "0.0.0", raising=False)
    monkeypatch.setattr("bench.run.provider.torch", SimpleNamespace(**{**vars(torch), "__version__": "0.0.0"}))
    other = keys()
    monkeypatch.undo()
    before = keys()
    assert {name for name in before if before[name] != other[name]} == {*TRAINED, *ATTACKS}
