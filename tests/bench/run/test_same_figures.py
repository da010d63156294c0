"""The same stage from the same inputs: how far threads, processes, batches and full memory may change what it makes.

One run is the reference. Another, under changed circumstances, makes each stage and is then given the reference's, so
that every stage is held against the reference by itself.
"""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY_UNET, pipeline, run_tiny

import bench.sweep.workers as pool_module
from bench.run.stage import SECONDS, StageRunner, damage
from bench.sweep.cells import Cell
from bench.sweep.workers import Pool

RUN = {
    "defense": "partialface",
    "attack": "unet,linear,linkage",
    "attack_options": {"unet": {**TINY_UNET, "images": "64"}, "linkage": {"teacher_steps": "4", "steps": "4"}},
    "probes": 6,
    "image_size": 24,
    "dataset_options": {"identities": 28, "images_per_identity": 4},
}
#: What is no result: times, and how many faces were taken at once.
UNTOLD = {"batch_seconds", "batch_faces"}
UNTOLD_FIGURES = {"run_id", "seconds", "throughput", "peak_memory", "cached", "warnings"}
#: Values below this are held against it.
LEAST = 1e-3
PROTOCOL = Path(__file__).parents[3] / "docs" / "protocol.md"


def tolerances(column):
    """Kind of stage -> what docs/protocol.md allows, inf where it gives no figure."""
    rows = re.findall(r"^\| ([\w-]+) \| (\S+) \| (\S+) \| (\S+) \|$", PROTOCOL.read_text(), re.MULTILINE)
    return {row[0]: math.inf if row[column] == "-" else float(row[column]) for row in rows if row[0] != "stage"}


def kind_of(stage):
    """The row of the table that a stage is held against."""
    return "attack-linkage" if stage.startswith("attack-linkage") else stage.partition("-")[0]


def content(folder):
    """Name -> tensor of everything that a stage keeps."""
    found = {}
    for file in folder.rglob("*.safetensors"):
        found |= {f"{file.name}/{name}": t.double() for name, t in load_file(file).items() if name not in UNTOLD}
    for file in folder.glob("report.json"):
        found |= numbers(json.loads(file.read_text()), file.name)
    return found


def numbers(document, path=""):
    """Path -> tensor of every number in a document; what is no number has to be the same."""
    if isinstance(document, dict):
        parts = [(key, value) for key, value in document.items() if key not in UNTOLD_FIGURES]
    elif isinstance(document, list):
        parts = enumerate(document)
    else:
        number = isinstance(document, int | float) and not isinstance(document, bool)
        return {path if number else f"{path}={document}": torch.tensor(float(document if number else 0)).double()}
    return {name: value for key, part in parts for name, value in numbers(part, f"{path}/{key}").items()}


def apart(one, other):
    """(largest difference as a share of the largest value of its kind, its name); inf where something else differs."""
    if one.keys() != other.keys():
        return math.inf, str(sorted(one.keys() ^ other.keys()))
    return max((_share(value, other[name]), name) for name, value in one.items())


def _share(value, other):
    finite = torch.isfinite(value)
    if value.shape != other.shape or not torch.equal(value[~finite], other[~finite]):
        return math.inf
    if not finite.any():
        return 0.0
    # What is zero but for rounding (running means behind a batch norm without a shift) has no scale of its own.
    return float((value - other)[finite].abs().max() / value[finite].abs().max().clamp_min(LEAST))


