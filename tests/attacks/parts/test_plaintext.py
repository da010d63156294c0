"""Secret maps, estimated from what their client sends, against the maps themselves."""

import pytest
import torch
from torch.nn import functional

from attacks.base import Knowledge, Observation
from attacks.linear import Linear, LinearOptions
from attacks.parts.plaintext import EstimatedMap, Imitation, estimate_map, helps
from defenses.base import Defense

SIZE = 16
PIXELS = 3 * SIZE**2
SHAPE = (3, SIZE, SIZE)
DRAWS = torch.Generator().manual_seed(4)
PLACES = torch.randperm(PIXELS, generator=DRAWS)
SIGNS = torch.randint(2, (PIXELS,), generator=DRAWS) * 2 - 1
COLOURS = torch.randn(3, 3, generator=DRAWS)
KERNELS = torch.randn(5, 3, 3, 3, generator=DRAWS)
PROJECTION = torch.randn(20, PIXELS, generator=DRAWS) / PIXELS**0.5
BLOCKS = torch.linalg.qr(torch.randn(4, 192, 192, generator=DRAWS))[0]
TILES = torch.tensor([2, 0, 3, 1])


def permutation(faces):
    return (faces.flatten(1)[:, PLACES] * SIGNS.to(faces)).view_as(faces)


def tiles(faces, change):
    return functional.fold(change(functional.unfold(faces, 8, stride=8)), SIZE, 8, stride=8)


def shuffle(faces):
    return tiles(faces, lambda columns: columns[:, :, TILES])


def blocks(faces):
    return tiles(faces, lambda columns: torch.einsum("lij,njl->nil", BLOCKS.to(faces), columns))


def colours(faces):
    return torch.einsum("ij,njhw->nihw", COLOURS.to(faces), faces) + 0.3


MAPS = {
    "permutation": (permutation, SHAPE, "one pixel each", 500),
    "shuffle": (shuffle, SHAPE, "one pixel each", 500),
    "colours": (colours, SHAPE, "mixtures of the colours of a pixel", 1000),
    "blocks": (blocks, SHAPE, "mixtures within tiles of 8 x 8", 1000),
    "moved blocks": (lambda x: permutation(blocks(x)), SHAPE, "mixtures within tiles of 8 x 8", 1000),
    "blocks of anything": (lambda x: blocks(permutation(x)), SHAPE, "mixtures of any pixels", 1600),
    "filters": (lambda x: functional.conv2d(x, KERNELS.to(x), padding=1), (5, SIZE, SIZE), "windows of 3 x 3", 1000),
    "projection": (
        lambda x: (x.flatten(1) @ PROJECTION.to(x).T)[..., None, None], (20, 1, 1), "mixtures of any pixels", 1600,
    ),
}  # fmt: skip


class Client:
    """Counts what it is sent, and takes pictures only."""

    def __init__(self, send):
        self._send, self.queries = send, 0

    def __call__(self, pictures):
        assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
        self.queries += len(pictures)
        return self._send(pictures)


def estimated(make_faces, send, shape=SHAPE, most=10_000):
    estimate, client = EstimatedMap(SIZE, shape), Client(send)
    return estimate, estimate_map(estimate, client, make_faces(150, SIZE), 0, most), client.queries


