"""The contact sheet shows what there is, in place."""

import numpy as np
import pytest
from PIL import Image

from reports.contact_sheet import CELL, as_picture, contact_sheet


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