def figures(result):
    """Of a result, each figure in full."""
    return numbers(json.loads(result.to_json()))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folders of the stages by their names, result)"""
    before, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reference")
    result = run_tiny(pipeline(out, **RUN).config)
    torch.set_num_threads(threads)
    for folder in (out / "cache").iterdir():
        if folder.is_dir():
            before[folder.name.rpartition("-")[0]] = folder
    return before, result


@pytest.fixture
def beside(reference, monkeypatch, tmp_path):
    """Runs under other circumstances: (kind of stage -> how far apart, result)."""
    folders, expected = reference
    do, found = StageRunner.do, {}

    def compared(self, job):
        if (job.stage, job.key) not in self._results:
            do(self, job)
            kind = kind_of(job.stage)
            differ = apart(content(folders[job.stage]), content(self.cache.path(job.stage, job.key)))
            found[kind] = max(found.get(kind, (0.0, "")), differ)
            self.assume(job, job.read(folders[job.stage]))
        return self._results[job.stage, job.key]

    def run(**changes):
        monkeypatch.setattr(StageRunner, "do", compared)
        result = run_tiny(pipeline(tmp_path, **RUN, **changes).config)
        found["measure"] = apart(figures(expected), figures(result))
        return found, result

    return run


def held(found, column):
    allowed = tolerances(column)
    assert found.keys() == allowed.keys()
    assert {kind: far for kind, far in found.items() if not far[0] <= allowed[kind]} == {}


def test_every_file_that_a_stage_keeps_is_watched_over(reference, tmp_path):
    """Cut or altered, whatever it is, it is found out."""
    folders, _ = reference
    kinds = {(kind_of(name), file.name): file for name, at in folders.items() for file in at.iterdir()}
    seen = set()
    for (kind, name), file in kinds.items():
        if name == SECONDS:  # is no result
            continue
        for harm in (lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
            copy = shutil.copytree(file.parent, tmp_path / "copy")
            (copy / name).write_bytes(harm((copy / name).read_bytes()))
            assert damage(copy) is not None, file
            shutil.rmtree(copy)
        seen.add(kind)
    assert seen == tolerances(1).keys() - {"measure"}


def test_another_process_of_a_sweep_makes_what_is_damaged_anew_with_the_same_bits(reference, tmp_path, monkeypatch):
    folders, expected = reference
    for folder in folders.values():
        copy = shutil.copytree(folder, tmp_path / "cache" / folder.name)
        file = next(copy.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(pool_module, "START", "forkserver")
    pool = Pool(run_tiny, 1, threads=1)
    pool.start(Cell(pipeline(tmp_path, **RUN).config))
    ((_, end),) = pool.wait()
    assert end.error is None
    made = {folder.name: folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()}
    assert made.keys() == {folder.name for folder in folders.values()}
    assert {
        name for name, folder in made.items() if apart(content(folder), content(folders[name.rpartition("-")[0]]))[0]
    } == set()
    assert figures(end.result) == figures(expected)


@pytest.mark.slow
def test_another_number_of_threads(beside, set_threads):
    set_threads(2)
    found, _ = beside()
    held(found, 1)


def test_linkage_trained_by_another_number_of_threads(reference, tmp_path, set_threads):
    """What it tells apart stays as far as is promised, with weights of its own from the same recogniser."""
    folders, expected = reference
    for name, folder in folders.items():
        if "linkage" not in name:
            shutil.copytree(folder, tmp_path / "cache" / folder.name)
    set_threads(2)
    found = run_tiny(pipeline(tmp_path, **RUN).config)
    promised = float(re.search(r"area under its curve by less than ([\d.]+)", PROTOCOL.read_text()).group(1))
    for kind in ("protected_plain", "protected_protected"):
        one, other = (getattr(result.attacks["linkage"].linkage, kind).auc.value for result in (expected, found))
        assert other == pytest.approx(one, abs=promised, rel=0)
    assert one != pytest.approx(0.5, abs=promised, rel=0)  # something that can be lost


def test_fewer_faces_at_once(beside):
    found, _ = beside(batch_size=5)
    held(found, 2)


def test_full_memory(beside, monkeypatch, caplog):
    """An accelerator that holds five faces of any network, or twelve of one in training."""
    forward = torch.nn.Conv2d.forward

    def cramped(self, batch):
        if len(batch) > (12 if self.training and torch.is_grad_enabled() else 5):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", cramped)
    with caplog.at_level(logging.WARNING, "bench"):
        found, result = beside()
    held(found, 3)
    notes = [warning for warning in result.warnings if "memory was full" in warning]
    told = [record.message.removeprefix("bench: ") for record in caplog.records]
    assert set(notes) <= set(told)
    assert len(told) == len(set(told))
    for what in (
        "recogniser behind partialface",
        "embedding faces",
        "training of unet",
        "training of linkage teacher",
        "judging",
        "attack unet",
    ):
        assert any(what in note for note in notes), what
