"""IJB-B, IJB-C and large galleries in a run, against plain numpy over the embeddings of every image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_sets import people, picture, write_folder, write_janus, write_records
from tiny_runs import PACKED, made, pipeline, stages_of

from bench.data.faces import FaceSet
from bench.data.ijb import open_janus
from bench.errors import DataError, MissingError
from bench.measures import kind_at
from bench.recognition.embed import embed_faces
from bench.results import measures
from bench.run import identification
from bench.run.identification import distracted_job, measure_templates, pooled_job, sought

SUBJECTS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Learners and victims, a benchmark of templates, and distractors among whom an image is a victim's."""
    folder = tmp_path_factory.mktemp("root")
    everyone, victims = people(40, 4), people(6, 3, first=500)
    write_records(folder, everyone, victims)
    subjects = people(SUBJECTS, 6, size=112, first=800)
    write_janus(folder / "IJB-C", subjects)
    (folder / "more").mkdir()
    strangers = people(12, 3, first=900)
    strangers[3] = [victims[0][0], picture(950, 0), picture(950, 1)]
    write_folder(folder / "more" / "faces", strangers)
    return folder


@pytest.fixture(scope="module")
def run(out, root):
    distractors = f"folder:{root / 'more' / 'faces'}"
    cell = pipeline(out, **PACKED, data_root=root, verify="IJB-C", distractors=distractors)
    return cell.run(), cell


def embedded(stages, name, faces):
    """Of faces that a deterministic defence sends."""
    defense = stages.defense(name, {})
    rows = embed_faces(stages.recogniser(defense), defense, faces, generators=lambda _: torch.Generator(), batch_size=8)
    return rows.double().numpy()


def nobody(images):
    return FaceSet(images, torch.zeros(len(images), dtype=torch.int64), ("",))


@pytest.fixture(scope="module")
def templates(run, root):
    """Defence -> template -> its unit row, by the definition; and the template's subject."""
    stages, janus, rows = stages_of(run[1]), open_janus(root / "IJB-C", PACKED.get("image_size", 32)), {}
    images = janus.source.read(np.arange(len(janus.source))).images
    for of, name in (("protected", "pixelate"), ("unprotected", "none")):
        by = {}
        for number, row in enumerate(embedded(stages, name, nobody(images))):
            template, medium = int(janus.images.templates[number]), int(janus.images.media[number])
            by.setdefault(template, {}).setdefault(medium, []).append(row * janus.weights[number])
        means = {t: np.mean([np.mean(m, axis=0) for m in media.values()], axis=0) for t, media in by.items()}
        rows[of] = {t: mean / np.linalg.norm(mean) for t, mean in means.items()}
    return rows, janus.subjects()


def test_pairs_of_templates(run, templates):
    protocol, (rows, subject) = run[0].utility.templates["ijbc"], templates
    assert (protocol.templates, protocol.images) == (3 * SUBJECTS, 6 * SUBJECTS)
    for of in ("protected", "unprotected"):
        names = sorted(rows[of])
        pairs = [(a, b) for a in names for b in names if a < b]
        scores = np.array([rows[of][a] @ rows[of][b] for a, b in pairs])
        same = np.array([subject[a] == subject[b] for a, b in pairs])
        figures = getattr(protocol, of)
        assert figures.pairs == len(pairs)
        for name in ("1e-1", "1e-2"):
            allowed = [t for t in scores if (scores[~same] >= t).mean() <= float(name)]
            measured = figures.tar_at_far[name]
            assert measured.value == pytest.approx((scores[same] >= min(allowed)).mean(), abs=1e-9)
            assert measured.ci95[0] <= measured.value <= measured.ci95[1]
        assert figures.tar_at_far["1e-6"].reason.startswith("FAR 1e-06 needs at least 1000000 impostor pairs")


