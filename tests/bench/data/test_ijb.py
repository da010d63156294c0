"""Lists of IJB-B and IJB-C: read as they come, and refused in one line where they are not."""

import numpy as np
import pytest

from bench.data.ijb import read_template_images, read_template_pairs, read_template_subjects
from bench.errors import DataError, MissingError


def test_images(tmp_path):
    (tmp_path / "list.txt").write_text("1.jpg 1 69544\n2.jpg 1 47049\n1.jpg 4096 69544\n")
    images = read_template_images(tmp_path / "list.txt")
    assert images.names == ("1.jpg", "2.jpg", "1.jpg")
    assert (images.templates.tolist(), images.media.tolist()) == ([1, 1, 4096], [69544, 47049, 69544])


def test_pairs(tmp_path):
    (tmp_path / "list.txt").write_text("1 11065 1\n1 11066 0\n")
    pairs, same = read_template_pairs(tmp_path / "list.txt")
    np.testing.assert_array_equal(pairs, [[1, 11065], [1, 11066]])
    assert same.tolist() == [True, False]


def test_subjects(tmp_path):
    (tmp_path / "list.csv").write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME\n9,2,a.jpg\n3,1,b.jpg\n9,2,c.jpg\n")
    templates, subjects = read_template_subjects(tmp_path / "list.csv")
    assert (templates.tolist(), subjects.tolist()) == ([3, 9], [1, 2])


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_template_images, "", r"list is no list of image, template, medium: it starts with ''$"),
        (read_template_images, "1.jpg 1\n", r"list is no list of image, template, medium: it starts with '1\.jpg 1'$"),
        (read_template_images, "1.jpg 1 x\n", r"list is no list of image, template, medium: .*'?x"),
        (read_template_images, "1.jpg 1 2 3\n", r"list is no list of image, template, medium: "),
        (read_template_images, "1.jpg 1 2\n1.jpg 1 2 3\n", r"list is no list of image, template, medium: "),
        (read_template_images, "1.jpg 1 2\n1.jpg 1\n", r"list is no list of image, template, medium: "),
        (read_template_pairs, "1 2 1\n1 3 2\n", r"list line 2: a label is 0 or 1, got 2$"),
        (read_template_pairs, "1 2.5 1\n", r"list is no list of first, second, label: "),
        (read_template_subjects, "T,S\n1,2\n1,3\n", r"list: template 1 is of two subjects$"),
        (read_template_subjects, "1,2,a.jpg\n3,4,b.jpg\n", r"list has no heading: it starts with 1,2,a\.jpg$"),
        (read_template_subjects, "T,S\n1,a\n", r"list is no list of template, subject: "),
    ],
)
def test_what_is_no_such_list_is_one_line(tmp_path, read, text, message):
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "list")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_template_images, read_template_pairs, read_template_subjects])
def test_a_list_that_is_not_there(tmp_path, read):
    with pytest.raises(MissingError, match="does not exist"):
        read(tmp_path / "list")
