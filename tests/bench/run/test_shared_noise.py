"""Victims of a defence that draws its noise once for a batch are intercepted in such batches."""

import torch
from tiny_runs import pipeline, stages_of
from uneven import Shared, Windows

from bench.images import to_float
from bench.run.attacker import AttackStages


def noises(attacks, defense, count, **more):
    """Of the first twelve victims, what was added in each turn: (12, count, C, h, w)."""
    images = torch.arange(12)
    seen = list(attacks.interceptions(defense, images, count, **more))
    assert torch.equal(torch.cat([index for index, _, _ in seen]), images)
    faces = to_float(attacks.stages.splits.victims.images[images])
    exact = defense.linear_operator(None)(faces)[:, None] + 0.25
    return torch.cat([sent for _, sent, _ in seen]) - exact


def test_a_batch_shares_one_draw_and_another_batch_another(tmp_path):
    attacks = AttackStages(stages_of(pipeline(tmp_path, defense="none", attack="linear", batch_size=5)))
    shared = noises(attacks, Shared(image_size=32), 2)
    first, second, third = shared.split(5)
    for batch in (first, second, third):
        torch.testing.assert_close(batch, batch[:1].expand_as(batch), rtol=0, atol=1e-5)
    different = torch.stack([first[0, 0], first[0, 1], second[0, 0], third[0, 0], third[0, 1]]).flatten(1)
    assert float(torch.corrcoef(different).fill_diagonal_(0).abs().max()) < 0.1
    # Where memory takes fewer faces at once, they are sent all the same; and so is a single interception.
    torch.testing.assert_close(noises(attacks, Shared(image_size=32), 2, batch_size=2), shared, rtol=0, atol=1e-5)
    torch.testing.assert_close(noises(attacks, Shared(image_size=32), 1), shared[:, :1], rtol=0, atol=1e-5)


def test_noise_of_each_face_is_its_own(tmp_path):
    attacks = AttackStages(stages_of(pipeline(tmp_path, defense="none", attack="linear", batch_size=5)))
    own = noises(attacks, type("Own", (Windows,), {"kind": "equal"})(image_size=32), 1)[:, 0].flatten(1)
    assert float(torch.corrcoef(own).fill_diagonal_(0).abs().max()) < 0.1
