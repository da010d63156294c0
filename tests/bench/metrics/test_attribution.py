"""Attribution against functions whose weights are known: a linear map relies on each channel as its weights say."""

import math

import pytest
import torch

from bench.metrics.attribution import gradient_energy, members, occlusion

CHANNELS, SIDE, OUTPUTS = 5, 3, 7


@pytest.fixture(scope="module")
def weights():
    """Weights (outputs, C, h, w) of a linear map, in which channel 3 is not used."""
    drawn = torch.randn(OUTPUTS, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn[:, 3] = 0
    return drawn


def linear(weights):
    return lambda z: torch.einsum("nchw,ochw->no", z, weights.to(z))


def faces(count=6, seed=2):
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(function, inputs, groups, count, directions=OUTPUTS):
    generator = torch.Generator().manual_seed(3)
    halves = zip(inputs.split(len(inputs) // 2 or 1), groups.split(len(inputs) // 2 or 1), strict=True)
    batches = [(function, some, theirs) for some, theirs in halves]
    return gradient_energy(batches, count, directions=directions, generator=generator)


def test_a_linear_map_has_the_energy_of_its_weights(weights):
    groups = torch.arange(CHANNELS).expand(6, -1)
    found = energy(linear(weights), faces(), groups, CHANNELS)
    torch.testing.assert_close(found, weights.square().sum(dim=(0, 2, 3)).float())
    assert found[3] == 0


def test_channels_of_one_group_are_added_up_and_those_of_none_left_out(weights):
    groups = torch.tensor([0, 0, 1, -1, -1]).expand(6, -1)
    by_channel = weights.square().sum(dim=(0, 2, 3)).float()
    found = energy(linear(weights), faces(), groups, 3)
    torch.testing.assert_close(found[:2], torch.stack([by_channel[0] + by_channel[1], by_channel[2]]))
    assert math.isnan(found[2])


def test_each_face_may_have_channels_of_its_own(weights):
    """Of two layouts, a group's energy is the mean over the faces that have it."""
    groups = torch.tensor([[0, 1, 2, 3, 4], [4, 5, 2, 3, 0]])
    by_channel = weights.square().sum(dim=(0, 2, 3)).float()
    a, b, c, d, e = by_channel
    found = energy(linear(weights), faces(2), groups, 6)
    torch.testing.assert_close(found, torch.stack([(a + e) / 2, b, c, d, (e + a) / 2, b]))
    assert members(groups, 6).tolist() == [2, 1, 2, 2, 2, 1]


def test_few_directions_are_right_on_average(weights):
    groups = torch.arange(CHANNELS).expand(1, -1)
    true = weights.square().sum(dim=(0, 2, 3))
    generator = torch.Generator().manual_seed(4)
    tries = [
        gradient_energy([(linear(weights), faces(1), groups)], CHANNELS, directions=2, generator=generator)
        for _ in range(400)
    ]
    mean, error = torch.stack(tries).mean(dim=0), torch.stack(tries).std(dim=0) / math.sqrt(400)
    assert ((mean - true).abs() <= 4 * error).all()
    assert float(error[0]) > 0  # two of seven directions are no exact answer


def test_a_nonlinear_function_has_the_jacobian_of_autograd():
    def function(z):
        return torch.stack([z[:, 0].square().sum(dim=(1, 2)), (z[:, 1] * z[:, 2]).sum(dim=(1, 2)).sin()], dim=1)

    inputs = faces(4)
    jacobian = torch.autograd.functional.jacobian(function, inputs)  # (4, 2, 4, C, h, w)
    own = torch.stack([jacobian[n, :, n] for n in range(4)])
    expected = own.square().sum(dim=(1, 3, 4)).mean(dim=0)
    found = energy(function, inputs, torch.arange(CHANNELS).expand(4, -1), CHANNELS)
    torch.testing.assert_close(found, expected.float())


def test_interceptions_of_a_face_count_together(weights):
    """(N, k, C, h, w): what is occluded is so in every interception."""

    def function(z):
        return linear(weights)(z.mean(dim=1))

    inputs, groups = torch.stack([faces(), faces(seed=5)], dim=1), torch.arange(CHANNELS).expand(6, 2, -1)
    found = energy(function, inputs, groups, CHANNELS)
    torch.testing.assert_close(found, 2 * (weights / 2).square().sum(dim=(0, 2, 3)).float())


def test_occlusion_moves_a_linear_map_by_what_it_took_from_the_channel(weights):
    inputs, groups = faces(), torch.arange(CHANNELS).expand(6, -1)
    found = occlusion(linear(weights), inputs, groups, CHANNELS, distance=lambda a, b: (a - b).square().sum(dim=1))
    for channel in range(CHANNELS):
        lost = inputs[:, channel] - inputs[:, channel].mean()
        moved = torch.einsum("nhw,ohw->no", lost, weights[:, channel]).square().sum(dim=1).mean()
        torch.testing.assert_close(found[channel], moved.float())
    assert found[3] == 0


def test_occlusion_of_what_only_some_faces_have(weights):
    groups = torch.tensor([[0, 1, 2, -1, -1]] * 3 + [[0, -1, -1, -1, -1]] * 3)
    inputs = faces()
    found = occlusion(linear(weights), inputs, groups, 4, distance=lambda a, b: (a - b).abs().sum(dim=1))
    lost = inputs[:3, 1] - inputs[:3, 1].mean()
    expected = torch.einsum("nhw,ohw->no", lost, weights[:, 1]).abs().sum(dim=1).mean()
    torch.testing.assert_close(found[1], expected.float())
    assert math.isnan(found[3])


def test_occlusion_that_takes_too_long_is_given_up(weights):
    asked = iter([True, True, False])
    groups = torch.arange(CHANNELS).expand(6, -1)
    assert (
        occlusion(
            linear(weights),
            faces(),
            groups,
            CHANNELS,
            distance=lambda a, b: (a - b).norm(dim=1),
            within=lambda: next(asked),
        )
        is None
    )
