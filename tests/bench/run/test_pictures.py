"""What a run keeps for looking at: whose pictures, in which files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.run.archive import read_samples
from bench.run.pictures import CELL, ROWS, as_picture, contact_sheet, write_sheet

COUNT = 12


@pytest.fixture
def attacks():
    """Stages that send a face's negative, in batches of five, so that the chosen victims lie in several."""
    images = torch.arange(2 * COUNT, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16) * 10
    stages = SimpleNamespace(
        splits=SimpleNamespace(victims=SimpleNamespace(images=images)),
        victim_source=SimpleNamespace(synthetic=True, name="synthetic"),
    )

    def interceptions(defense, probes, count):
        for index in probes.split(5):
            yield index, 1 - images[index][:, None].float() / 255, None

    config = SimpleNamespace(defense="negative", attack="none", knowledge="whitebox")
    selection = SimpleNamespace(attacked=torch.arange(COUNT) * 2)
    return SimpleNamespace(config=config, stages=stages, selection=selection, interceptions=interceptions)


def grey(path):
    return int(np.asarray(Image.open(path).convert("L")).mean())


def test_worst_median_and_best_are_kept_with_the_first(attacks, tmp_path):
    recovered = torch.linspace(0, 1, COUNT).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    leakage = torch.tensor([5.0, 1, 2, 3, 4, 0, 6, 7, 8, 11, 9, 10])
    store = SimpleNamespace(directory=tmp_path)
    captions = [f"victim {n}" for n in range(COUNT)]
    (tmp_path / "samples").mkdir()
    write_sheet(
        attacks, None, {"recovered": recovered}, captions, store, leakage=leakage, members={"half": recovered / 2}
    )
    samples = read_samples(tmp_path / "samples")
    assert samples is not None
    assert samples.columns == ("original", "sent", "recovered", "half")
    roles = {victim.image: victim.roles for victim in samples.victims}
    # Position 9 leaks most, 5 least, 0 is the sixth of twelve.
    assert roles == {0: ("first", "median"), 2: ("first",), 4: ("first",), 6: ("first",), 10: ("best",), 18: ("worst",)}
    worst = next(victim for victim in samples.victims if "worst" in victim.roles)
    shown = {column: grey(samples.folder / name) for column, name in worst.files.items()}
    assert shown == {"original": 180, "sent": 75, "recovered": round(255 * 9 / 11), "half": round(255 * 9 / 22)}
    assert worst.caption == "victim 9"
    sheet = Image.open(tmp_path / "samples" / "contact-sheet.png")
    assert sheet.height > ROWS * 112


def test_without_leakage_there_are_only_the_first(attacks, tmp_path):
    (tmp_path / "samples").mkdir()
    store = SimpleNamespace(directory=tmp_path)
    attacks.selection.attacked = torch.arange(3)
    write_sheet(attacks, None, {}, (), store)
    index = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [victim["roles"] for victim in index["victims"]] == [["first"]] * 3
    assert index["columns"] == ["original", "sent"]


def test_faces_are_shown_as_they_are():
    face = np.zeros((3, 4, 4), dtype=np.float32)
    face[0] = 1.0
    picture = as_picture(face)
    assert picture.shape == (4, 4, 3)
    assert (picture[..., 0] == 255).all()
    assert (picture[..., 1:] == 0).all()


def test_maps_are_tiled_in_channel_order():
    maps = np.tile(np.linspace(-700, 700, 16, dtype=np.float32).reshape(1, 4, 4), (5, 1, 1))
    maps[4] *= -1
    picture = as_picture(maps)
    assert picture.shape == (12, 12, 3)  # 5 maps on a 3 x 3 grid
    assert np.array_equal(picture[:4, :4], picture[:4, 4:8])
    assert picture[0, 0, 0] == 0
    assert picture[4, 4, 0] == 255  # the fifth map, mirrored in sign, stands in the middle
    assert (picture[8:, 8:] == 0).all()


def test_a_constant_map_does_not_divide_by_zero():
    assert np.isfinite(as_picture(np.full((4, 3, 3), 7.0, dtype=np.float32))).all()


def test_a_template_is_one_picture_of_its_values():
    template = np.array([-1, 1, 1, -1], dtype=np.float32).reshape(4, 1, 1)
    assert as_picture(template)[..., 0].tolist() == [[0, 255], [255, 0]]


def test_three_maps_out_of_range_are_no_picture():
    assert as_picture(np.full((3, 4, 4), 300.0, dtype=np.float32)).shape == (8, 8, 3)


def test_sheet_holds_every_picture_in_its_cell(tmp_path):
    red = np.zeros((3, 8, 8), dtype=np.float32)
    red[0] = 1.0
    blue = red[::-1].copy()
    path = tmp_path / "sheet.png"
    contact_sheet(path, [("original", [red, red]), ("sent", [blue, blue])], ["one", "two"], "synthetic faces")
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert sheet.shape[1] >= 2 * CELL
    assert (sheet == (255, 0, 0)).all(axis=-1).sum() == 2 * CELL * CELL
    assert (sheet == (0, 0, 255)).all(axis=-1).sum() == 2 * CELL * CELL
    assert (sheet[100, 50] == (255, 0, 0)).all()


def test_columns_must_match_the_captions(tmp_path):
    with pytest.raises(ValueError, match="one picture per caption"):
        contact_sheet(tmp_path / "x.png", [("original", [])], ["one"], "")
    assert not (tmp_path / "x.png").exists()
