"""A chain does what its members do, one after the other, and is described, fitted, guessed and stored as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import torch
from pictures import generator, noise
from torch import nn
from torch.nn import functional

from bench import plugins
from bench.errors import UsageError
from defenses.base import Defense, DefenseOptions
from defenses.biohash import BioHash, BioHashOptions
from defenses.compose import PostProcess, chain
from defenses.fixed_subset import FixedSubset
from defenses.layout import probe
from defenses.noise import Noise
from defenses.partialface import PartialFace
from defenses.quantise import Quantise, QuantiseOptions

SIZE = 24
RANGE = MappingProxyType({"low": -8.0, "high": 8.0})


def make(name, **options):
    return plugins.make_defense(name, options, "cpu", SIZE)


def faces(count=5, dtype=torch.float32):
    return noise(count, SIZE, dtype=dtype)


class Keyed(Defense):
    """Shifts the face by its client's key."""

    name = "keyed"
    summary = "for tests"

    def draw_keys(self, count, generator):
        return torch.randint(1, SIZE, (count, 1), generator=generator)

    def keyed_transform(self, faces, state, keys, generator):
        return torch.stack([face.roll(int(key), 2) for face, key in zip(faces, keys, strict=True)])

    def transform(self, faces, state, generator):
        raise AssertionError("has keys")


class Numbered(PostProcess):
    """Adds its state, one of four, to the first value of each channel."""

    name = "numbered"
    summary = "for tests"

    def draw(self, count, generator, labels=None):
        return torch.randint(4, (count, 1), generator=generator)

    def states(self):
        return torch.arange(4)[:, None]

    def transform(self, faces, state, generator):
        changed = faces.clone()
        changed[:, :, 0, 0] += state
        return changed

    def canonical(self, representation, state):
        changed = representation.clone()
        changed[:, :, 0, 0] -= state
        return changed


def test_members_act_in_their_order():
    defense = make("partialface+quantise", **RANGE, bits=4)
    alone = PartialFace(image_size=SIZE)
    protected = defense.protect(faces(), generator(1))
    first = alone.protect(faces(), generator(1))
    assert torch.equal(protected.state, first.state)
    second = Quantise(QuantiseOptions(bits=4, **RANGE), image_size=SIZE, takes=alone.representation_shape)
    assert torch.equal(protected.representation, second.transform(first.representation, None, generator()))
    assert defense.representation_shape == (27, SIZE, SIZE)
    assert defense.parts == {"representation": (27, SIZE, SIZE)}
    assert (defense.views, defense.level, defense.name) == (3, "image", "partialface+quantise")
    assert defense.bytes_per_face() == 27 * SIZE**2 / 2
    assert not defense.trainable


def test_bytes_follow_every_member():
    defense = make("partialface+quantise+dropout", **RANGE, bits=2, number=9)
    assert defense.bytes_per_face() == 18 * SIZE**2 / 4 + 4
    assert make("pyramid+quantise", **RANGE, bits=8).bytes_per_face() == make("pyramid").bytes_per_face() / 4


def test_states_stand_side_by_side_and_are_undone_in_reverse():
    defense = chain([PartialFace, Numbered])(image_size=SIZE)
    drawn = defense.draw(200, generator())
    listed = defense.states()
    assert listed.shape == (18 * 4, 3)
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in listed.tolist()}
    assert defense.entropy_bits == pytest.approx(torch.tensor(72.0).log2())
    protected = defense.protect(faces(), generator(2))
    alone = PartialFace(image_size=SIZE)
    own = alone.protect(faces(), generator(), state=protected.state[:, :2])
    expected = alone.canonical(own.representation, own.state)
    torch.testing.assert_close(defense.canonical(protected.representation, protected.state), expected)


