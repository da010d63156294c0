"""Configuration: precedence, strictness, one-line errors."""

import pytest

from bench.config import merge, nested, parse_assignments, resolve
from bench.errors import MissingError, UsageError

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


def test_a_missing_file_and_a_broken_one(tmp_path):
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
