"""A set that is streamed is shared out as one that is loaded: the same people, images, copies and gaps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from alive import Alive
from open_source import load_set
from PIL import Image
from small_sets import people, picture, write_folder, write_records, write_shards

from bench.data.decode import AT_ONCE
from bench.data.encoded import EncodedSource, IdentityView
from bench.data.faces import FaceSet
from bench.data.splits import split
from bench.data.stream.scan import Scan, scan
from bench.errors import DataError, UsageError

SIZE = 32
SHARES = {"provider": 0.5, "public": 0.2, "evaluator": 0.1, "victims": 0.2}


def with_faults(victims, make_encoded):
    """50 people: twins, a copy of a victim, blank images, damaged ones, one who has nothing else."""
    everyone = people(50, 4, SIZE)
    everyone[3][1] = everyone[17][2] = picture(900, 0, SIZE)
    everyone[17].append(picture(17, 9, SIZE))
    everyone[8][0] = victims[2][1]
    everyone[20][0] = everyone[21][0] = make_encoded(Image.new("RGB", (SIZE, SIZE), (90, 90, 90)), "PNG")
    everyone[30][2] = everyone[30][2][:300]
    everyone[31] = [b"no image"] * 2
    everyone[32] = everyone[32][:1]
    return everyone


LAYOUTS = ["insightface", "folder", "folder with pairs", "webdataset"]


@pytest.fixture
def write(tmp_path, make_encoded):
    def make(layout):
        victims = people(6, 2, SIZE, first=500)
        everyone = with_faults(victims, make_encoded)
        root = tmp_path / "set"
        if layout == "insightface":
            return write_records(root, everyone, victims)
        if layout == "webdataset":
            return write_shards(root, everyone)
        return write_folder(root, everyone, victims if layout == "folder with pairs" else ())

    return make


def streamed(layout, root, on_error="skip", **options):
    opened = load_set(layout.split()[0], root, stream=True, **options)
    return replace(opened, faces=scan(opened.faces, on_error).applied_to(opened.faces))


def shared_out(source, **more):
    return split(source, **SHARES, generator=torch.Generator().manual_seed(0), **more)


def in_memory(part):
    return part if isinstance(part, FaceSet) else part.load()


def images_of(part, name):
    return int((part.labels == part.names.index(name)).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_people_and_pictures_in_the_same_parts(write, layout):
    root = write(layout)
    loaded = load_set(layout.split()[0], root)
    whole, parts = shared_out(loaded), shared_out(source := streamed(layout, root))
    assert isinstance(parts.provider, IdentityView)
    assert isinstance(parts.evaluator, IdentityView)
    for name, expected in whole.parts.items():
        part = in_memory(parts.parts[name])
        assert part.names == expected.names
        assert torch.equal(part.labels, expected.labels)
        assert torch.equal(part.images, expected.images)
    assert all(torch.equal(getattr(parts.pairs, f), getattr(whole.pairs, f)) for f in ("first", "second", "same"))
    assert parts.dropped == whole.dropped
    assert len(parts.dropped) == (1 if loaded.victims is None else 2)
    assert [left.reason for left in source.faces.skipped] == [left.reason for left in loaded.faces.skipped]
    assert len(source.faces.skipped) == 3
    assert parts.left_on_disk == {}


def test_options_that_leave_people_out(write):
    root = write("insightface")
    options = {"max_identities": 35, "max_images_per_identity": 3}
    whole = shared_out(load_set("insightface", root, **options))
    parts = shared_out(streamed("insightface", root, **options))
    assert in_memory(parts.provider).names == whole.provider.names
    assert torch.equal(in_memory(parts.provider).images, whole.provider.images)


def test_the_centre_is_cropped_on_disk_too(write):
    root = write("folder")
    loaded = load_set("folder", root, crop=0.5)
    assert torch.equal(streamed("folder", root, crop=0.5).faces.load().images, loaded.faces.images)


def test_memory_holds_whole_people_up_to_its_limit(write):
    source = streamed("webdataset", write("webdataset"))
    whole, parts = shared_out(source), shared_out(source, hold=17)
    for name in ("public", "victims"):
        full, held = whole.parts[name], parts.parts[name]
        assert len(held) <= 17 < len(full)
        assert parts.left_on_disk[name] == len(full) - len(held)
        assert held.used_names < full.used_names
        assert all(images_of(held, person) == images_of(full, person) for person in held.names)
    assert np.array_equal(parts.provider.rows, whole.provider.rows)  # trains on the disk
    assert np.array_equal(parts.evaluator.rows, whole.evaluator.rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cannot_be_decoded_is_refused_by_name(write, layout):
    with pytest.raises(DataError, match=r"(record 12\d|p030|offset).*stream_on_error=skip"):
        streamed(layout, write(layout), on_error="refuse")


def test_a_scan_is_read_back_as_it_was(write, tmp_path):
    view = load_set("folder", write("folder"), stream=True).faces
    scanned = scan(view, "skip")
    scanned.save(tmp_path)
    again = Scan.read(tmp_path)
    assert np.array_equal(again.contents.digests, scanned.contents.digests)
    assert np.array_equal(again.contents.blank, scanned.contents.blank)
    assert again.contents.blank.sum() == 2
    assert again.reasons == scanned.reasons


def test_an_image_is_in_memory_for_a_moment_only(tmp_path, monkeypatch):
    """While thousands are looked through, only those under way are there."""
    root = write_records(tmp_path, [[picture(0, 0)] * 10] * 300, people(4, 2))
    view = load_set("insightface", root, stream=True).faces
    read, alive = EncodedSource.read, Alive()
    monkeypatch.setattr("bench.data.stream.scan.workers", lambda: 2)
    monkeypatch.setattr(EncodedSource, "read", lambda self, rows: alive.watch(read(self, rows)))
    scan(view, "refuse")
    assert alive.seen == len(view) == 3000
    assert alive.most <= 2 * AT_ONCE


def test_what_does_not_fit_into_memory_is_refused(write, monkeypatch):
    faces = streamed("webdataset", write("webdataset")).faces
    free = type("Memory", (), {"available": 100_000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(DataError, match=r"faces of 32x32 pixels need .* fewer images to hold \(stream_images\)"):
        faces.load()


def test_copies_are_asked_for_after_a_scan_only(write):
    opened = load_set("folder", write("folder"), stream=True)
    with pytest.raises(ValueError, match="not scanned"):
        shared_out(opened)


def test_what_cannot_be_streamed():
    with pytest.raises(
        UsageError, match=r"'synthetic' cannot .* \(those that can: folder, insightface, lfw, webdataset\)"
    ):
        load_set("synthetic", None, stream=True)