def test_keys_reach_the_member_that_has_them():
    defense = chain([Keyed, Noise])(image_size=SIZE)
    keys = torch.full((2, 1), 5)
    sent = defense.protect(faces(2), generator(), keys=keys)
    assert torch.equal(sent.keys, keys)
    assert float((sent.representation - faces(2).roll(5, 3)).std()) == pytest.approx(0.5, rel=0.05)
    assert defense.draw_keys(3, generator()).shape == (3, 1)


def test_linear_canonical_and_secret_are_those_of_the_first():
    defense, alone = make("partialface+quantise", **RANGE, bits=16), PartialFace(image_size=SIZE)
    state = torch.tensor([3, 1])
    operator = defense.linear_operator(state)
    sent = defense.protect(faces(2, torch.float64), generator(), state=state.expand(2, -1)).representation
    torch.testing.assert_close(
        (operator(faces(2, torch.float64)) + operator.offset).clamp(-8, 8), sent, rtol=0, atol=16 / 2**16
    )
    assert torch.equal(probe(defense, defense.states()).canonical, probe(alone, alone.states()).canonical)
    assert {name.partition(".")[2] for name in defense.secret} == set(alone.secret)


def test_channels_that_are_linear_are_those_of_the_first():
    part = type("Part", (PartialFace,), {"linear_channels": torch.arange(5)})
    assert make("partialface+quantise", **RANGE, bits=4).linear_channels is None
    defense = chain([part, Quantise])(image_size=SIZE)
    assert defense.linear_channels.tolist() == [0, 1, 2, 3, 4]


def test_a_guess_has_other_secrets_and_the_same_rounding():
    defense = make("partialface+quantise", **RANGE, bits=3)
    guess = defense.guess(generator(7))
    assert guess.representation_shape == defense.representation_shape
    assert not torch.equal(guess.secret["partialface.subsets"], defense.secret["partialface.subsets"])
    assert len(guess.protect(faces(), generator()).representation.unique()) <= 8
    assert guess.options.partialface.tables == "random"
    assert make("blur+quantise", **RANGE).guess(generator()).options.quantise.bits == 8
    layouts = probe(guess, guess.states()).canonical
    found = defense.with_layouts(layouts)
    assert torch.equal(probe(found, found.states()).canonical, layouts)


def test_it_is_fitted_in_order(make_training, tmp_path):
    defense = make("split+quantise+noise", **{"split.epochs": 1, "split.batch_size": 8, "bits": 4, "scale": 0.0})
    assert defense.trainable
    with pytest.raises(ValueError, match="not fitted"):
        defense.protect(faces(), generator())
    torch.manual_seed(0)
    defense.fit(make_training(size=SIZE, folder=tmp_path))
    shown = next(make_training(size=SIZE).batches(32, generator()))[0]
    assert len(defense.protect(shown, generator()).representation[:, 0].unique()) <= 16
    assert (tmp_path / "0-split" / "fit.ckpt").is_file()
    features = defense.chain[0].transform(shown, None, generator())
    low, high = defense.chain[1].low, defense.chain[1].low + 15 * defense.chain[1].step
    inside = (features >= low) & (features <= high)
    assert float(inside.double().mean()) > 0.9  # the ranges are those of features after their fit
    fresh = plugins.make_defense(defense.name, defense.describe()["options"], "cpu", SIZE)
    fresh.load_state_dict(defense.state_dict())
    assert torch.equal(*(side.protect(faces(), generator()).representation for side in (fresh, defense)))


def test_noise_on_a_part_is_sent_once():
    defense = make("pyramid+noise")
    sent = defense.protect(faces(), generator()).representation
    assert torch.equal(defense.pack(defense.unpack(sent)), sent)


def test_budgets_of_privacy_hold_behind_it():
    class Private(Defense):
        name = "private"
        summary = "for tests"
        epsilon: Mapping[str, float] = {"element": 0.5, "image": 100.0}  # type: ignore[assignment]

        def transform(self, faces, state, generator):
            return faces

    assert chain([Private, Quantise])(image_size=SIZE).epsilon == {"element": 0.5, "image": 100.0}


