"""PartialFace: tables, ranks, selections, and the values it sends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pictures import generator, noise
from pydantic import ValidationError

from bench.run.textbook import textbook, textbook_spectrum
from defenses.frequency import zigzag
from defenses.partialface import PartialFace, PartialFaceOptions

SIZE = 16
RANDOM = PartialFaceOptions(tables="random", table_seed=5)


def _faces(count, size=SIZE):
    return noise(count, size, seed=1)


def _build(**options):
    return PartialFace(PartialFaceOptions(**options), image_size=SIZE)


# -- values --------------------------------------------------------------------------------------


def test_values_are_the_published_ones():
    """A rank written out by hand: S3 and P1 of the released tables, through the textbook pipeline."""
    pruned = {0, 1, 2, 3, 8, 9, 10, 16, 17, 24}
    kept = [channel for channel in range(64) if channel not in pruned]
    subset, permutation = [38, 8, 25, 13, 17, 30, 7, 33, 9], [7, 3, 0, 6, 5, 4, 1, 2, 8]
    channels = torch.tensor([[kept[subset[j]] for j in permutation]]).expand(2, -1)
    faces = _faces(2, 112)
    sent = PartialFace().protect(faces, generator(), state=torch.tensor([[3, 1], [3, 1]])).representation
    expected = textbook(faces, channels)
    assert sent.shape == (2, 27, 112, 112)
    assert float((sent - expected).abs().max() / expected.abs().max()) < 1e-10


@pytest.mark.parametrize("options", [PartialFaceOptions(), RANDOM])
def test_every_rank_in_one_batch_equals_the_textbook(options):
    defense = PartialFace(options, image_size=SIZE)
    state = defense.states()
    faces = _faces(len(state))
    channels = torch.stack(
        [defense.kept_channels[defense.subset_table[s]][defense.permutation_table[p]] for s, p in state.tolist()]
    )
    sent = defense.protect(faces, generator(), state=state).representation
    torch.testing.assert_close(sent, textbook(faces, channels), rtol=1e-9, atol=1e-9)


# -- the up-sampling factor ------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [4, 3, 2, 1])
def test_a_smaller_factor_sends_fewer_numbers_of_the_same_ranks(factor):
    defense = _build(upsampling=factor)
    side = math.ceil(factor * SIZE / 8)
    assert defense.representation_shape == (27, side, side)
    assert defense.bytes_per_face() == 4 * 27 * side**2
    state, faces = defense.states(), _faces(18)
    assert torch.equal(state, _build().states())
    channels = torch.stack(
        [defense.kept_channels[defense.subset_table[s]][defense.permutation_table[p]] for s, p in state.tolist()]
    )
    sent = defense.protect(faces, generator(), state=state).representation
    torch.testing.assert_close(sent, textbook(faces, channels, factor), rtol=1e-9, atol=1e-9)
    described = defense.describe()
    assert (described["options"]["upsampling"], described["bytes_per_face"]) == (factor, 4 * 27 * side**2)


@pytest.mark.parametrize("factor", [4, 3, 2, 1])
def test_what_an_attacker_is_told_has_the_factor(factor):
    """Operators, canonical maps and imitations are of the small maps; a guess guesses the tables alone."""
    defense = _build(upsampling=factor, tables="random")
    faces, state = _faces(3), torch.tensor([[2, 1]]).expand(3, -1)
    sent = defense.protect(faces, generator(), state=state).representation
    operator = defense.linear_operator(state[0])
    torch.testing.assert_close(operator(faces) + operator.offset, sent, rtol=0, atol=1e-9)
    side = sent.shape[-1]
    assert operator.row_factors.shape == operator.column_factors.shape == (9, side, SIZE)
    planes = torch.einsum("pc,nchw->nphw", operator.colour, faces)
    expected = torch.einsum("kih,nphw,kjw->npkij", operator.row_factors, planes, operator.column_factors)
    torch.testing.assert_close(operator(faces), expected.flatten(1, 2), rtol=0, atol=1e-9)
    z = torch.randn(sent.shape, generator=generator(), dtype=torch.float64)
    assert float((operator(faces) * z).sum()) == pytest.approx(float((faces * operator.adjoint(z)).sum()), rel=1e-9)
    canonical = defense.canonical(sent, state)
    assert canonical.shape == (3, 162, side, side)
    whole = textbook(faces, torch.tensor([defense.kept_channels.tolist()] * 3), factor)
    filled = canonical != 0
    torch.testing.assert_close(canonical[filled], whole[filled], rtol=0, atol=1e-9)
    assert int(filled.any(dim=(2, 3)).sum()) == 3 * 27
    guess = defense.guess(generator(5))
    assert (guess.options.upsampling, guess.representation_shape) == (factor, defense.representation_shape)
    layouts = torch.arange(27).view(1, 3, 9)[:, :1].add(54 * torch.arange(3)[:, None]).flatten(1)
    assert defense.with_layouts(layouts).representation_shape == defense.representation_shape


def test_the_factor_is_read_from_a_command_line_and_checked():
    assert PartialFaceOptions.model_validate({"upsampling": "4"}).upsampling == 4
    assert PartialFaceOptions().upsampling == 8
    for wrong in (5, 0, "nine", 16, 4.5):
        with pytest.raises(ValidationError, match="upsampling"):
            PartialFaceOptions.model_validate({"upsampling": wrong})


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PartialFaceOptions(), RANDOM, PartialFaceOptions(tables="random", table_seed=6)])
def test_subsets_partition_the_kept_channels_and_permutations_permute(options):
    defense = PartialFace(options, image_size=SIZE)
    assert tuple(defense.subset_table.shape) == (6, 9)
    assert sorted(defense.subset_table.flatten().tolist()) == list(range(54))
    assert defense.kept_channels.tolist() == sorted(set(range(64)) - set(zigzag(10)))
    for permutation in defense.permutation_table.tolist():
        assert sorted(permutation) == list(range(9))
    assert len({tuple(row) for row in defense.permutation_table.tolist()}) == len(defense.permutation_table)


def test_random_tables_follow_their_seed():
    same, other = PartialFace(RANDOM, image_size=SIZE), _build(tables="random", table_seed=6)
    assert torch.equal(same.subset_table, PartialFace(RANDOM, image_size=SIZE).subset_table)
    assert not torch.equal(same.subset_table, other.subset_table)
    assert not torch.equal(same.permutation_table, other.permutation_table)


def test_all_permutations_of_a_small_subset():
    table = _build(tables="random", subset_size=3, n_permutations=6).permutation_table
    assert sorted(tuple(row) for row in table.tolist()) == sorted(itertools.permutations(range(3)))


def test_remaining_channels_belong_to_no_subset():
    defense = _build(tables="random", subset_size=10)
    assert tuple(defense.subset_table.shape) == (5, 10)
    assert len(set(defense.subset_table.flatten().tolist())) == 50
    assert defense.representation_shape == (30, SIZE, SIZE)


def test_sigma_prunes_in_zigzag_order_and_pruned_overrides_it():
    assert _build(tables="random", sigma=3).kept_channels.tolist() == [c for c in range(64) if c not in {0, 1, 8}]
    assert len(_build(tables="random", sigma=0).kept_channels) == 64
    assert _build(tables="random", pruned=(5, 0)).kept_channels.tolist() == [c for c in range(64) if c not in {0, 5}]
    triangle = _build(pruned=(0, 1, 2, 3, 8, 9, 10, 16, 17, 24))
    assert torch.equal(triangle.kept_channels, _build().kept_channels)


def test_keeping_the_dc_carries_the_level_shift():
    defense = _build(tables="random", sigma=0, subset_size=64, n_permutations=2)
    faces = _faces(2)
    state = torch.tensor([[0, 0], [0, 1]])
    sent = defense.canonical(defense.protect(faces, generator(), state=state).representation, state)
    torch.testing.assert_close(sent, textbook_spectrum(faces).flatten(1, 2), rtol=0, atol=1e-9)


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 18),
        ({"tables": "random"}, 36),
        ({"n_permutations": 1}, 6),
        ({"subset": 2}, 3),
        ({"subset": 2, "permutation": 1}, 1),
        ({"tables": "random", "permutation": 5}, 6),
    ],
)
def test_state_count_and_entropy(options, count):
    defense = _build(**options)
    described = defense.describe()
    assert described["states"] == count == len(defense.states())
    assert described["entropy_bits"] == pytest.approx(math.log2(count))
    assert {tuple(row) for row in defense.draw(2000, generator()).tolist()} == {
        tuple(row) for row in defense.states().tolist()
    }


def test_paper_selection_is_uniform_and_ignores_labels():
    defense = _build()
    state = defense.draw(18_000, generator())
    counts = torch.bincount(state[:, 0] * 3 + state[:, 1], minlength=18)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-square, 17 degrees of freedom, p about 3e-4
    labels = torch.zeros(100, dtype=torch.int64)
    assert torch.equal(defense.draw(100, generator(), labels), defense.draw(100, generator()))


def test_official_selection_covers_exactly_the_triple_of_the_label():
    defense = _build(selection="official")
    triples = list(itertools.combinations(range(6), 3))
    for label in (0, 7, 19, 20, 47):
        labels = torch.full((600,), label)
        subset, permutation = defense.draw(600, generator(label), labels).unbind(1)
        assert tuple(sorted(set(subset.tolist()))) == triples[label % 20]
        assert torch.bincount(subset)[subset.unique()].min() > 150
        assert set(permutation.tolist()) == {0, 1, 2}
    labels = torch.arange(200)  # in one batch
    for label, subset in zip(labels.tolist(), defense.draw(200, generator(), labels)[:, 0].tolist(), strict=True):
        assert subset in triples[label % 20]


def test_official_selection_without_labels_draws_from_all():
    defense = _build(selection="official")
    assert set(defense.draw(500, generator())[:, 0].tolist()) == set(range(6))


def test_pins_hold_and_leave_the_other_draw_alone():
    free, pinned = _build().draw(50, generator()), _build(subset=4).draw(50, generator())
    assert set(pinned[:, 0].tolist()) == {4}
    assert torch.equal(pinned[:, 1], free[:, 1])
    official = _build(selection="official", subset=4, permutation=2)
    assert official.draw(5, generator(), torch.arange(5)).tolist() == [[4, 2]] * 5


# -- secret and guess ----------------------------------------------------------------------------


def test_guess_says_what_it_is_and_keeps_the_rest():
    defense = _build(selection="official", views=7)
    guess = defense.guess(generator())
    assert guess.options.tables == "random"
    assert (guess.options.selection, guess.views) == ("official", 7)
    assert len(guess.states()) == len(defense.states())
    assert sorted(guess.subset_table.flatten().tolist()) == list(range(54))
    rebuilt = PartialFace(PartialFaceOptions(**guess.options.model_dump(mode="json")), image_size=SIZE)
    assert torch.equal(rebuilt.subset_table, guess.subset_table)


def test_secret_is_the_tables():
    defense = _build()
    assert set(defense.secret) == {"subsets", "permutations"}
    assert defense.secret["subsets"].tolist()[5] == [36, 41, 46, 34, 15, 27, 18, 20, 3]
    assert defense.secret["permutations"].tolist()[2] == [4, 8, 6, 0, 2, 5, 3, 7, 1]


# -- canonical -----------------------------------------------------------------------------------


def test_canonical_puts_each_map_back_at_its_frequency():
    defense = _build()
    state = defense.states()
    faces = _faces(len(state))
    canonical = defense.canonical(defense.protect(faces, generator(), state=state).representation, state)
    assert canonical.shape == (18, 162, SIZE, SIZE)
    spectrum = textbook_spectrum(faces)[:, :, defense.kept_channels].flatten(1, 2)
    present = canonical.abs().amax((2, 3)) > 0
    assert present.sum(1).tolist() == [27] * 18
    torch.testing.assert_close(canonical, spectrum * present[:, :, None, None], rtol=1e-9, atol=1e-9)
    for row, (subset, _) in zip(present.view(18, 3, 54), state.tolist(), strict=True):
        for colour in row:
            assert set(colour.nonzero().flatten().tolist()) == set(defense.subset_table[subset].tolist())


def test_canonical_is_differentiable():
    representation = torch.rand(2, 27, 4, 4, requires_grad=True)
    defense = _build()
    (gradient,) = torch.autograd.grad(
        defense.canonical(representation, defense.draw(2, generator())).sum(), representation
    )
    assert torch.equal(gradient, torch.ones_like(representation))


# -- options -------------------------------------------------------------------------------------


def test_options_parse_from_command_line_strings():
    numbers = {"subset_size": 4, "n_permutations": 2, "views": 5, "table_seed": 11, "subset": 14, "permutation": 1}
    typed = {name: str(number) for name, number in numbers.items()}
    options = PartialFaceOptions(pruned="0, 1,2,8", tables="random", **typed)
    assert options.pruned == (0, 1, 2, 8)
    assert {name: getattr(options, name) for name in numbers} == numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 9}, "use tables=random"),
        ({"subset_size": 8}, "use tables=random"),
        ({"n_permutations": 4}, "use tables=random"),
        ({"tables": "random", "subset_size": 2}, "only 2 permutations"),
        ({"tables": "random", "sigma": 60}, "exceeds the 4 channels"),
        ({"tables": "random", "sigma": 3, "pruned": "0,1"}, "contradicts"),
        ({"tables": "random", "pruned": "1,1"}, "twice"),
        ({"pruned": "64"}, "less than 64"),
        ({"pruned": "a"}, "valid integer"),
        ({"tables": "random", "subset_size": 10, "selection": "official"}, "defined for 6 subsets"),
        ({"subset": 6}, r"0\.\.5"),
        ({"permutation": 3}, r"0\.\.2"),
        ({"subset": -1}, "greater than or equal to 0"),
        ({"tables": "other"}, "official"),
        ({"selection": "label"}, "paper"),
        ({"views": 0}, "greater than or equal to 1"),
        ({"table_seed": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        PartialFaceOptions(**options)
    assert all("\n" not in error["msg"] for error in caught.value.errors())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "needs the state"),
        (torch.zeros(2, 2, dtype=torch.int64), "expects a state"),
        (torch.zeros(3, 1, dtype=torch.int64), "expects a state"),
        (torch.zeros(3, 2), "expects a state"),
        (torch.tensor([[0, 0], [6, 0], [0, 0]]), "subsets 0..5"),
        (torch.tensor([[0, 0], [0, 0], [0, 3]]), "permutations 0..2"),
        (torch.tensor([[0, 0], [0, -1], [0, 0]]), "permutations 0..2"),
    ],
)
def test_bad_states_are_refused(state, message):
    defense = _build()
    with pytest.raises(ValueError, match=message):
        defense.transform(_faces(3), state, generator())
    with pytest.raises(ValueError, match=message):
        defense.canonical(torch.zeros(3, 27, 4, 4), state)


def test_bad_labels_and_representations_are_refused():
    defense = _build(selection="official")
    with pytest.raises(ValueError, match="labels"):
        defense.draw(3, generator(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="27"):
        defense.canonical(torch.zeros(1, 26, 4, 4), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs the state"):
        defense.linear_operator(None)


def test_the_paper_preset_is_the_published_configuration():
    options = PartialFace.Options.model_validate(PartialFace.presets["paper"])
    defense = PartialFace(options, image_size=32)
    assert (64 - len(options.kept_channels), options.subset_size, defense.views) == (10, 9, 18)
    assert len(defense.states()) == 36
