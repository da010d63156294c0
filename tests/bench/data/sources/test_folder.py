from __future__ import annotations

import numpy as np
import pytest
from open_source import open_source

from bench.data.decode import decode_image
from bench.data.folder import scan_tree
from bench.errors import DataError, MissingError


@pytest.fixture
def root(make_tree):
    root = make_tree({"Cy": 1, "Ann": 3, "Bob": 2})
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.jpg").write_bytes(b"no")
    (root / "Ann" / "notes.txt").write_text("no image")
    (root / "Ann" / ".thumb.jpg").write_bytes(b"no")
    (root / "empty").mkdir()
    (root / "stray.jpg").write_bytes(b"no")
    return root


def test_the_images_of_the_tree_in_its_order(root):
    tree, source = scan_tree(root), open_source("folder", root, image_size=48)
    assert len(source) == len(tree.paths) == 6
    assert source.labels.tolist() == list(tree.labels)
    assert [source.name(k) for k in range(source.identities)] == list(tree.names)
    assert [source.where(i) for i in range(6)] == [str(path.relative_to(root)) for path in tree.paths]
    batch = source.read(np.array([4, 0]))
    for image, row in zip(batch.images, (4, 0), strict=True):
        assert (image.int() - decode_image(tree.paths[row].read_bytes(), 48).int()).abs().max() <= 2
    assert batch.labels.tolist() == [tree.labels[4], tree.labels[0]]


def test_names_that_are_no_unicode(root):
    odd = bytes(root / "Bob") + b"/\xff\xfe.jpg"
    with open(odd, "wb") as file:  # noqa: PTH123 - a path of bytes
        file.write((root / "Bob" / "Bob_0001.jpg").read_bytes())
    source = open_source("folder", root)
    assert len(source.read(np.arange(7)).images) == 7


def test_an_image_that_went_or_broke(root):
    source = open_source("folder", root, image_size=32)
    (root / "Ann" / "Ann_0002.jpg").unlink()
    (root / "Bob" / "Bob_0001.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"Ann/Ann_0002\.jpg: not a regular file"):
        source.read(np.arange(6))
    with pytest.raises(DataError, match=r"Bob/Bob_0001\.jpg: not a JPEG"):
        source.read(np.array([3]))
    skipping = open_source("folder", root, image_size=32, on_error="skip")  # does not see the one that went
    batch = skipping.read(np.arange(5))
    assert batch.rows.tolist() == [0, 1, 3, 4]
    assert [entry.where for entry in batch.skipped] == ["Bob/Bob_0001.jpg"]


def test_missing_and_empty(tmp_path):
    with pytest.raises(MissingError, match="is not a folder"):
        open_source("folder", tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images"):
        open_source("folder", tmp_path)