def test_what_is_described_rebuilds_it():
    defense = make("partialface+quantise+dropout", **RANGE, **{"partialface.views": "5", "number": "4"})
    described = json.loads(json.dumps(defense.describe()))
    assert described["options"]["partialface"]["views"] == 5
    assert (described["dropped"], described["subsets"], described["states"]) == (4, 6, 18)
    again = plugins.make_defense(described["name"], described["options"], "cpu", SIZE)
    assert again.describe() == defense.describe()
    assert again.views == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantise.bits": "4"}, 4),
        ({"bits": "4"}, 4),
        ({"quantise": {"bits": "4"}}, 4),
        ({"quantise": QuantiseOptions(bits=4)}, 4),
        ({}, 8),
    ],
)
def test_options_are_addressed(options, expected):
    assert plugins.make_defense("partialface+quantise", options, "cpu", SIZE).options.quantise.bits == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("partialface+quantize", {}, "did you mean 'quantise'"),
        ("partialface+", {}, "unknown defence ''"),
        ("quantise+partialface", {}, "partialface takes faces.*only come first"),
        ("biohash+quantise", {}, "template defence.*can only come last"),
        ("partialface+biohash+quantise", {}, "template defence.*can only come last"),
        ("biohash+iom", {}, "template defence.*can only come last"),
        ("partialface+pixelate+biohash", {}, "pixelate takes faces.*only come first"),
        ("fixed-subset+biohash", {"biohash.bits": 3}, "biohash.bits"),
        ("fixed-subset+biohash", {"bit": 3}, "unknown key 'bit'.*biohash.bits"),
        ("quantise+quantise", {}, "name each member once"),
        ("partialface+quantise", {"bit": 3}, "unknown key 'bit'.*quantise.bits"),
        ("partialface+quantise", {"bits": 0}, "quantise.bits"),
        ("partialface+quantise", {"quantise.bit": 3}, "unknown key 'quantise.bit'"),
        ("partialface+quantise", {"quantise": 3}, "set an option of it"),
        ("partialface+dropout", {"views": 3}, "option of partialface and dropout.*partialface.views="),
        ("partialface+dropout", {"number": 27}, "leaves none of 27"),
    ],
)
def test_what_makes_no_chain_is_one_line(name, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        plugins.make_defense(name, options, "cpu", SIZE)
    assert "\n" not in str(caught.value)


def test_presets_of_members_stand_below_what_is_asked_for():
    preset = plugins.make_defense("partialface+quantise", {}, "paper", SIZE)
    assert (preset.views, len(preset.states())) == (18, 36)
    asked = plugins.make_defense("partialface+quantise", {"partialface.views": 2, "bits": 3}, "paper", SIZE)
    assert (asked.views, len(asked.states()), asked.options.quantise.bits) == (2, 36, 3)


def test_chains_are_found_and_not_listed():
    registry = plugins.defenses()
    made = registry.get("partialface+quantise")
    assert registry.get("partialface+quantise") is made
    assert "partialface+quantise" in registry
    assert "partialface+no-such" not in registry
    assert not any("+" in name or name == "compose" for name in registry)
    assert issubclass(made.Options, DefenseOptions)


# -- templates behind a defence --------------------------------------------------------------------


def stored(name, **options):
    """A chain that ends in a template defence, behind which a recogniser of what the others send is attached."""
    defense = make(name, **options)
    channels = defense.behind.channels
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 20, bias=False))
    defense.attach(network.requires_grad_(False), 20)
    return defense.requires_grad_(False).eval()


