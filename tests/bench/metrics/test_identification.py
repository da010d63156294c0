"""Templates of IJB-B and IJB-C from their lists to TAR, rank-1 and TPIR, against a plain numpy oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.data.ijb import read_template_images, read_template_pairs, read_template_subjects
from bench.errors import DataError
from bench.metrics import identification as ident
from bench.metrics.bootstrap import tar_estimates

SUBJECTS, SIZE = 24, 6


@pytest.fixture(scope="module")
def ijb(tmp_path_factory):
    """Lists in the layout of IJB-C, and features of the images: (folder, features by image)."""
    folder, rng = tmp_path_factory.mktemp("meta"), np.random.default_rng(0)
    people = rng.normal(size=(SUBJECTS, SIZE))
    lines, subject_of, features, image = [], {}, {}, 0
    for subject in range(SUBJECTS):
        for template in (1000 - 3 * subject, 5000 + 7 * subject, 9000 + subject):
            subject_of[template] = subject
            for medium in range(rng.integers(1, 4)):
                for _ in range(rng.integers(1, 5)):
                    image += 1
                    lines.append(f"{image}.jpg {template} {100 * subject + medium}")
                    features[f"{image}.jpg"] = people[subject] + rng.normal(0, 0.9, SIZE)
    order = rng.permutation(len(lines))
    (folder / "ijbc_face_tid_mid.txt").write_text("\n".join(lines[i] for i in order) + "\n")
    templates = list(subject_of)
    pairs = [(a, b, int(subject_of[a] == subject_of[b])) for n, a in enumerate(templates) for b in templates[n + 1 :]]
    (folder / "ijbc_template_pair_label.txt").write_text("".join(f"{a} {b} {label}\n" for a, b, label in pairs))

    def write(name, chosen):
        rows = [f"{t},{subject_of[t]},{n}.jpg,x" for t in chosen for n in range(2)]  # a row for each image
        (folder / name).write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME,MORE\n" + "\n".join(rows) + "\n")

    write("ijbc_1N_gallery_G1.csv", [1000 - 3 * subject for subject in range(SUBJECTS // 2)])
    write("ijbc_1N_gallery_G2.csv", [1000 - 3 * subject for subject in range(SUBJECTS // 2, SUBJECTS)])
    write("ijbc_1N_probe_mixed.csv", [t for t in templates if t >= 5000])
    return folder, features


@pytest.fixture(scope="module")
def pooled(ijb):
    folder, features = ijb
    images = read_template_images(folder / "ijbc_face_tid_mid.txt")
    rows = torch.from_numpy(np.stack([features[name] for name in images.names]))
    return ident.pool_templates(rows, torch.from_numpy(images.templates), torch.from_numpy(images.media))


@pytest.fixture(scope="module")
def oracle(ijb):
    """Template -> unit vector, by the definition."""
    folder, features = ijb
    found = {}
    for line in (folder / "ijbc_face_tid_mid.txt").read_text().splitlines():
        image, template, medium = line.split()
        found.setdefault(int(template), {}).setdefault(medium, []).append(features[image])
    means = {t: np.mean([np.mean(images, axis=0) for images in media.values()], axis=0) for t, media in found.items()}
    return {t: mean / np.linalg.norm(mean) for t, mean in means.items()}


def test_templates_are_means_of_the_means_of_their_media(pooled, oracle):
    numbers, rows = pooled
    assert numbers.tolist() == sorted(oracle)
    np.testing.assert_allclose(rows, [oracle[t] for t in numbers.tolist()], atol=1e-6)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_verification(ijb, pooled, oracle, chunk):
    pairs, same = read_template_pairs(ijb[0] / "ijbc_template_pair_label.txt")
    scores = ident.template_scores(*pooled, torch.from_numpy(pairs), chunk=chunk)
    expected = np.array([oracle[a] @ oracle[b] for a, b in pairs])
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    impostors, fars = np.sort(scores.numpy()[~same]), ident.TEMPLATE_FARS
    assert list(fars) == ["1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]
    found = tar_estimates(scores, torch.from_numpy(same), list(fars.values()), None, "nobody knows")
    rates = {name: found[far] for name, far in fars.items()}
    for name in ("1e-3", "1e-2", "1e-1"):
        thresholds = [t for t in np.unique(scores) if (impostors >= t).mean() <= float(name)]
        assert rates[name].value == pytest.approx((scores.numpy()[same] >= min(thresholds)).mean())
        assert (rates[name].ci95, rates[name].reason) == (None, "nobody knows")
    for name in ("1e-6", "1e-5", "1e-4"):
        assert rates[name].value is None
        assert rates[name].reason.startswith(f"FAR {float(name):g} needs at least 1")


@pytest.mark.parametrize("gallery", ["G1", "G2"])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_identification(ijb, pooled, oracle, gallery, chunk):
    numbers, rows = pooled

    def part(name):
        templates, subjects = map(torch.from_numpy, read_template_subjects(ijb[0] / f"ijbc_1N_{name}.csv"))
        return rows[ident.places(numbers, templates)], subjects, templates.tolist()

    probes, subjects, probe_names = part("probe_mixed")
    enrolled, owners, names = part(f"gallery_{gallery}")
    assert (len(probes), len(enrolled)) == (2 * SUBJECTS, SUBJECTS // 2)
    found = ident.search(probes, subjects, enrolled, owners, chunk=chunk)

    matrix = np.array([[oracle[a] @ oracle[b] for b in names] for a in probe_names])
    own = subjects.numpy()[:, None] == owners.numpy()
    mated = own.any(axis=1)
    np.testing.assert_array_equal(found.mated, mated)
    assert 0 < mated.sum() < len(mated)
    np.testing.assert_allclose(found.mate[mated], matrix[own], atol=1e-6)
    np.testing.assert_allclose(found.other, np.where(own, -np.inf, matrix).max(axis=1), atol=1e-6)

    draws = torch.Generator().manual_seed(0)
    top = owners.numpy()[matrix.argmax(axis=1)] == subjects.numpy()
    first = ident.rank1(found, draws, replicates=100)
    assert (first.value, first.n) == (pytest.approx(top[mated].mean()), mated.sum())
    fpirs = {"1e-2": 0.01, "1e-1": 0.1, "half": 0.5}
    rates = ident.tpir_at_fpirs(found, draws, fpirs, replicates=100)
    assert rates["1e-2"].value is None
    assert rates["1e-2"].reason == "FPIR 0.01 needs at least 100 probes without a mate, there are 24"
    for leave_out in (False, True):
        rates = ident.tpir_at_fpirs(found, draws, fpirs, leave_out=leave_out, replicates=100)
        alarms = np.where(own, -np.inf, matrix).max(axis=1)  # nobody finds who is not enrolled
        high = alarms if leave_out else alarms[~mated]
        for name in ("1e-1", "half"):
            allowed = [t for t in np.unique(matrix) if (high >= t).mean() <= fpirs[name]]
            assert rates[name].value == pytest.approx((matrix[own] >= min(allowed)).mean())
    low, high = first.ci95
    assert low <= first.value <= high


def test_a_gallery_in_parts_is_the_gallery():
    rows = torch.nn.functional.normalize(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    people = torch.arange(40) % 7
    whole = ident.search(rows[:9], people[:9], rows[9:], people[9:])
    parts = [ident.search(rows[:9], people[:9], rows[cut], people[cut]) for cut in (slice(9, 20), slice(20, 40))]
    joined = parts[0].further(parts[1])
    np.testing.assert_allclose(joined.mate, whole.mate, atol=1e-6)
    np.testing.assert_allclose(joined.other, whole.other, atol=1e-6)


def test_no_more_scores_are_held_than_a_part_has():
    seen = []

    def compare(fresh, stored):
        seen.append((len(fresh), len(stored)))
        return fresh @ stored.T

    rows = torch.eye(50)[:, :7]
    ident.search(rows[:20], torch.arange(20), rows, torch.arange(50), compare=compare, chunk=8)
    assert max(first for first, _ in seen) == max(second for _, second in seen) == 8
    assert sum(first * second for first, second in seen) == 20 * 50


def test_a_tie_is_a_miss():
    found = ident.Searches(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.4]), torch.tensor([1, 2]))
    assert ident.rank1(found, torch.Generator(), replicates=100).value == 0.5


def test_of_several_templates_of_a_subject_the_best_counts():
    probes, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    found = ident.search(probes, torch.tensor([3]), gallery, torch.tensor([3, 3, 4]), chunk=1)
    assert (found.mate.item(), found.other.item()) == pytest.approx((1.0, 0.6))


def test_without_a_mate_nothing_is_measured():
    found = ident.search(torch.eye(2), torch.tensor([1, 2]), torch.eye(2), torch.tensor([3, 4]))
    assert ident.rank1(found, torch.Generator()).reason == "no probe has a mate in the gallery"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ident.pool_templates(torch.ones(2, 3), torch.ones(3), torch.ones(2)), r"got \(2, 3\), \(3,\), \(2,\)"),
        (
            lambda: ident.pool_templates(torch.full((1, 2), torch.nan), torch.ones(1), torch.ones(1)),
            "an image's feature holds NaN",
        ),
        (lambda: ident.places(torch.tensor([1, 3]), torch.tensor([[3, 2]])), "template 2 has no image"),
        (lambda: ident.places(torch.tensor([1, 3]), torch.tensor([9])), "template 9 has no image"),
        (
            lambda: ident.search(torch.eye(2), torch.ones(3), torch.eye(2), torch.ones(2)),
            "every template of a search needs a subject",
        ),
        (
            lambda: ident.search(torch.eye(2), torch.ones(2), torch.eye(3), torch.ones(3)),
            r"probes of \(2, 2\) cannot be compared with a gallery of \(3, 3\)",
        ),
        (
            lambda: ident.tpir_at_fpirs(ident.Searches(*torch.ones(3, 1)), torch.Generator(), {"all": 1.0}),
            "FPIR must lie between 0 and 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