def test_search_in_each_gallery(run, templates):
    protocol, (rows, subject) = run[0].utility.templates["ijbc"], templates
    for of in ("protected", "unprotected"):
        figures, found = getattr(protocol, of), rows[of]
        shares = []
        for name, enrolled in (("G1", range(SUBJECTS // 2)), ("G2", range(SUBJECTS // 2, SUBJECTS))):
            gallery = [1000 - person for person in enrolled]
            mated = [t for t in found if t >= 2000 and subject[t] in enrolled]
            best = {t: max(gallery, key=lambda g, t=t: found[t] @ found[g]) for t in mated}
            shares.append(np.mean([subject[best[t]] == subject[t] for t in mated]))
            part = figures.galleries[name]
            assert part.rank1.value == pytest.approx(shares[-1])
            assert (part.gallery, part.probes, part.mated) == (SUBJECTS // 2, 2 * SUBJECTS, SUBJECTS)
            alarms = [max(found[t] @ found[g] for g in gallery) for t in found if t >= 2000 and t not in mated]
            # 8 probes have no mate: at FPIR 0.1 not one of them may raise an alarm.
            assert part.tpir_at_fpir["1e-1"].reason == "FPIR 0.1 needs at least 10 probes without a mate, there are 8"
            assert len(alarms) == SUBJECTS
        assert figures.mean.rank1.value == pytest.approx(np.mean(shares))


def test_rank_1_among_distractors(run, root):
    large, stages = run[0].utility.distractors, stages_of(run[1])
    victims, who = stages.splits.victims, sought(stages)
    faces = identification.open_distractors(stages)
    images = faces.read(np.arange(len(faces))).images
    images = images[~nobody(images).among(victims.images)]
    assert large.distractors == len(images) == 35  # one is a victim's
    for of, name in (("protected", "pixelate"), ("unprotected", "none")):
        rows, others = embedded(stages, name, victims), embedded(stages, name, nobody(images))
        probes, gallery = rows[who.probes], rows[who.gallery]
        own = victims.labels[who.probes].numpy()[:, None] == victims.labels[who.gallery].numpy()
        scores = probes @ gallery.T
        mate, rival = scores[own], np.where(own, -np.inf, scores).max(axis=1)
        beaten = np.maximum(rival, (probes @ others.T).max(axis=1))
        figures = getattr(large, of)
        found = stages.do(distracted_job(stages, stages.defense(name, {})))
        np.testing.assert_allclose(found.mate, mate, atol=1e-5)
        np.testing.assert_allclose(np.maximum(found.other.numpy(), found.best.amax(dim=0).numpy()), beaten, atol=1e-5)
        assert (figures.rank1.value, figures.rank1.n) == (None, len(probes))  # nobody is named in a pack
        assert "does not name its people" in figures.rank1.reason


def test_every_part_of_the_distractors_is_of_the_next(run):
    large = run[0].utility.distractors
    assert [int(size) for size in large.protected.rank1_among][-1] == large.distractors
    assert len(large.protected.rank1_among) == 2  # ten, or nine without the victim's, and all


def test_every_figure_is_known(run):
    places = [p for p, _ in measures({"utility": run[0].utility}) if ".templates." in p or ".distractors." in p]
    assert {kind_at(place).heading for place in places} == {"TAR@FAR", "rank-1 identification", "TPIR@FPIR"}


def test_warnings_name_who_is_left_out(run):
    assert any(w.startswith("distractors: 1 images are left out, which equal a victim's") for w in run[0].warnings)
    assert not any(w.startswith("ijbc: ") for w in run[0].warnings)


def test_whom_a_recogniser_learns_from_is_left_out_with_all_templates(run, root):
    stages, folder = stages_of(run[1]), root / "IJB-C"
    learnt = open_janus(folder, 32).source.read(np.array([0])).images
    stages.learnt = lambda faces: faces.among(learnt)
    # Another key: nothing of it is taken from the cache.
    stages.recogniser_key = lambda defense, role: "other"
    recognisers = {name: stages_of(run[1]).recogniser(stages.defense(name, {})) for name in ("pixelate", "none")}
    stages.recogniser = lambda defense, role="provider": recognisers[defense.name]
    figures, notes = measure_templates(stages, stages.defense("pixelate", {}), stages.defense("none", {}), folder)
    assert notes == [
        "ijbc: 3 templates of people whose image a recogniser learns from are left out, with all pairs and searches of "
        "theirs"
    ]
    kept = 3 * (SUBJECTS - 1)
    assert figures.protected.pairs == kept * (kept - 1) // 2
    assert figures.protected.galleries["G1"].gallery == SUBJECTS // 2 - 1


def test_the_plan_knows_of_them(run, root, out):
    cell = pipeline(out, **PACKED, data_root=root, verify="IJB-C", distractors=f"folder:{root / 'more' / 'faces'}")
    stages = {stage.name: stage.cached for stage in cell.plan().stages}
    further = {f"{what}-{of}" for what in ("pool-ijbc", "search") for of in ("pixelate", "none")}
    assert further <= stages.keys()
    assert all(stages.values())
    other = {
        stage.name: stage
        for stage in pipeline(out, **PACKED, data_root=root, verify="IJB-C", image_size=48).plan().stages
    }
    assert not other["pool-ijbc-none"].cached
    assert other["pool-ijbc-none"].seconds is None  # with distractors it was another run


def test_a_killed_run_embeds_only_what_is_missing(run, root, tmp_path, monkeypatch):
    monkeypatch.setattr(identification, "PART", 10)
    stages, janus = stages_of(run[1]), open_janus(root / "IJB-C", 32)
    job = pooled_job(stages, stages.defense("none", {}), root / "IJB-C")
    whole, done = stages.do(job), []

    def stop(at, total):
        done.append(at)
        if at >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.make(tmp_path, stop)
    read = list[int]()
    original = type(janus.source).encoded
    monkeypatch.setattr(type(janus.source), "encoded", lambda self, rows: read.extend(rows) or original(self, rows))
    job.make(tmp_path, lambda *_: None)
    assert sorted(read) == list(range(20, 48))
    np.testing.assert_allclose(job.read(tmp_path).rows, whole.rows, atol=1e-6)


@pytest.mark.parametrize("defense", ["biohash", "iom"])
def test_under_keys_all_show_one(run, root, out, defense):
    """Pairs of one person and of two are then told apart by the face alone, and a search needs one key."""
    stages = stages_of(pipeline(out, **PACKED | {"defense": defense, "attack": "template"}, data_root=root))
    target, folder = stages.defense(defense, {}), root / "IJB-C"
    system = identification._System(stages, target, "x")
    held = system._held(5)
    assert held is not None
    assert len(held.unique(dim=0)) == 1
    figures, _ = measure_templates(stages, target, stages.defense("none", {}), folder)
    rows = stages.do(pooled_job(stages, target, folder)).rows
    assert figures.protected.pairs == 24 * 23 // 2
    stored = system.stored(rows[:3])
    one_by_one = torch.stack([system.scores(stored, rows[3 + n : 4 + n].expand(3, -1)) for n in range(2)])
    np.testing.assert_allclose(system.compare(rows[3:5], stored), one_by_one, atol=1e-6)


def test_what_is_not_there_is_refused_before_anything_is_trained(out, root, tmp_path):
    with pytest.raises(
        MissingError, match=r"--verify: there is no ijbb: expected a folder with loose_crop and meta/ijbb_f"
    ):
        pipeline(tmp_path, **PACKED, data_root=root, verify="ijbb")
    with pytest.raises(MissingError, match=r"--distractors: .*nowhere does not exist"):
        pipeline(tmp_path, **PACKED, data_root=root, distractors=f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    cell = pipeline(tmp_path, **PACKED, data_root=root, distractors=f"folder:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match=r"empty holds no images where they are looked for"):
        cell.run()
    assert made(cell.directory) == []
    broken = write_janus(tmp_path / "broken", people(2, 6))
    (broken / "meta" / "ijbc_template_pair_label.txt").write_text("1 2 3\n")
    cell = pipeline(tmp_path, **PACKED, data_root=root, verify=broken)
    with pytest.raises(DataError, match=r"pair_label\.txt line 1: a label is 0 or 1, got 3 \(--verify names"):
        cell.run()
    assert made(cell.directory) == []