@pytest.mark.parametrize("name", MAPS)
def test_a_linear_map_is_found_whole(make_faces, name):
    send, shape, what, most = MAPS[name]
    estimate, details, queries = estimated(make_faces, send, shape)
    faces = torch.rand(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(estimate(faces) + estimate.offset, send(faces), rtol=0, atol=2e-6)
    sent = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((estimate(faces) * sent).sum(), (faces * estimate.adjoint(sent)).sum())
    assert estimate.found
    assert float(estimate.noise) < 1e-6
    assert what in details["protection_map"]
    assert f"from {queries} protection queries" in details["protection_map"]
    assert queries <= most
    assert details["protection_r2"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kind", ["permutations", "colours"])
def test_the_maps_of_a_few_states_are_found_each(make_faces, kind):
    draws = torch.Generator().manual_seed(5)
    maps = torch.zeros(4, PIXELS, PIXELS)
    for matrix in maps:
        if kind == "permutations":
            matrix[torch.arange(PIXELS), torch.randperm(PIXELS, generator=draws)] = 1
        else:
            matrix.copy_(torch.kron(torch.randn(3, 3, generator=draws), torch.eye(SIZE**2)))

    def send(faces):
        drawn = torch.randint(4, (len(faces),), generator=draws)
        return torch.stack([maps[k] @ face.flatten() + k for k, face in zip(drawn, faces, strict=True)]).view_as(faces)

    estimate, details, queries = estimated(make_faces, send)
    assert estimate.found
    assert details["protection_map"].startswith("one of 4 maps: ")
    assert f"from {queries} protection queries" in details["protection_map"]
    imitation, faces = Imitation(estimate, SHAPE), torch.rand(3, *SHAPE, generator=draws)
    expected = faces.flatten(1) @ maps.mT + torch.arange(4.0)[:, None, None]  # (4, 3, n)
    found = []
    for state in imitation.states():
        operator = imitation.linear_operator(state)
        sent = imitation.protect(faces, draws, state=state.expand(3, -1)).representation
        torch.testing.assert_close(operator(faces) + operator.offset.float(), sent, rtol=0, atol=1e-5)
        off = (sent.flatten(1) - expected).abs().amax(dim=(1, 2))
        assert off.min() < 1e-4
        found.append(int(off.argmin()))
    assert sorted(found) == [0, 1, 2, 3]


def test_places_are_found_under_noise_which_is_measured(make_faces):
    draws = torch.Generator().manual_seed(0)
    estimate, details, _ = estimated(
        make_faces, lambda faces: permutation(faces) + 0.3 * torch.randn(faces.shape, generator=draws)
    )
    place = torch.full((PIXELS,), -1)
    place[estimate.rows] = estimate.columns
    assert float((place == PLACES).float().mean()) >= 0.995
    assert float((estimate.values * SIGNS[estimate.rows] - 1).abs().mean()) < 0.1
    assert float(estimate.noise) == pytest.approx(0.3, rel=0.05)
    assert details["protection_noise"] == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("send", "said"),
    [
        (lambda faces: permutation(faces).abs() ** 2.2, "not linear"),
        (lambda faces: torch.sign(permutation(faces) - 0.5), "not linear"),
        (lambda faces: faces * torch.rand(len(faces), 1, 1, 1), "varies from query to query"),
        (lambda faces: torch.randn(faces.shape), "nothing but noise"),
    ],
)
def test_what_is_no_fixed_linear_map_is_said_and_not_used(make_faces, send, said):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimate, details, _ = estimated(make_faces, send)
    assert said in details["protection_map"]
    assert not estimate.found


def test_no_more_is_asked_than_allowed(make_faces):
    send = MAPS["blocks of anything"][0]
    for most in (500, 1000, 1200):
        estimate, details, queries = estimated(make_faces, send, most=most)
        assert queries <= most
        assert not estimate.found
        assert "not linear" in details["protection_map"]


def test_a_stored_map_is_loaded_with_as_many_entries_as_it_has(make_faces):
    estimate, _, _ = estimated(make_faces, colours)
    other = EstimatedMap(SIZE, SHAPE)
    other.load_state_dict(estimate.state_dict())
    faces = torch.rand(2, *SHAPE)
    torch.testing.assert_close(other(faces) + other.offset, colours(faces).double(), rtol=0, atol=1e-6)


def test_the_imitation_sends_what_the_client_sends(make_faces):
    draws = torch.Generator().manual_seed(0)
    estimate, _, _ = estimated(
        make_faces, lambda faces: colours(faces) + 0.01 * torch.randn(faces.shape, generator=draws)
    )
    imitation, faces = Imitation(estimate, SHAPE), make_faces(20, SIZE, 9).float() / 255
    sent = imitation.protect(faces, torch.Generator().manual_seed(1)).representation
    assert float((sent - colours(faces)).std()) == pytest.approx(0.01, rel=0.1)
    assert imitation.linear_operator(None) is estimate
    assert not list(imitation.state_dict())


def test_the_client_helps_where_a_secret_is_unknown_and_clients_have_no_keys(make_adversary, pick, plain):
    def keyed(count, generator):
        return torch.zeros(count, 1, dtype=torch.int64)

    for knowledge in Knowledge:
        adversary = make_adversary(pick(), knowledge, client=lambda faces: faces)
        assert helps(adversary, pick()) == (knowledge is Knowledge.BLACKBOX)
        assert not helps(make_adversary(pick(), knowledge), pick())
        assert not helps(make_adversary(plain(image_size=SIZE), knowledge, client=lambda faces: faces), plain())
    with_keys = pick()
    with_keys.draw_keys = keyed
    assert not helps(make_adversary(pick(), "blackbox", client=lambda faces: faces), with_keys)


class Secretive(Defense):
    """Sends a linear map of the face that is a secret: those of another number look just as likely."""

    name = "secretive"

    def __init__(self, number=0):
        super().__init__(image_size=SIZE)
        self.number = number
        draws = torch.Generator().manual_seed(number)
        places, signs = torch.randperm(PIXELS, generator=draws), torch.randint(2, (PIXELS,), generator=draws) * 2 - 1
        self.matrix = torch.zeros(PIXELS, PIXELS)
        self.matrix[torch.arange(PIXELS), places] = signs.float()

    @property
    def secret(self):
        return {"number": torch.tensor(self.number)}

    def guess(self, generator):
        return type(self)(int(torch.randint(1, 1000, (), generator=generator)))

    def transform(self, faces, state, generator):
        return (faces.flatten(1) @ self.matrix.to(faces).T).view_as(faces)

    def linear_operator(self, state):
        estimate = EstimatedMap(SIZE, SHAPE)
        rows, columns = self.matrix.nonzero(as_tuple=True)
        estimate.set_map(rows, columns, self.matrix[rows, columns].double(), estimate.offset)
        return estimate


class Mixing(Secretive):
    """Each tile of 8 x 8 by an orthogonal mixture of its own."""

    name = "mixing"

    def __init__(self, number=0):
        super().__init__(number)
        draws = torch.Generator().manual_seed(number)
        mixtures = torch.linalg.qr(torch.randn(4, 192, 192, generator=draws))[0]
        unit = torch.eye(PIXELS).view(PIXELS, *SHAPE)
        mixed = tiles(unit, lambda columns: torch.einsum("lij,njl->nil", mixtures, columns))
        self.matrix = mixed.flatten(1).T.contiguous()


class Curved(Secretive):
    """A permutation behind a curve."""

    name = "curved"

    def transform(self, faces, state, generator):
        return super().transform(faces**2.2, state, generator)


class Several(Secretive):
    """One of three orthogonal mixtures of the colours, drawn for each face from a secret table."""

    name = "several"

    def __init__(self, number=0):
        super().__init__(number)
        self.table = torch.linalg.qr(torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(number)))[0]

    def states(self):
        return torch.arange(3)[:, None]

    def draw(self, count, generator, labels=None):
        return torch.randint(3, (count, 1), generator=generator)

    def transform(self, faces, state, generator):
        return torch.einsum("nij,njhw->nihw", self.table[state[:, 0]].to(faces), faces)

    def linear_operator(self, state):
        return None


