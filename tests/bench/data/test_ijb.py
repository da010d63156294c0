"""Lists of IJB-B and IJB-C: read as they come, and refused in one line where they are not."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import transform
from small_sets import people, write_janus

from bench.data.decode import decode_image
from bench.data.ijb import (
    TEMPLATE,
    aligned,
    find_janus,
    open_janus,
    read_landmarks,
    read_template_images,
    read_template_pairs,
    read_template_subjects,
)
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
        (read_template_pairs, f"1 2 1\n1 {'9' * 30} 1\n", r"list is no list of first, second, label: "),
        (read_template_pairs, "1 2.5 1\n", r"list is no list of first, second, label: "),
        (read_template_subjects, "T,S\n1,2\n1,3\n", r"list: template 1 is of two subjects$"),
        (read_template_subjects, "1,2,a.jpg\n3,4,b.jpg\n", r"list has no heading: it starts with 1,2,a\.jpg$"),
        (
            read_landmarks,
            "1.jpg 1 2 3 4 5 6 7 8 9 10\n",
            r"list is no list of image, x1, y1, .*, score: it starts with",
        ),
        (read_landmarks, "1.jpg 1 2 3 4 5 6 7 8 9 inf 0.5\n", r"list line 1: a number is not finite$"),
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


def test_faces_are_aligned_as_the_field_aligns_them():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    photo = np.asarray(coarse.resize((240, 180), Image.Resampling.BICUBIC))
    turned = transform.SimilarityTransform(scale=1.4, rotation=0.3, translation=(50, 5))
    landmarks = turned(TEMPLATE) + rng.normal(0, 1.5, (5, 2))
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    face = decode_image(aligned(buffer.getvalue(), landmarks)).permute(1, 2, 0).numpy()
    # What is in common use: scikit-image's estimate (Umeyama 1991), and a warp that counts from the middle of a pixel.
    estimate = transform.estimate_transform("similarity", landmarks, TEMPLATE)
    expected = transform.warp(photo, estimate.inverse, output_shape=(112, 112), order=1, preserve_range=True)
    inside = transform.warp(np.ones((180, 240)), estimate.inverse, output_shape=(112, 112), order=1) > 0.999
    assert inside.mean() > 0.7
    assert np.abs(face - expected)[inside].max() < 1.5
    outside = transform.warp(np.ones((180, 240)), estimate.inverse, output_shape=(112, 112), order=0) == 0
    assert outside.mean() > 0.02
    assert face[outside].max() == 0


def test_a_benchmark_is_opened_by_its_lists(tmp_path):
    folder = write_janus(tmp_path / "set", people(4, 6, size=112))
    assert (find_janus(folder), find_janus(tmp_path)) == ("ijbc", None)
    janus = open_janus(folder, 32)
    assert (janus.name, len(janus.source), sorted(janus.galleries)) == ("ijbc", 24, ["G1", "G2"])
    np.testing.assert_allclose(janus.weights[:4], [0.7, 0.9, 0.5, 0.7], atol=1e-6)
    assert janus.subjects() == {
        template + sign * subject: subject
        for template, sign in ((1000, -1), (2000, 1), (3000, 1))
        for subject in range(4)
    }
    batch = janus.source.read(np.array([5]))
    whole = decode_image((folder / "loose_crop" / "6.jpg").read_bytes(), 32)
    # Landmarks that are where they belong move nothing.
    assert (batch.images[0].float() - whole.float()).abs().max() <= 1


def without(name):
    return lambda folder: (folder / "meta" / name).unlink()


def rewritten(name, text):
    return lambda folder: (folder / "meta" / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            without("ijbc_face_tid_mid.txt"),
            MissingError,
            r"meta has no list of templates such as ijbc_face_tid_mid\.txt$",
        ),
        (
            lambda folder: (folder / "loose_crop").rename(folder / "x"),
            MissingError,
            r"loose_crop does not exist: the im",
        ),
        (
            rewritten("ijbc_template_pair_label.txt", "1 2000 0\n"),
            DataError,
            r"^template 1 of .*meta has no image: the l",
        ),
        (
            rewritten("ijbc_name_5pts_score.txt", f"1.jpg {' 1' * 10} 1\n"),
            DataError,
            r"score\.txt lacks 2\.jpg: the lists do not belong together$",
        ),
    ],
)
def test_lists_that_do_not_belong_together(tmp_path, change, error, message):
    folder = write_janus(tmp_path / "set", people(4, 6, size=112))
    change(folder)
    with pytest.raises(error, match=message):
        open_janus(folder, 32)


def test_lists_of_one_kind_do(tmp_path):
    folder = write_janus(tmp_path / "set", people(4, 6, size=112), name="ijbb", aligned=False)
    without("ijbb_1N_probe_mixed.csv")(folder)
    janus = open_janus(folder, 32)
    assert (janus.name, janus.probes, janus.weights.tolist()) == ("ijbb", None, [1.0] * 24)
    without("ijbb_template_pair_label.txt")(folder)
    with pytest.raises(
        MissingError, match=r"neither ijbb_template_pair_label\.txt \(1:1\) nor galleries and ijbb_1N_pro"
    ):
        open_janus(folder, 32)
