"""SlerpFace: the released code's arrays, what is dropped, what a template tells, and what its head learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from golden import golden
from pictures import generator, noise
from torch import nn
from torch.nn import functional

from bench.nets.recogniser import build_recogniser
from defenses.base import Defense
from defenses.slerpface import Head, SlerpFace, SlerpFaceOptions, relation_loss, slerp, unslerp

SIZE, GROUPS = 24, 49
#: The stored arrays are float64.
EXACT = 1e-6


def _build(size=SIZE, **options):
    return SlerpFace(SlerpFaceOptions(**options), image_size=size).eval()


def _embeddings(count, seed=0, spread=0.05, groups=GROUPS):
    """Isotropic groups, and attention that differs a little, as in the stored arrays: unit rows (count, groups 16)."""
    directions = functional.normalize(torch.randn(count, groups, 16, generator=generator(seed)), dim=2)
    attention = (spread * torch.randn(count, groups, 1, generator=generator(seed + 1))).softmax(dim=1)
    return functional.normalize((attention * directions).flatten(1), dim=1)


def _cosine(first, second):
    return float(functional.cosine_similarity(first, second).mean())


# -- the released code -------------------------------------------------------------------------------


@pytest.fixture
def released(monkeypatch):
    """The stored arrays, and a defence whose key ``i`` stands for the key and the zeros of the stored template i."""
    arrays, defense = golden("slerpface"), _build()
    assert (defense.options.alpha, defense.options.drop_rate) == (float(arrays["alpha"]), float(arrays["drop_rate"]))
    draws = torch.where(arrays["templates"] == 0, 0.0, math.inf).double()
    monkeypatch.setattr(defense, "expand", lambda key: torch.stack((arrays["keys"][key[0]], draws[key[0]])))
    return arrays, defense


def _joined(features, maps):
    """What the defence protects, of features (N, 7, 7, 16) and maps (N, 7, 7)."""
    return (maps[..., None] * functional.normalize(features, dim=-1)).flatten(1)


def test_the_arrays_of_the_released_code(released):
    arrays, defense = released
    units = functional.normalize(arrays["features"].flatten(1, 2), dim=2)
    turned = slerp(units, arrays["keys"], 0.9 - arrays["maps"].flatten(1)[..., None])
    assert float((turned - arrays["slerped"]).abs().max()) < EXACT
    keys = torch.arange(2)[:, None]
    templates = defense.enrol(_joined(arrays["features"], arrays["maps"]), keys, generator())
    assert float((templates - arrays["templates"].flatten(1)).abs().max()) < EXACT


def test_the_scores_of_the_released_code(released):
    """A row for each stored template, a column for each query."""
    arrays, defense = released
    templates, queries = arrays["templates"].flatten(1), _joined(arrays["query_features"], arrays["query_maps"])
    for row in range(2):
        keys = torch.full((2, 1), row)
        scores = defense.match(templates[[row, row]], queries, keys, generator())
        assert float((scores - arrays["scores"][row]).abs().max()) < EXACT


def test_the_stored_arrays_are_dropped_as_drawn(released):
    """12 draws below the median attention, 4 elsewhere, with replacement."""
    arrays, _ = released
    zeros, maps = (arrays["templates"] == 0).sum(dim=2).double(), arrays["maps"].flatten(1)
    below = maps < maps.median(dim=1, keepdim=True).values
    assert float(zeros[below].mean()) == pytest.approx(8.6, abs=0.5)
    assert float(zeros[~below].mean()) == pytest.approx(3.6, abs=0.5)
    assert (int(zeros[below].max()) <= 12, int(zeros[~below].max()) <= 4) == (True, True)


# -- turning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_a_share_of_the_arc(share):
    units, keys = functional.normalize(torch.randn(2, 50, 16, generator=generator(), dtype=torch.float64), dim=2)
    turned = slerp(units, keys, torch.full((50, 1), share, dtype=torch.float64))
    angle = (units * keys).sum(1).acos()
    torch.testing.assert_close(turned.norm(dim=1), torch.ones(50).double())
    # Near a right angle of 0 the arc cosine loses half of the digits.
    torch.testing.assert_close((units * turned).sum(1).clamp(-1, 1).acos(), share * angle, rtol=0, atol=1e-6)
    torch.testing.assert_close((keys * turned).sum(1).clamp(-1, 1).acos(), (1 - share) * angle, rtol=0, atol=1e-6)
    if share < 1:
        torch.testing.assert_close(unslerp(turned, keys, torch.full((50, 1), share, dtype=torch.float64)), units)


def test_directions_that_are_one_or_opposite_stay_finite():
    key = functional.normalize(torch.ones(1, 16), dim=1)
    for unit in (key, -key):
        unit = unit.clone().requires_grad_()
        turned = slerp(unit, key, torch.full((1, 1), 0.9))
        turned.sum().backward()
        assert torch.isfinite(turned).all()
        assert torch.isfinite(unit.grad).all()


# -- dropping ----------------------------------------------------------------------------------------


def _zeros(defense, embeddings):
    """How many values each group of templates lacks, (N, G), and whether its attention is below the median."""
    templates = defense.enrol(embeddings, defense.draw_keys(len(embeddings), generator(5)), generator())
    lengths = embeddings.unflatten(1, (-1, defense.options.group)).norm(dim=2)
    return (templates.unflatten(1, (-1, defense.options.group)) == 0).sum(dim=2), lengths < lengths.quantile(
        0.5, dim=1, keepdim=True
    )


def test_twelve_and_four_draws_with_replacement():
    defense = _build()
    zeros, below = _zeros(defense, _embeddings(200))
    assert int(below[0].sum()) == 24
    for part, draws, measured in ((zeros[below], 12, 8.5), (zeros[~below], 4, 3.5)):
        expected = 16 * (1 - (15 / 16) ** draws)
        assert float(part.double().mean()) == pytest.approx(expected, abs=0.06)
        assert expected == pytest.approx(measured, abs=0.15)
    kept = GROUPS * 16 - float(zeros.sum(dim=1).double().mean())
    assert defense.bytes_per_face() == pytest.approx(4 * kept + GROUPS * 16 / 8 + 8, abs=6)


@pytest.mark.parametrize(("rate", "counts"), [(0.5, (12, 4)), (0.25, (6, 2)), (0.6, (14, 5)), (0.0, (0, 0))])
def test_without_replacement_as_many_as_are_drawn(rate, counts):
    defense = _build(replacement=False, drop_rate=rate)
    zeros, below = _zeros(defense, _embeddings(5))
    assert (set(zeros[below].tolist()), set(zeros[~below].tolist())) == ({counts[0]}, {counts[1]})
    kept = GROUPS * 16 - int(zeros[0].sum())
    assert defense.bytes_per_face() == 4 * kept + GROUPS * 16 // 8 + 8


def test_no_group_is_dropped_altogether():
    defense = _build(group=2, drop_rate=0.6, replacement=False, head="none")
    assert defense.draws == (1, 1)


def test_places_are_dropped_uniformly():
    defense = _build()
    keys = defense.draw_keys(200, generator(2))
    hit = torch.stack([defense.expand(key)[1] < 4 for key in keys]).double().mean(dim=(0, 1))
    torch.testing.assert_close(hit, torch.full((16,), 1 - (15 / 16) ** 4).double(), rtol=0, atol=0.02)


# -- what is stored and compared ---------------------------------------------------------------------


def test_a_group_is_as_long_as_its_attention():
    embeddings, defense = _embeddings(3, spread=0.5), _build()
    templates = defense.enrol(embeddings, defense.draw_keys(3, generator()), generator())
    lengths, own = (rows.unflatten(1, (-1, 16)).norm(dim=2) for rows in (templates, embeddings))
    torch.testing.assert_close(lengths, own / own.sum(dim=1, keepdim=True))


def test_a_query_loses_what_the_template_lacks():
    defense, embeddings = _build(), _embeddings(400)
    keys = defense.draw_keys(400, generator(1))
    stored = defense.enrol(embeddings, keys, generator())
    torch.testing.assert_close(defense.match(stored, embeddings, keys, generator()), torch.ones(400))
    torch.testing.assert_close(defense.compare(stored, stored), torch.ones(400))
    near = functional.normalize(embeddings + 0.3 * _embeddings(400, seed=7), dim=1)
    far = embeddings.roll(1, 0)
    genuine, impostor = (defense.match(stored, side, keys, generator()) for side in (near, far))
    assert float(genuine.min()) > float(impostor.max())
    renewed = defense.draw_keys(400, generator(2))
    assert float(defense.match(stored, embeddings, renewed, generator()).abs().mean()) < 0.1
    # Two templates under one key, over the values that both have.
    genuine, impostor = (defense.compare(stored, defense.enrol(side, keys, generator())) for side in (near, far))
    assert float(genuine.mean() - impostor.mean()) > 3 * float(impostor.std())


def test_the_length_of_templates_does_not_count():
    defense, embeddings = _build(), _embeddings(4)
    keys = defense.draw_keys(4, generator(1))
    stored, near = defense.enrol(embeddings, keys, generator()), functional.normalize(embeddings + 0.02, dim=1)
    unit = functional.normalize(stored, dim=1)
    for told in (
        lambda rows: defense.match(rows, near, keys, generator()),
        lambda rows: functional.normalize(defense.estimate(rows, keys), dim=1),
        lambda rows: defense.misfit(rows, keys)(near[:, None]),
    ):
        torch.testing.assert_close(told(stored), told(unit))


def test_attention_beyond_alpha_leaves_a_group_as_it_is():
    defense, embeddings = _build(alpha=0.1, drop_rate=0.0), _embeddings(2, groups=GROUPS, spread=3.0)
    templates = defense.enrol(embeddings, defense.draw_keys(2, generator()), generator())
    stored, own = (rows.unflatten(1, (-1, 16)) for rows in (templates, embeddings))
    share = own.norm(dim=2) / own.norm(dim=2).sum(dim=1, keepdim=True)
    heavy = share > 0.1
    assert heavy.any()
    directions = (functional.normalize(rows[heavy], dim=1) for rows in (stored, own))
    torch.testing.assert_close(*directions, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, keys: (rows, None), r"needs keys int64 \(3, 1\)"),
        (lambda rows, keys: (rows, keys.float()), r"needs keys int64 \(3, 1\).*float32"),
        (lambda rows, keys: (rows, keys[:2]), r"needs keys int64 \(3, 1\).*\(2, 1\)"),
        (lambda rows, keys: (rows, keys.expand(-1, 2)), r"needs keys int64 \(3, 1\).*\(3, 2\)"),
        (lambda rows, keys: (rows[:, 1:], keys), r"protects 784 values, got \(3, 783\)"),
        (lambda rows, keys: (rows.index_fill(0, torch.tensor([1]), math.nan), keys), "1 of 3 embeddings are not"),
    ],
)
def test_what_cannot_be_stored_is_refused(change, message):
    defense, embeddings = _build(), _embeddings(3)
    keys = defense.draw_keys(3, generator(1))
    stored = defense.enrol(embeddings, keys, generator())
    rows, keys = change(embeddings, keys)
    with pytest.raises(ValueError, match=message):
        defense.enrol(rows, keys, generator())
    with pytest.raises(ValueError, match=message):
        defense.match(stored, rows, keys, generator())


def test_templates_of_another_system_are_refused():
    defense = _build()
    keys = defense.draw_keys(2, generator())
    for call in (defense.estimate, defense.misfit):
        with pytest.raises(ValueError, match="compares templates"):
            call(torch.ones(2, 16), keys)


# -- what a template tells ---------------------------------------------------------------------------


def test_a_stolen_template_gives_much_of_the_embedding_and_several_nearly_all():
    """On isotropic groups, each value averaged over the estimates that have it."""
    defense, embeddings = _build(), _embeddings(300)
    told, seen = torch.zeros_like(embeddings), torch.zeros_like(embeddings)
    cosines = {}
    for number in range(1, 11):
        keys = defense.draw_keys(300, generator(10 + number))
        estimate = defense.estimate(defense.enrol(embeddings, keys, generator()), keys)
        told, seen = told + estimate, seen + (estimate != 0)
        cosines[number] = _cosine(told / seen.clamp(min=1), embeddings)
    for number, cosine in {1: 0.736, 2: 0.864, 3: 0.916, 5: 0.959, 10: 0.984}.items():
        assert cosines[number] == pytest.approx(cosine, abs=0.01)


def test_another_key_tells_no_more_than_the_template_itself():
    """It was turned by 0.88 of a right angle: sin(0.12 pi / 2) of the embedding is left in it."""
    defense, embeddings = _build(), _embeddings(100)
    stolen = defense.enrol(embeddings, defense.draw_keys(100, generator(1)), generator())
    assert 0.05 < _cosine(stolen, embeddings) < math.sin(0.12 * math.pi / 2)
    estimate = defense.estimate(stolen, defense.draw_keys(100, generator(2)))
    assert _cosine(estimate, embeddings) < _cosine(stolen, embeddings) + 0.01


def test_without_a_drop_the_embedding_comes_back():
    defense, embeddings = _build(drop_rate=0.0), _embeddings(20, spread=0.5)
    keys = defense.draw_keys(20, generator(1))
    assert _cosine(defense.estimate(defense.enrol(embeddings, keys, generator()), keys), embeddings) > 0.999


def test_the_misfit_is_none_at_the_embedding_and_leads_there():
    defense, embeddings = _build(), _embeddings(20).double()
    keys = defense.draw_keys(20, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    misfit = defense.misfit(templates, keys)
    assert float(misfit(embeddings[:, None]).max()) < 1e-12
    torch.testing.assert_close(misfit((3 * embeddings)[:, None]), misfit(embeddings[:, None]))
    assert float(misfit(embeddings.roll(1, 0)[:, None]).min()) > 0.01
    start = defense.estimate(templates, keys)
    found = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([found], lr=3e-4)
    for _ in range(60):
        optimiser.zero_grad()
        misfit(found[:, None]).sum().backward()
        optimiser.step()
    assert torch.isfinite(found).all()
    assert float(misfit(found.detach()[:, None]).mean()) < 0.5 * float(misfit(start[:, None]).mean())


# -- the head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "groups"), [(24, 4), (8, 49)])  # of 8 pixels the last map has one place
def test_groups_are_the_places_of_the_last_map(size, groups):
    defense, recogniser = _build(size), build_recogniser("ir-tiny", (3, size, size), 32).eval()
    defense.attach(recogniser.requires_grad_(False), 32)
    assert (defense.groups, defense.template_size, defense.embedding_size) == (groups, 16 * groups, 16 * groups)
    faces = noise(2, size).float()
    embeddings = defense.embed(faces, generator())
    assert embeddings.shape == (2, 16 * groups)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert defense.protect(faces, generator()).representation.shape == (2, 16 * groups, 1, 1)


def test_a_group_has_the_direction_of_both_features_and_the_length_of_both_maps():
    head = Head(8, (3, 2), 16).eval()
    maps, mirrored = torch.randn(2, 4, 8, 3, 2, generator=generator())
    groups = head(maps, mirrored).unflatten(1, (6, 16))
    parts = (head.features, head.attention)
    features, logits = ([part(head.norm(side)).flatten(2) for side in (maps, mirrored)] for part in parts)
    directions = functional.normalize((features[0] + features[1]).mT, dim=2)
    torch.testing.assert_close(functional.normalize(groups, dim=2), directions)
    attention = ((logits[0] + logits[1]) / 2).flatten(1).softmax(dim=1)
    lengths = groups.norm(dim=2)
    torch.testing.assert_close(lengths / lengths.sum(dim=1, keepdim=True), attention)


def test_without_a_head_the_embedding_is_cut_into_groups(ready):
    defense = ready(_build(head="none"))
    assert (defense.trainable, defense.groups, defense.template_size) == (False, 2, 32)  # of 24 values
    assert list(defense.parameters()) == []
    faces = noise(3, SIZE).float()
    embeddings = defense.embed(faces, generator())
    assert embeddings.shape == (3, 24)
    keys = defense.draw_keys(3, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    assert templates.shape == (3, 32)
    torch.testing.assert_close(defense.match(templates, embeddings, keys, generator()), torch.ones(3))
    assert defense.estimate(templates, keys).shape == (3, 24)
    assert float(defense.misfit(templates, keys)(embeddings[:, None]).max()) < 1e-9


class Halved(Defense):
    """What stands before a template defence: every second pixel."""

    name = "halved"

    @property
    def representation_shape(self):
        return (3, self.image_size // 2, self.image_size // 2)

    def transform(self, faces, state, generator):
        return faces[..., ::2, ::2]


def test_the_head_stands_behind_a_defence_as_well():
    defense, recogniser = _build(48), build_recogniser("ir-tiny", (3, 24, 24), 32).eval()
    defense._behind = (Halved(image_size=48),)
    defense.attach(recogniser.requires_grad_(False), 32)
    assert defense.embed(noise(2, 48).float(), generator()).shape == (2, 64)


def _attached(**options):
    """A defence on a recogniser of one layer, which tells colours apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        centred = nn.BatchNorm1d(108, affine=False)
        centred.running_mean.fill_(0.5)
        network = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), centred, nn.Linear(108, 24, bias=False))
        network.requires_grad_(False).eval()
        defense = SlerpFace(SlerpFaceOptions(batch_size=16, **options), image_size=SIZE)
        defense.attach(network, 24)
    return defense


