from __future__ import annotations

import torch

from attacks.seeds import base_seed, derived


def test_base_seed_depends_on_the_generator_and_leaves_it_alone():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert base_seed(generator) == base_seed(generator)
    assert torch.equal(generator.get_state(), before)
    assert base_seed(generator) != base_seed(torch.Generator().manual_seed(4))


def test_streams_are_reproducible_and_differ_by_seed_name_and_number():
    def draw(*name):
        return torch.rand(4, generator=derived(*name)).tolist()

    assert draw(0, "step", 1) == draw(0, "step", 1)
    different = [draw(0, "step", 1), draw(0, "step", 2), draw(0, "flip", 1), draw(1, "step", 1), draw(0, "step")]
    assert len({tuple(values) for values in different}) == len(different)