def test_a_template_is_of_the_embedding_of_what_is_sent_before_it():
    defense, alone = stored("fixed-subset+biohash", **{"biohash.bits": "40"}), FixedSubset(image_size=SIZE)
    protected = defense.protect(faces(), generator(1))
    assert (defense.level, defense.template_size, defense.bytes_per_face()) == ("template", 40, 5)
    assert isinstance(defense.behind, FixedSubset)
    sent = [alone.protect(side.float(), generator()).representation for side in (faces(), faces().flip(-1))]
    embeddings = functional.normalize(sum(defense.recogniser(side) for side in sent), dim=1)
    plain = BioHash(BioHashOptions(bits=40), image_size=SIZE)
    plain.attach(defense.recogniser, 20)
    keys = plain.draw_keys(5, generator(1))
    assert torch.equal(protected.keys, keys)
    assert torch.equal(protected.representation[..., 0, 0], plain.enrol(embeddings, keys, generator()))
    templates = protected.representation[..., 0, 0]
    torch.testing.assert_close(defense.match(templates, embeddings, keys, generator()), torch.ones(5))
    assert float(defense.misfit(templates, keys)(embeddings[:, None]).max()) < 1e-3
    assert torch.equal(defense.estimate(templates, keys), plain.estimate(templates, keys))
    with pytest.raises(ValueError, match="another system"):
        defense.compare(templates, templates[:, 1:])


def test_a_face_and_its_mirror_image_are_sent_in_one_state():
    defense = stored("partialface+iom")
    face, mirrored = defense.seen(faces(), generator(3))
    alone = PartialFace(image_size=SIZE)
    sent = alone.protect(faces().float(), generator(3))
    torch.testing.assert_close(face, sent.representation)
    again = alone.protect(faces().float().flip(-1), generator(), state=sent.state)
    torch.testing.assert_close(mirrored, again.representation)
    assert defense.draw(5, generator()) is None  # states are of what travels, not of what is stored
    assert defense.views == 1


def test_several_may_stand_before_a_template():
    defense = stored("partialface+quantise+polyprotect", **RANGE, **{"quantise.bits": 4, "overlap": 4})
    assert defense.behind.name == "partialface+quantise"
    assert (defense.behind.options.quantise.bits, defense.options.polyprotect.overlap) == (4, 4)
    assert len(defense.seen(faces(2), generator())[0].unique()) <= 16
    assert defense.protect(faces(2), generator()).representation.shape == (2, 16, 1, 1)
    assert (defense.key_stored, defense.differentiable) == (True, True)
    described = json.loads(json.dumps(defense.describe()))
    assert described["travels"]["bytes_per_face"] == defense.behind.bytes_per_face()
    again = plugins.make_defense(described["name"], described["options"], "cpu", SIZE)
    assert again.describe()["options"] == described["options"]


def test_a_guess_has_another_secret_before_the_same_template():
    defense = stored("partialface+biohash")
    guess = defense.guess(generator(7))
    assert set(guess.secret) == {"partialface.subsets", "partialface.permutations"}
    assert not torch.equal(guess.secret["partialface.subsets"], defense.secret["partialface.subsets"])
    assert guess.behind is not defense.behind
    assert guess.template.behind is guess.behind
    assert guess.recogniser is defense.recogniser
    keys = defense.draw_keys(5, generator())
    assert not torch.equal(*(side.embed(faces(), generator(2)) for side in (defense, guess)))
    assert torch.equal(defense.template.expand(keys[0]), guess.template.expand(keys[0]))
    plain = stored("blur+biohash")
    assert plain.guess(generator()) is plain


def test_what_was_fitted_before_a_template_is_kept(make_training):
    defense = make("split+biohash", **{"split.epochs": 1, "split.batch_size": 8})
    assert defense.trainable
    torch.manual_seed(0)
    defense.behind.fit(make_training(size=SIZE))
    fitted = {name: value.clone() for name, value in defense.state_dict().items()}
    defense.fit(make_training(size=SIZE))
    assert all(torch.equal(value, fitted[name]) for name, value in defense.state_dict().items())
    fresh = stored("split+biohash", **{"split.epochs": 1, "split.batch_size": 8})
    fresh.load_state_dict(fitted)
    defense.eval().attach(fresh.recogniser, 20)
    assert torch.equal(*(side.protect(faces(), generator()).representation for side in (fresh, defense)))
