"""Replayed training passes: what is captured when, that nothing is left behind, and that eager training is equalled."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from bench.recognition.graphs import MOST_SIZES, replayed

CPU = torch.device("cpu")
SIZES = [8, 7, 8, 7, 8, 7, 3, 8, 7, 3, 3, 3, 3, 8, 7]


def network(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return layers.to(device).train()


class Recorder:
    """Stands for a capture: what it makes computes the same, and counts."""

    def __init__(self):
        self.captured, self.replayed = [], []

    def __call__(self, network, batch):
        shape = tuple(batch.shape)
        self.captured.append(len(batch))

        def replay(batch):
            assert tuple(batch.shape) == shape
            self.replayed.append(len(batch))
            return type(network).forward(network, batch)

        return replay


def train(net, device="cpu", sizes=SIZES):
    """Losses of plain SGD over batches of these sizes."""
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for size in sizes:
        batch = torch.randn(size, 3, 8, 8, generator=generator).to(device)
        loss = net(batch).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_sizes_that_come_often_are_captured_and_training_is_the_same():
    eager, net, recorder = network(), network(), Recorder()
    expected = train(eager)
    with replayed(net, CPU, capture=recorder, before=2):
        found = train(net)
    assert recorder.captured == [8, 7]
    assert len(recorder.captured) == MOST_SIZES
    assert recorder.replayed == [8, 7, 8, 7, 8, 7]  # three of each after two eager ones; three faces stay eager
    assert torch.equal(found, expected)
    for name, value in eager.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_evaluation_and_passes_without_gradients_stay_eager():
    net, recorder = network(), Recorder()
    batch = torch.randn(4, 3, 8, 8)
    with replayed(net, CPU, capture=recorder, before=0):
        with torch.no_grad():
            net(batch)
        net.eval()
        net(batch)
        assert recorder.captured == []
        net.train()
        net(batch.requires_grad_())
        assert recorder.captured == []
        net(batch.detach())
        assert recorder.captured == [4]


def test_a_capture_that_fails_is_tried_once_and_said_in_one_debug_line(caplog):
    tried = []

    def capture(network, batch):
        tried.append(len(batch))
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, net = network(), network()
    with caplog.at_level(logging.DEBUG, "bench.recognition.graphs"), replayed(net, CPU, capture=capture, before=1):
        found = train(net)
    assert tried == [8]
    assert torch.equal(found, train(eager))
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


def test_nothing_stays_of_it_also_after_an_error():
    net, keys = network(), set(network().state_dict())

    def broken():
        with replayed(net, CPU, capture=Recorder()):
            assert "forward" in net.__dict__
            assert set(net.state_dict()) == keys
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert "forward" not in net.__dict__


@pytest.mark.parametrize(("device", "processes"), [("cpu", 1), ("cuda", 2)])
def test_a_cpu_and_several_processes_are_left_alone(device, processes):
    net = network()
    with replayed(net, torch.device(device), processes):
        assert "forward" not in net.__dict__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_trains_as_eager_does():
    eager, net = network("cuda"), network("cuda")
    expected = train(eager, "cuda")
    with replayed(net, torch.device("cuda"), before=2):
        found = train(net, "cuda")
        assert len(net.__dict__["forward"].captured) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-3, atol=1e-4)
