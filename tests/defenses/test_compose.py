"""A chain does what its members do, one after the other, and is described, fitted, guessed and stored as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import torch
from pictures import generator, noise

from bench import plugins
from bench.errors import UsageError
from defenses.base import Defense, DefenseOptions
from defenses.compose import PostProcess, chain
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
        ("random-projection+quantise", {}, "template"),
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
