"""Identity leakage against its definitions, one image at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.data.faces import FaceSet
from bench.errors import DataError
from bench.metrics import identity
from bench.metrics.identity import content_ids, identity_leakage, knn_distance, select_probes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_leakage_follows_its_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_CHUNK", 7)
    people = torch.tensor([30, 10, 20, 50])  # enrolled, in no order; 40 has no other image
    centres = normal(60, 16)
    labels = torch.tensor([10, 20, 30, 40, 50]).repeat(4)
    originals = centres[labels] + 0.6 * normal(20, 16, seed=1)
    recovered = 3 * (originals + 2.5 * normal(20, 16, seed=2))  # any length: only directions count
    gallery = centres[people] + 0.6 * normal(4, 16, seed=3)
    leakage = identity_leakage(recovered, originals, labels, gallery, people, threshold=0.3)
    for i in range(20):
        cosine = F.cosine_similarity(recovered[i], originals[i], dim=0)
        assert leakage.cosine[i] == pytest.approx(float(cosine), abs=1e-6)
        assert leakage.type1[i] == float(cosine >= 0.3)
        if labels[i] == 40:
            assert leakage.type2[i].isnan()
            assert leakage.rank1[i].isnan()
            continue
        to_gallery = F.cosine_similarity(recovered[i][None], gallery)
        person = int((people == labels[i]).nonzero())
        assert leakage.type2[i] == float(to_gallery[person] >= 0.3)
        assert leakage.rank1[i] == float(int(to_gallery.argmax()) == person)
    measured = leakage.rank1[~leakage.rank1.isnan()]
    for values in (leakage.type1, leakage.type2[~leakage.type2.isnan()], measured):
        assert 0 < values.mean() < 1  # the sample exercises both outcomes


def test_the_threshold_itself_is_accepted() -> None:
    embedding = torch.tensor([[1.0, 0.0]])
    leakage = identity_leakage(embedding, embedding, torch.tensor([0]), embedding, torch.tensor([0]), threshold=1.0)
    assert (leakage.type1.item(), leakage.type2.item()) == (1.0, 1.0)


def test_a_constant_recovery_earns_chance_at_rank_one() -> None:
    gallery = normal(25, 8)
    recovered = normal(1, 8, seed=1).expand(25, 8)
    leakage = identity_leakage(recovered, gallery, torch.arange(25), gallery, torch.arange(25), 0.5)
    assert leakage.rank1.sum() == 1
    collapsed = torch.ones(25, 8)
    tied = identity_leakage(collapsed, collapsed, torch.arange(25), collapsed, torch.arange(25), 0.5)
    torch.testing.assert_close(tied.rank1, torch.full((25,), 1 / 25))


def test_rank_five_counts_who_is_nearer() -> None:
    # Person 0 is recovered, everybody added stands nearer to the recovery: 0 falls back one place each time.
    angles = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.1])
    gallery = torch.stack((angles.cos(), angles.sin()), dim=1)
    recovered, person = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    ranks = [
        identity_leakage(recovered, recovered, person, gallery[:people], torch.arange(people), 0.5).rank5.item()
        for people in range(1, 7)
    ]
    assert ranks == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_ties_share_the_places_that_are_left() -> None:
    # Two are nearer, and eight (the person among them) tie for the remaining three of five places.
    gallery = torch.cat((torch.tensor([[1.0, 0.0]]).expand(2, 2), torch.tensor([[0.0, 1.0]]).expand(8, 2)))
    recovered, person = torch.tensor([[1.0, 0.1]]), torch.tensor([4])
    leakage = identity_leakage(recovered, recovered, person, gallery, torch.arange(10), 0.5)
    assert leakage.rank5.item() == pytest.approx(3 / 8)
    assert leakage.rank1.item() == 0
    collapsed = torch.ones(25, 8)
    tied = identity_leakage(collapsed, collapsed, torch.arange(25), collapsed, torch.arange(25), 0.5)
    torch.testing.assert_close(tied.rank5, torch.full((25,), 5 / 25))


def test_knn_distance_is_to_the_nearest_other_image_of_the_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_CHUNK", 3)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    content = torch.tensor([0, 1, 2, 3, 4, 5, 5])  # the two images of person 2 are one image
    plain = normal(7, 16)
    attacked = torch.tensor([0, 2, 4, 5])
    recovered = 3 * (plain[attacked] + 0.3 * normal(4, 16, seed=1))
    distance = knn_distance(recovered, attacked, plain, labels, content)
    unit, others = F.normalize(recovered, dim=1), F.normalize(plain, dim=1)
    for row, candidates in enumerate(([1, 2], [0, 1], [3])):
        expected = min(float((unit[row] - others[i]).norm()) for i in candidates)
        assert distance[row] == pytest.approx(expected, abs=1e-5)
    assert distance[3].isnan()
    # The attacked image itself would be nearer than any other: it does not count.
    assert (distance[:3] > (unit - others[attacked]).norm(dim=1)[:3]).all()


def test_wrong_input_is_refused() -> None:
    embeddings, people = normal(4, 8), torch.arange(4)
    for change, message in (
        ({"gallery_identities": torch.tensor([0, 1, 2, 2])}, "one image per person"),
        ({"gallery": embeddings[:0], "gallery_identities": people[:0]}, "gallery is empty"),
        ({"originals": embeddings[:3]}, r"the originals must be \(N, D\)"),
        ({"gallery": embeddings[:, :3]}, r"the gallery must be \(N, D\)"),
        ({"recovered": embeddings * torch.nan}, "NaN"),
    ):
        given = {"recovered": embeddings, "originals": embeddings, "gallery": embeddings, "identities": people}
        with pytest.raises(DataError, match=message):
            identity_leakage(**{**given, "gallery_identities": people, "threshold": 0.5, **change})
    with pytest.raises(DataError, match=r"the plain faces must be \(N, D\)"):
        knn_distance(embeddings[:2, :5], people[:2], embeddings, people, people)


def test_content_ids_tell_images_apart() -> None:
    images = torch.randint(0, 256, (300, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[100] = images[7]
    images[200] = images[7]
    images[200, 2, 4, 4] ^= 1  # one bit apart
    ids = content_ids(images)
    assert ids[100] == ids[7]
    assert len(torch.unique(ids)) == 299
    assert torch.equal(ids, content_ids(images, batch_size=13))
    assert content_ids(images[:0]).shape == (0,)
    with pytest.raises(DataError, match="uint8"):
        content_ids(images.float())


def faces(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(
        0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return FaceSet(images, labels, tuple(str(i) for i in range(len(counts))))


def draw(victims, count, seed=0):
    return select_probes(victims, count, torch.Generator().manual_seed(seed))


def test_people_first():
    victims = faces([5, 4, 3, 2, 1])
    chosen = draw(victims, 4)
    assert sorted(victims.labels[chosen.attacked].tolist()) == [0, 1, 2, 3]
    chosen = draw(victims, 7)
    assert torch.bincount(victims.labels[chosen.attacked]).tolist() == [2, 2, 2, 1]


def test_probe_and_gallery_are_different_images_of_the_same_people():
    victims = faces([5, 4, 3, 2, 1])
    chosen = draw(victims, 100)
    assert len(chosen.attacked) == 4 + 3 + 2 + 1
    assert not set(chosen.attacked.tolist()) & set(chosen.gallery.tolist())
    assert sorted(victims.labels[chosen.gallery].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("people", "attacked"), [(1, 1), (2, 1), (4, 3), (15, 14), (16, 14), (80, 70)])
def test_some_people_are_never_attacked(people, attacked):
    """Somebody else must send requests that an attacker may intercept."""
    victims = faces([3] * people)
    chosen = draw(victims, 1000)
    assert len(torch.unique(victims.labels[chosen.attacked])) == attacked
    assert len(chosen.attacked) == 2 * attacked
    assert len(chosen.gallery) == people
    fewer = draw(victims, attacked)
    assert torch.equal(fewer.attacked, chosen.attacked[:attacked])


def test_people_with_one_image_are_left_out():
    victims = faces([1, 3, 1])
    chosen = draw(victims, 10)
    assert victims.labels[chosen.attacked].tolist() == [1, 1]
    assert victims.labels[chosen.gallery].tolist() == [1]


def test_a_copy_of_the_gallery_image_is_no_probe():
    victims = faces([2, 3])
    victims.images[1] = victims.images[0]
    victims.images[3] = victims.images[2]
    for seed in range(10):
        chosen = draw(victims, 10, seed)
        assert set(victims.labels[chosen.attacked].tolist()) == {1} == set(victims.labels[chosen.gallery].tolist())
        pictures = victims.images.flatten(1)
        assert not (pictures[chosen.attacked] == pictures[chosen.gallery]).all(1).any()


def test_the_gallery_image_is_a_uniform_draw():
    victims = faces([3])
    drawn = [int(draw(victims, 1, seed).gallery) for seed in range(300)]
    assert all(70 <= drawn.count(image) <= 130 for image in range(3))


def test_nobody_with_two_images():
    with pytest.raises(DataError, match="no victim has two different images"):
        draw(faces([1, 1, 1]), 3)


def test_the_seed_decides():
    victims = faces([4] * 6)
    assert torch.equal(draw(victims, 9).attacked, draw(victims, 9).attacked)
    assert not torch.equal(draw(victims, 9).attacked, draw(victims, 9, seed=1).attacked)
