import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from bench.muon import Muon, matrices, orthogonal

RATE = 0.05
SGD = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    wide = nn.Conv2d(6, 4, 3, bias=False)
    silent = nn.Conv2d(4, 4, 1)
    nn.init.zeros_(silent.weight)
    layers = (wide, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), silent, nn.Flatten(), nn.Linear(16, 40))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def by_svd(matrix: np.ndarray) -> np.ndarray:
    """The polynomial, three times, of the singular values of a matrix of norm one."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values /= np.linalg.norm(matrix)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 12)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_vectors_stay_and_singular_values_follow_the_polynomial(shape, scale):
    matrix = scale * np.random.default_rng(0).normal(size=shape)
    result = orthogonal(torch.from_numpy(matrix).float()).numpy()
    np.testing.assert_allclose(result, by_svd(matrix), atol=2e-5)


def test_what_is_large_comes_near_one_and_nothing_stays_nothing():
    values = torch.linspace(0.05, 0.5, 40)
    values = values[values.square().cumsum(0) < 1]
    rotated = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)))[0]
    filler = (1 - values.square().sum()).sqrt()
    matrix = torch.block_diag(rotated * values, filler[None, None])
    found = torch.linalg.svdvals(orthogonal(matrix))
    assert float(found.min()) > 0.6
    assert float(found.max()) < 1.25
    assert not orthogonal(torch.zeros(3, 5)).any()


def test_matrices_are_layers_that_mix_all_their_inputs():
    net = network()
    assert [tuple(weight.shape) for weight in matrices(net)] == [(4, 6, 3, 3), (40, 16)]
    net[0].weight.requires_grad_(False)
    assert [tuple(weight.shape) for weight in matrices(net)] == [(40, 16)]
    tied = nn.Linear(3, 3)
    assert len(matrices(nn.Sequential(tied, tied))) == 1


def test_a_matrix_turns_by_its_rate_along_nesterovs_momentum_made_orthogonal():
    net = network()
    optimiser = Muon(net, SGD, lr=RATE)
    chosen = (net[0].weight, net[5].weight)
    momenta = [np.zeros(weight.shape) for weight in chosen]
    for seed in range(3):
        gradients(net, seed)
        before = [weight.detach().numpy().copy() for weight in chosen]
        optimiser.step()
        for number, (weight, was) in enumerate(zip(chosen, before, strict=True)):
            gradient, size = weight.grad.numpy(), np.linalg.norm(was)
            momenta[number] = 0.6 * momenta[number] + gradient
            step = by_svd((gradient + 0.6 * momenta[number]).reshape(len(was), -1)).reshape(was.shape)
            now = was - RATE * size * step / np.linalg.norm(step)
            now *= size / np.linalg.norm(now)
            np.testing.assert_allclose(weight.detach().numpy(), now, rtol=1e-4, atol=1e-6)


def test_everything_else_is_trained_as_by_sgd():
    net = network()
    twin = copy.deepcopy(net)
    chosen = {id(weight) for weight in matrices(net)}
    rest = [name for name, parameter in net.named_parameters() if id(parameter) not in chosen]
    assert len(rest) == 7
    ours = Muon(net, SGD, lr=RATE)
    theirs = SGD([twin.get_parameter(name) for name in rest], lr=RATE)
    for seed in range(4):
        gradients(net, seed)
        gradients(twin, seed)
        for optimiser in (ours, theirs):
            for group in optimiser.param_groups:
                group["lr"] = RATE / (1 + seed)
            optimiser.step()
    for name in rest:
        torch.testing.assert_close(net.get_parameter(name), twin.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_each_parameter_is_moved_once_and_none_without_a_gradient():
    net = network()
    optimiser = Muon(net, SGD, lr=RATE)
    moved = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(map(id, moved)) == sorted(map(id, net.parameters()))
    before = copy.deepcopy(net.state_dict())
    optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    plain = nn.Linear(2, 2)
    nn.init.zeros_(plain.weight)
    *_, group = Muon(plain, SGD, lr=RATE).param_groups
    assert not group["params"]


@pytest.mark.parametrize("rest", [SGD, torch.optim.Adam])
def test_it_goes_on_from_its_state_as_if_nothing_had_happened(rest):
    whole = network()
    optimiser = Muon(whole, rest, lr=RATE, share=2.0)
    for seed in range(2):
        gradients(whole, seed)
        optimiser.step()
    resumed = network()
    other = Muon(resumed, rest, lr=RATE, share=2.0)
    resumed.load_state_dict(whole.state_dict())
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for seed in range(2, 4):
        for net, each in ((whole, optimiser), (resumed, other)):
            gradients(net, seed)
            for group in each.param_groups:
                group["lr"] = RATE / seed
            each.step()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