def _fit(defense, training):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense.fit(training)
    return defense.requires_grad_(False).eval()


def test_the_fit_brings_cosines_to_those_of_the_recogniser(make_training):
    training, losses = make_training(size=SIZE), {}
    faces, _ = next(training.batches(32, generator()))
    before = torch.random.get_rng_state()
    for epochs in (1, 20):
        defense = _fit(_attached(epochs=epochs), training)
        plain = functional.normalize(sum(defense.recogniser(side) for side in (faces, faces.flip(-1))), dim=1)
        losses[epochs] = float(relation_loss(defense.embed(faces, generator()), plain))
    assert losses[20] < 0.5 * losses[1]
    assert torch.equal(torch.random.get_rng_state(), before)  # attaching draws from a generator of its own


def test_the_relation_is_that_of_pairs():
    rows, targets = functional.normalize(torch.randn(2, 5, 8, generator=generator()), dim=2)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(float(rows[i] @ rows[j] - targets[i] @ targets[j]) ** 2 for i, j in pairs) / len(pairs)
    assert float(relation_loss(rows, targets)) == pytest.approx(expected, rel=1e-5)
    assert float(relation_loss(rows[:1], targets[:1])) == 0


def test_what_was_learnt_stays_when_a_recogniser_is_attached_again(make_training):
    defense = _fit(_attached(epochs=1), make_training(size=SIZE))
    faces = noise(2, SIZE).float()
    learnt = defense.embed(faces, generator())
    defense.attach(defense.recogniser, 24)
    assert torch.equal(defense.embed(faces, generator()), learnt)


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_where_it_was(make_training, tmp_path):
    whole = _fit(_attached(epochs=2), make_training(size=SIZE)).state_dict()

    def until(done, total, **fields):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        _fit(_attached(epochs=2), replace(make_training(size=SIZE, folder=tmp_path), report=until))
    resumed = _fit(_attached(epochs=2), make_training(size=SIZE, folder=tmp_path)).state_dict()
    assert whole
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
