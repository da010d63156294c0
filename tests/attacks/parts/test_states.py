import pytest
import torch

from attacks.parts.exposure import Exposure
from attacks.parts.states import ChannelClassifier, assign, fit_channels, infer_table
from defenses.layout import probe


def likelihoods(table, members, *, confusion=0.0, channels=12, seed=0):
    """Log likelihoods of faces that show rows of ``table``, the true channel ahead but for some confusion."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(members), table.shape[1], channels, generator=generator)
    values.scatter_(2, table[members][:, :, None], 6.0)
    wrong = torch.rand(len(members), table.shape[1], generator=generator) < confusion
    other = torch.randint(channels, wrong.shape, generator=generator)
    spoilt = torch.full_like(values, -1.0).scatter_(2, other[:, :, None], 6.5)
    spoilt.scatter_(2, table[members][:, :, None], 5.0)
    return torch.where(wrong[:, :, None], spoilt, values)


TABLE = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:5] for i in range(6)])


def test_an_assignment_gives_no_channel_twice():
    # Both prefer channel 0; the second one would lose more by leaving it.
    likelihood = torch.tensor([[3.0, 2.5, 0.0], [3.0, -5.0, -5.0]])
    assert assign(likelihood).tolist() == [1, 0]


def test_an_assignment_avoids_channels_never_seen():
    likelihood = torch.tensor([[-torch.inf, 1.0], [-torch.inf, 2.0]])
    assert sorted(assign(likelihood).tolist()) == [0, 1]  # of two canonical channels one has to


@pytest.mark.parametrize("confusion", [0.0, 0.2])
def test_a_table_is_found_from_faces_that_are_misread_often(confusion):
    members = torch.arange(300) % 6
    table, counts = infer_table(likelihoods(TABLE, members, confusion=confusion), 6)
    assert {tuple(row) for row in table.tolist()} == {tuple(row) for row in TABLE.tolist()}
    assert counts.tolist() == [50] * 6


def test_fewer_states_than_allowed_are_not_invented():
    members = torch.arange(300) % 3
    table, counts = infer_table(likelihoods(TABLE, members, confusion=0.1), 6)
    assert {tuple(row) for row in table.tolist()} == {tuple(row) for row in TABLE[:3].tolist()}
    assert int(counts.sum()) == 300


def test_rare_states_are_kept():
    members = torch.cat((torch.zeros(250, dtype=torch.int64), torch.arange(50) % 6))
    table, counts = infer_table(likelihoods(TABLE, members), 6)
    assert {tuple(row) for row in table.tolist()} == {tuple(row) for row in TABLE.tolist()}
    assert int(counts[0]) == 259
    assert table[0].tolist() == TABLE[0].tolist()


def test_the_row_of_a_known_table_is_the_likeliest():
    members = torch.tensor([4, 0, 5, 5])
    classifier = ChannelClassifier(4, 4, 12)
    assert classifier.rows(likelihoods(TABLE, members, confusion=0.2), TABLE).tolist() == members.tolist()


def test_features_do_not_depend_on_the_sign_and_tell_rows_from_columns():
    ramp = torch.linspace(0.1, 1, 6)[:, None].expand(6, 6)
    features = ChannelClassifier.features(torch.stack((ramp, -ramp, ramp.T))[None])[0]
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[0], features[2], atol=0.1)
    torch.testing.assert_close(features[0, :6], features[2, 6:12])


def test_maps_are_told_apart_under_a_guessed_secret(pick, make_adversary, make_faces):
    """A black box learns what each of the six channels looks like from guesses, none of which is the true table."""
    defense = pick()
    adversary = make_adversary(defense, "blackbox", faces=make_faces(90))
    classifier = ChannelClassifier(16, 16, 6)
    exposure = Exposure(adversary, 1)
    fit_channels(classifier, adversary.faces, exposure, None, 1, 200)
    layout = probe(defense, defense.states())
    faces = make_faces(60, seed=5).float() / 255
    sent = defense.protect(faces, torch.Generator().manual_seed(2))
    read = classifier(sent.representation).argmax(2)
    truth = layout.canonical[layout.row_of(sent.state)]
    # The three colours of a scale look alike in these pictures; their six scales do not.
    assert float(((read % 6) == truth).float().mean()) > 0.9


def test_a_channel_never_shown_is_never_answered():
    classifier = ChannelClassifier(4, 4, 3)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 9, generator=generator)
    classifier.fit(features, torch.tensor([0, 2]).repeat(20))
    assert not (classifier(torch.randn(5, 2, 4, 4, generator=generator)).argmax(2) == 1).any()
