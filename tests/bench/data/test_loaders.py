from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from bench.data.loaders import DATASETS, Dataset, load, parse_options
from bench.data.tools.info import info
from bench.errors import DataError, MissingError, UsageError
from bench.registry import Registry


def test_names():
    assert list(DATASETS) == ["folder", "insightface", "lfw", "synthetic", "webdataset"]
    for name in DATASETS:
        dataset = DATASETS.get(name)
        assert dataset.summary
        assert dataset.Options.model_config["frozen"]
        assert dataset.Options.model_config["extra"] == "forbid"
        assert all(field.description for field in dataset.Options.model_fields.values())


def test_folder(make_tree):
    source = load("folder", data_root=make_tree({"Ann": 2, "Bob": 2}), image_size=24, seed=0, options={"crop": "0.5"})
    assert source.faces.size == 24
    assert source.name == "folder"


def test_synthetic_takes_size_and_seed_of_the_run_and_reports_progress():
    seen: list[tuple[int, int]] = []

    def images(seed: int):
        options = {"identities": 2, "images_per_identity": 2}
        run = {"data_root": None, "image_size": 32, "seed": seed, "options": options}
        source = load("synthetic", **run, report=lambda *done: seen.append(done))
        assert seen[-1] == (4, 4)
        return source.faces.images

    first = images(0)
    assert first.shape == (4, 3, 32, 32)
    assert first.equal(images(0))
    assert not first.equal(images(1))


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_takes_whole_people_by_the_seed(make_tree, stream):
    root = make_tree(dict.fromkeys(("Ann", "Bob", "Cid", "Dee", "Eve", "Fay"), 3))

    def people(seed, limit):
        source = load("folder", data_root=root, image_size=24, seed=seed, stream=stream, limit=limit)
        assert source.details.get("limit") == limit
        assert len(source.faces) == 3 * len(source.faces.used_names)
        return source.faces.used_names

    assert len(people(0, 11)) == 3
    assert people(0, 11) == people(0, 11) < people(0, 14)
    assert len({people(seed, 11) for seed in range(6)}) > 1
    assert people(0, None) == people(0, 18) == {"Ann", "Bob", "Cid", "Dee", "Eve", "Fay"}


def test_rendered_faces_can_be_limited():
    options = {"identities": 5, "images_per_identity": 2}
    source = load("synthetic", data_root=None, image_size=16, seed=0, options=options, limit=7)
    assert (len(source.faces), len(source.faces.used_names)) == (6, 3)


@pytest.mark.parametrize("name", ["insightface", "folder"])
def test_data_root_is_needed(name):
    with pytest.raises(MissingError, match="set --data-root or BENCH_DATA_ROOT"):
        load(name, data_root=None, image_size=32, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("insightfase", {}, "unknown dataset 'insightfase': did you mean 'insightface'"),
        ("insightface", {"pak": "x"}, "'insightface' has no option 'pak': available: pack, max_identities"),
        ("folder", {"crop": "7"}, "'folder', option crop='7': input should be less than or equal to 1"),
        ("insightface", {"max_identities": "many"}, "max_identities='many'"),
        ("lfw", {"alignment": "deep"}, "alignment='deep'"),
    ],
)
def test_usage_errors(tmp_path, name, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(name, data_root=tmp_path, image_size=32, seed=0, options=options)
    assert "\n" not in str(caught.value)


def test_image_size(tmp_path):
    with pytest.raises(UsageError, match="at least 8 pixels, got 4"):
        load("folder", data_root=tmp_path, image_size=4, seed=0)


@pytest.mark.parametrize("name", ["folder", "insightface", "webdataset"])
def test_a_folder_that_may_not_be_listed_is_not_taken_for_empty(name, tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refused)
    for look in (lambda: load(name, data_root=tmp_path, image_size=32, seed=0), lambda: info(tmp_path)):
        with pytest.raises(DataError, match=rf"{tmp_path} cannot be (read|listed): Permission denied"):
            look()


def test_run_settings_go_where_they_are_wanted(monkeypatch):
    class Wants(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        seed: int = -1
        image_size: int = -1

    class Plain(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

    registry: Registry[Dataset] = Registry("dataset")
    registry.add("wants", lambda: Dataset("x", Wants))
    registry.add("plain", lambda: Dataset("x", Plain))
    monkeypatch.setattr("bench.data.loaders.DATASETS", registry)
    assert parse_options("wants", {}, image_size=64, seed=7) == Wants(seed=7, image_size=64)
    assert parse_options("wants", {"seed": 3}, image_size=64, seed=7) == Wants(seed=3, image_size=64)
    assert parse_options("plain", {}, image_size=64, seed=7) == Plain()


def test_listing_names_imports_no_torch():
    code = "import sys; from bench.data.loaders import DATASETS; list(DATASETS); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
