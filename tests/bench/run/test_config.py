"""Configuration: precedence, strictness, one-line errors."""

from pathlib import Path

import pytest

from bench.errors import MissingError, UsageError
from bench.recognition.options import TrainingOptions
from bench.run.config import (
    Budget,
    RunConfig,
    merge,
    nested,
    parse_assignments,
    read_environment,
    resolve,
    settings,
    unknown_variables,
    write_config,
)
from bench.run.store import run_id


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"preset": "paper", "evaluator": "a.onnx,b,c.onnx", "data_root": "x y", "dataset": "folder", "limit": 90},
        {"defense": "partialface+quantise", "defense_options": {"quantise.bits": "4"}, "template": "biohash"},
        {"attack": "unet,linear", "attack_options": {"linear": {"rank": "9"}, "images": "70"}, "budget": "k=1,2"},
        {"teacher": "t.onnx", "training": {"clip_gradient_norm": "inf", "views": 3}, "dataset_options": {"seed": 5}},
        {"out": "elsewhere", "resume": False, "seed": 2**62, "utility": "no", "shares": {"provider": "0.3"}},
    ],
)
def test_a_written_configuration_is_read_back_equal(tmp_path, given):
    config = resolve(merge(UNET, given), {})
    write_config(config, tmp_path / "run.toml")
    again = resolve({}, {}, tmp_path / "run.toml")
    assert again == config
    assert run_id(again) == run_id(config)
    assert again.labels_only == config.labels_only
    with pytest.raises(UsageError, match=r"run\.toml exists: choose another file"):
        write_config(config, tmp_path / "run.toml")


UNET = {"defense": "none", "attack": "unet"}


@pytest.mark.parametrize(
    ("text", "axis", "values"),
    [
        ("k=1,2,4", "k", (1, 2, 4)),
        ("k=8", "k", (1, 2, 4, 8)),
        ("k=2", "k", (1, 2)),  # no eighth of an interception
        (" steps = 1000 ", "steps", (125, 250, 500, 1000)),
        ("data=1", "data", (0.125, 0.25, 0.5, 1)),
        ("data=0.4", "data", (0.05, 0.1, 0.2, 0.4)),
        ("data=0.1,1", "data", (0.1, 1)),
        ("data=500,1000", "data", (500, 1000)),
        ("data=1000", "data", (125, 250, 500, 1000)),
    ],
)
def test_budgets_are_read(text, axis, values):
    budget = Budget.parse(text)
    assert (budget.axis, budget.values) == (axis, pytest.approx(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k", "write AXIS=VALUES"),
        ("=1,2", "write AXIS=VALUES"),
        ("k=", "write AXIS=VALUES"),
        ("k=1,a", "not a list of numbers"),
        ("k=1,,2", "not a list of numbers"),
        ("k=0,1", "above 0"),
        ("k=1,inf", "above 0"),
        ("k=1", "at least two"),
        ("k=2,1", "each above the one before"),
        ("k=2,2", "each above the one before"),
        ("k=1,2.5", "whole numbers"),
        ("steps=0.5,1", "whole numbers"),
        ("data=0.5,1.5", "whole numbers, or all shares up to 1"),
        ("data=1,500", "all shares up to 1 or all numbers of faces"),
    ],
)
def test_what_cannot_be_is_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)
    with pytest.raises(UsageError, match=message):
        resolve({**UNET, "budget": text}, {})


BASE = {"defense": "partialface", "attack": "unet"}


def test_flag_beats_environment_beats_file_beats_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("probes = 11\nqueries = 2\nimage_size = 80\n[training]\nepochs = 5\n")
    config = resolve({**BASE, "probes": 33}, {"BENCH_PROBES": "22", "BENCH_QUERIES": "4"}, file)
    assert config.probes == 33  # flag
    assert config.queries == 4  # environment
    assert config.image_size == 80  # file over the preset's 64
    assert config.training.epochs == 5
    assert config.backbone == "ir-tiny"  # preset over the field's default
    assert config.bootstrap == 1000  # default


