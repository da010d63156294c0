from __future__ import annotations

import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from attacks.state_inference import StateClassifier


def test_features_are_log_energies_per_channel():
    z = torch.stack((torch.full((4, 4), 3.0), torch.full((4, 4), -0.5)))[None]
    expected = torch.tensor([[9.0, 0.25]]).log()
    torch.testing.assert_close(StateClassifier.features(z), expected)


def test_decides_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(600) % 5
    mixing = torch.randn(4, 4, generator=generator)
    features = torch.randn(5, 4, generator=generator)[classes] + torch.randn(600, 4, generator=generator) @ mixing / 2
    classifier = StateClassifier(5, 4)
    classifier.fit(features, classes)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.2] * 5).fit(features.numpy(), classes.numpy())
    agree = torch.from_numpy(reference.predict(features.numpy())) == classifier.predict(features)
    assert agree.float().mean() > 0.99
    assert 0.3 < (classifier.predict(features) == classes).float().mean() < 0.999  # neither blind nor trivial


def test_a_state_without_examples_is_never_predicted():
    features = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    classifier = StateClassifier(3, 2)
    classifier.fit(features, torch.arange(40) % 2)
    assert not (classifier.predict(features * 10) == 2).any()


def test_channels_that_always_agree_do_not_break_it():
    one = torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(60) % 2
    features = (one + 20 * classes[:, None]).expand(-1, 3)
    classifier = StateClassifier(2, 3)
    classifier.fit(features, classes)
    assert torch.equal(classifier.predict(features), classes)
