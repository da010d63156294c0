"""The provider's service: what queries return, and what they must not."""

import pytest
import torch
import torch.nn.functional as F

from bench import plugins
from bench.data.faces import FaceSet
from bench.errors import DataError
from bench.images import to_float
from bench.metrics.identity import content_ids
from bench.nets.recogniser import build_recogniser
from bench.randomness import Streams
from bench.run.service import Client, Service, class_centres, score_query, traffic_query

SIZE = 32


def draws(number):
    return torch.Generator().manual_seed(5 + number)


@pytest.fixture(scope="module")
def defense():
    return plugins.make_defense("partialface", {}, "quick", SIZE)


@pytest.fixture(scope="module")
def victims():
    pixels = torch.randint(0, 256, (9, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pixels[2] = pixels[0]  # person 0 shows one picture twice
    return FaceSet(pixels, torch.arange(9) // 3, ("a", "b", "c"))


@pytest.fixture
def service(defense):
    recogniser = build_recogniser("ir-tiny", defense.representation_shape, 16, seed=3)
    return Service(recogniser, defense, draws, batch_size=4)


def test_embedding_queries_are_counted_and_give_unit_rows(service, victims):
    embeddings = service.embed(to_float(victims.images))
    assert embeddings.shape == (9, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(9))
    assert service.queries == 9


def test_every_query_draws_states_of_its_own(service, victims):
    face = to_float(victims.images[:1])
    assert not torch.allclose(service.embed(face), service.embed(face))


def test_a_score_is_the_cosine_to_the_named_persons_template(service, victims, defense):
    templates = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    persons = torch.tensor([2, 0, 2, 1])
    faces = to_float(victims.images[:4])
    scores = score_query(service, templates, [draws(person) for person in range(3)])(faces, persons)
    streams = [draws(person) for person in range(3)]  # the second face of a person goes on in that person's stream
    sent = [defense.protect(face[None], streams[person]) for face, person in zip(faces, persons, strict=True)]
    embedded = service.embed_representations(torch.cat([protected.representation for protected in sent]))
    expected = (embedded * templates[persons]).sum(1)
    torch.testing.assert_close(scores, expected)
    assert service.queries == 4


@pytest.mark.parametrize("persons", [torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([0.0, 1.0])])
def test_a_score_query_names_an_enrolled_person_per_face(service, victims, persons):
    with pytest.raises(ValueError, match="person"):
        score_query(service, torch.ones(3, 16), [draws(0)] * 3)(to_float(victims.images[:2]), persons)


def test_a_class_centre_is_made_of_other_images_of_the_person(service, victims, defense):
    index = torch.tensor([0, 4])
    seen = []
    service.embed = lambda faces, generators, keys: (seen.append(faces), torch.eye(16)[: len(faces)])[1]
    centres = class_centres(service, victims, content_ids(victims.images), index, [draws(0), draws(1)])
    assert centres.shape == (2, 16)
    # Image 2 is a copy of image 0: only image 1 is another image of that person.
    torch.testing.assert_close(seen[0], to_float(victims.images[[1]]))
    assert len(seen[1]) == 2
    assert not (seen[1] == to_float(victims.images[4])).all(dim=(1, 2, 3)).any()


def traffic(victims, attacked):
    plain = plugins.make_defense("none", {}, "quick", SIZE)
    query = traffic_query(plain, victims, torch.tensor(attacked), draws, batch_size=4, device=torch.device("cpu"))
    return lambda count: torch.cat(list(query(count)))


def test_traffic_is_of_people_who_are_not_attacked_and_repeats(victims):
    intercept = traffic(victims, [0, 3])
    sent = intercept(14)
    assert len(sent) == 14
    torch.testing.assert_close(intercept(5), sent[:5])
    # Of a and b one image each is attacked: what is left are the three images of c.
    expected = {image.numpy().tobytes() for image in to_float(victims.images[6:])}
    assert {image.numpy().tobytes() for image in sent} == expected


def test_traffic_holds_no_copy_of_an_attacked_person_under_another_name(victims):
    copied = victims.images.clone()
    copied[7] = copied[4]  # person c shows a picture of b that is not itself attacked
    sent = traffic(FaceSet(copied, victims.labels, victims.names), [3])(20)
    assert not (sent == to_float(copied[4])).all(dim=3).all(dim=2).all(dim=1).any()
    # Of a two pictures, one of them twice, and of c two.
    assert len(torch.unique(sent.flatten(1), dim=0)) == 4


def test_traffic_needs_somebody_who_is_not_attacked(victims):
    with pytest.raises(DataError, match="every victim is attacked") as raised:
        traffic(victims, [0, 3, 8])(1)
    assert "\n" not in str(raised.value)


def client_of(defense):
    return Client(defense, Streams(3).generator, torch.device("cpu"))


def test_the_client_protects_with_the_true_secret_and_fresh_states_and_counts(victims):
    defense = plugins.make_defense("partialface", {"tables": "random", "table_seed": 6}, "quick", SIZE)
    client, face = client_of(defense), to_float(victims.images[:1]).requires_grad_()
    every = defense.protect(face.detach().repeat(len(defense.states()), 1, 1, 1), draws(0), state=defense.states())
    answers = torch.cat([client(face) for _ in range(8)])
    # Each answer is what one state of the secret table sends, and they are not all the same.
    nearest = (answers[:, None] - every.representation).abs().amax(dim=(2, 3, 4)).min(dim=1)
    assert nearest.values.max() < 1e-3
    assert len(nearest.indices.unique()) > 1
    assert client.queries == 8
    assert not answers.requires_grad
    assert client(face[:0]).shape == (0, *defense.representation_shape)


def test_what_the_client_draws_does_not_depend_on_what_else_was_sent(defense, victims):
    faces = to_float(victims.images)
    first, second = client_of(defense), client_of(defense)
    expected = first(faces[:4])
    second(faces[4:])
    torch.testing.assert_close(second(faces[:4]), expected, rtol=0, atol=0)
    assert not torch.allclose(second(faces[:4]), expected)


def test_the_attackers_client_has_one_key(victims):
    class Keyed(type(plugins.make_defense("none", {}, "quick", SIZE))):
        def draw_keys(self, count, generator):
            return torch.randint(1000, (count, 1), generator=generator)

        def keyed_transform(self, faces, state, keys, generator):
            return torch.zeros_like(faces) + keys[:, :, None, None]

    client = client_of(Keyed(image_size=SIZE))
    sent = torch.cat((client(to_float(victims.images[:3])), client(to_float(victims.images[5:]))))
    assert len(sent.unique()) == 1