def attacked(make_adversary, make_faces, attack, defense, knowledge="blackbox"):
    """The fit's report, and root mean square errors: of what is recovered, and of the mean face."""
    victims, draws = make_faces(40, SIZE, 7).float() / 255, torch.Generator().manual_seed(3)
    adversary = make_adversary(
        defense,
        knowledge,
        faces=make_faces(150, SIZE, 1),
        traffic=lambda count: iter([defense.protect(victims, draws).representation]),
        client=lambda faces: defense.protect(faces, draws).representation,
    )
    report = attack.learn(adversary)
    recovered = attack.recover(Observation(defense.protect(victims, draws).representation[:, None]))
    mean = (adversary.faces.float() / 255).mean(dim=0)
    error, floor = (float((guess - victims).square().mean().sqrt()) for guess in (recovered, mean))
    return report, error, floor


@pytest.mark.parametrize(("defense", "share"), [(Secretive, 0.01), (Mixing, 0.01), (Several, 0.3)])
def test_linear_inverts_a_secret_map_that_it_could_not_guess(make_adversary, make_faces, defense, share):
    """One of several colour mixtures is read wrong now and then, as where the table is known."""
    options = {"rank": 12, "iterations": 100}
    report, error, floor = attacked(make_adversary, make_faces, Linear(LinearOptions(**options)), defense())
    assert error < share * floor
    assert "protection queries" in report.details["protection_map"]
    assert report.details["linearity"] == "estimated from protection queries"
    blind = Linear(LinearOptions(**options, client_queries=0))
    with pytest.raises(ValueError, match="layout"):
        attacked(make_adversary, make_faces, blind, defense())


def test_nobody_is_asked_what_is_known(make_adversary, make_faces):
    report, error, _ = attacked(make_adversary, make_faces, Linear(LinearOptions(rank=12)), Secretive(), "whitebox")
    assert error < 0.02
    assert "protection_map" not in report.details


def test_linear_refuses_what_is_not_linear_and_says_how_far_it_is(make_adversary, make_faces):
    with pytest.raises(ValueError, match=r"curved is neither .* \(not linear \(R\^2 [-.0-9]+ on faces\)") as raised:
        attacked(make_adversary, make_faces, Linear(LinearOptions(rank=12)), Curved())
    assert "\n" not in str(raised.value)


def test_a_fitted_attack_is_stored_with_the_map(make_adversary, make_faces):
    attack, defense = Linear(LinearOptions(rank=12)), Secretive()
    attacked(make_adversary, make_faces, attack, defense)
    other, victims = Linear(LinearOptions(rank=12)), make_faces(4, SIZE, 7).float() / 255
    other.prepare(make_adversary(defense, "blackbox", faces=make_faces(150, SIZE, 1), client=lambda faces: 1 / 0))
    other.load_state_dict(attack.state_dict())
    sent = Observation(defense.protect(victims, torch.Generator()).representation[:, None])
    torch.testing.assert_close(other.recover(sent), attack.recover(sent))