def test_the_preset_itself_can_come_from_any_layer(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "quick"\n')
    assert resolve(BASE, {}, file).probes == resolve({**BASE, "preset": "quick"}, {}).probes
    assert resolve(BASE, {"BENCH_PRESET": "gpu"}, file).image_size == 112


def test_synthetic_sizes_are_only_for_the_synthetic_dataset():
    assert "identities" in resolve(BASE, {}).dataset_options
    assert resolve({**BASE, "dataset": "insightface"}, {}).dataset_options == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"probes": 0}, "probes"),
        ({"seed": -1}, "seed"),
        ({"preset": "fast"}, "preset"),
        ({"knowledge": "psychic"}, "knowledge"),
        ({"image_size": 4}, "image_size"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"training": {"epoch": 3}}, "unknown key 'training.epoch'"),
        ({"training": {"epochs": 0}}, "training.epochs"),
        ({"shares": {"provider": 2}}, "shares.provider"),
        ({"evaluator_backbone": "ir-tiny"}, "must differ"),
        ({"backbone": "mobilefacenet"}, "must differ"),  # from a judge that is the same network, half as wide
    ],
)
def test_bad_values_are_one_line(flags, message):
    with pytest.raises(UsageError) as caught:
        resolve({**BASE, **flags}, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_names_are_asked_for():
    with pytest.raises(UsageError, match="defense"):
        resolve({"attack": "unet"}, {})


def test_unknown_keys_in_the_file_are_errors(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\n")
    with pytest.raises(UsageError, match="unknown key 'epochs'"):
        resolve(BASE, {}, file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "run.toml").write_text("seed = 7\n", encoding=encoding)
    assert resolve(BASE, {}, tmp_path / "run.toml").seed == 7


@pytest.mark.parametrize("text", [f"seed = {5000 * '9'}", f"seed = {5000 * '['}", f"seed = {1000 * '{a='}"])
def test_a_hostile_file(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UsageError, match=r"run\.toml is not valid TOML"):
        resolve(BASE, {}, tmp_path / "run.toml")


def test_a_missing_file_and_a_broken_one(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        resolve(BASE, {}, tmp_path)
    with pytest.raises(MissingError, match=r"no\.toml does not exist"):
        resolve(BASE, {}, tmp_path / "no.toml")
    file = tmp_path / "bad.toml"
    file.write_text("a = = 1")
    with pytest.raises(UsageError, match="not valid TOML"):
        resolve(BASE, {}, file)


def test_assignments():
    assert parse_assignments(["a=1", "subset-size = 9", "widths=1,2"], "-o") == {
        "a": "1",
        "subset_size": "9",
        "widths": "1,2",
    }
    for bad in (["a"], ["=1"]):
        with pytest.raises(UsageError, match="write key=value"):
            parse_assignments(bad, "-o")
    with pytest.raises(UsageError, match="given twice"):
        parse_assignments(["a=1", "a=2"], "-a")


def test_nested_and_merge():
    assert nested({"training.epochs": "3", "seed": "1"}) == {"training": {"epochs": "3"}, "seed": "1"}
    with pytest.raises(UsageError, match="set to a value already"):
        nested({"training": "3", "training.epochs": "1"})
    for both in ({"a": "1", "a.b": "2"}, {"a.b": "2", "a": "1"}):
        with pytest.raises(UsageError, match="-a a"):
            nested(both, "-a")
    low = {"training": {"epochs": 1, "views": 2}}
    assert merge(low, {"training": {"epochs": 9}}) == {"training": {"epochs": 9, "views": 2}}
    assert low == {"training": {"epochs": 1, "views": 2}}


def test_identity_of_a_run_ignores_where_it_is_kept():
    one = resolve({**BASE, "out": "a"}, {}).identifying()
    assert one == resolve({**BASE, "out": "b", "resume": False}, {}).identifying()
    for changes in ({"seed": 1}, {"utility": False}, {"budget": "k=1,2"}):
        assert one != resolve({**BASE, **changes}, {}).identifying()


def test_python_means_what_the_command_line_means():
    for given in ({}, {"preset": "quick"}, {"dataset": "folder", "training": {"epochs": 3}, "probes": 9}):
        assert RunConfig(**BASE, **given) == resolve({**BASE, **given}, {})
    config = RunConfig(**BASE, preset="quick", training=TrainingOptions(epochs=3))
    assert (config.training.epochs, config.training.head, config.image_size) == (3, "cosface", 64)


@pytest.mark.parametrize("change", [{}, {"image_size": 80}, {"training": {"head": "arcface"}}])
def test_a_written_configuration_is_read_as_it_was(change):
    config = RunConfig(**BASE, preset="quick", **change)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("preset", ["quick", "cpu", "gpu"])
def test_under_a_teacher_a_preset_trains_alike_on_all_data(preset):
    rendered, read = (
        RunConfig(**BASE, preset=preset, teacher="t.onnx", dataset=dataset, data_root="faces").training
        for dataset in ("synthetic", "folder")
    )
    assert rendered == read


def test_every_setting_says_what_it_means_and_those_of_one_value_have_a_flag():
    for setting in settings():
        assert setting.meaning, setting.name
        assert bool(setting.flag) == bool(setting.variable)
    assert {"--out", "--head", "--stream", "--bootstrap"} <= {setting.flag for setting in settings()}
    (head,) = (setting for setting in settings() if setting.flag == "--head")
    assert (head.name, head.variable, head.presets["quick"]) == ("training.head", "BENCH_HEAD", "cosface")
    assert {setting.name for setting in settings() if setting.flag is None} >= {"training.epochs", "defense_options"}


def test_unknown_variables_are_warned_of_with_the_nearest_name(caplog):
    environment = {"BENCH_DATAROOT": "/x", "BENCH_XYLOPHONE": "1", "BENCH_SEED": "3", "BENCH_CACHE": ""}
    assert unknown_variables(environment) == ["BENCH_DATAROOT (did you mean BENCH_DATA_ROOT?)", "BENCH_XYLOPHONE"]
    assert read_environment(environment) == {"seed": "3"}
    assert "BENCH_DATAROOT" in caplog.text
    assert "BENCH_CACHE" not in caplog.text


def test_values_are_read_and_empty_ones_are_absent():
    environment = {"BENCH_LPIPS_WEIGHTS": "/x", "BENCH_HEAD": "arcface", "BENCH_DEVICE": ""}
    assert read_environment(environment) == {"training": {"head": "arcface"}}


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ("a.onnx, b.onnx", ["a.onnx", "b.onnx"]),
        (["a,b.onnx"], ["a,b.onnx"]),
        (Path("a.onnx"), ["a.onnx"]),
        (None, []),
        ("here,there.onnx", ["here,there.onnx"]),  # it is there
        (",".join("abc" * 100), [*("abc" * 100)]),  # too long for the name of a file
    ],
)
def test_judges_are_listed_in_a_text_or_a_list(tmp_path, monkeypatch, given, files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here,there.onnx").touch()
    assert resolve({**UNET, "evaluator": given}, {}).evaluator == tuple(map(Path, files))
    assert resolve(UNET, {"BENCH_EVALUATOR": "a,b"}).evaluator == (Path("a"), Path("b"))
