"""Replayed training passes: what is captured when, and that eager training is equalled."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import nn

from bench.graphs import BEFORE_CAPTURE, MOST_CAPTURED, Replayed
from bench.nets.recogniser import InputNormalisation

CPU = torch.device("cpu")
SIZES = [8, 7, 8, 7, 8, 7, 3, 8, 7, 3, 3, 3, 3, 8, 7]


def network(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return layers.to(device).train()


class Recorder:
    """Stands for a capture: what it makes computes the same, counts, and takes no other shapes."""

    def __init__(self):
        self.captured, self.replayed = [], []

    def __call__(self, passes, inputs):
        shapes = [None if value is None else value.shape for value in inputs]
        self.captured.append(len(inputs[0]))

        def replay(*inputs):
            assert [None if value is None else value.shape for value in inputs] == shapes
            self.replayed.append(len(inputs[0]))
            return passes(*inputs)

        return replay


class Training:
    """Plain SGD, whose passes can be replayed."""

    def __init__(self, device="cpu", *, compiled=False, **more):
        self.net = network(device)
        self.optimiser = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        network_to_compile = self.net if compiled else None
        self.replayed = Replayed(
            self.passes, self.net.parameters(), torch.device(device), compiled=network_to_compile, **more
        )
        self.factor, self.eager = 1.0, 0

    def passes(self, batch, weights=None):
        self.eager += 1
        loss = self.factor * self.net(batch).square().mean()
        if weights is not None:
            loss = loss * weights.mean()
        self.optimiser.zero_grad()
        loss.backward()
        return (loss.detach(),)

    def losses(self, sizes=SIZES, factors=None):
        device = next(self.net.parameters()).device
        generator, found = torch.Generator().manual_seed(1), []
        for step, size in enumerate(sizes):
            self.factor = 1.0 if factors is None else factors[step]
            batch = torch.randn(size, 3, 8, 8, generator=generator).to(device)
            (loss,) = self.replayed(batch, constants=self.factor)
            self.optimiser.step()
            found.append(loss)
        return torch.stack(found).cpu()


def test_what_comes_often_is_captured_and_training_is_the_same():
    recorder = Recorder()
    eager, training = Training(), Training(capture=recorder, before=2)
    expected, found = eager.losses(), training.losses()
    assert recorder.captured == [8, 7]
    assert len(recorder.captured) == MOST_CAPTURED
    assert recorder.replayed == [8, 7, 8, 7, 8, 7]  # three of each after two eager ones; three faces stay eager
    assert torch.equal(found, expected)
    for name, value in eager.net.state_dict().items():
        assert torch.equal(training.net.state_dict()[name], value), name


def test_input_normalisation_has_come_to_rest_before_anything_is_captured():
    assert InputNormalisation.measured <= BEFORE_CAPTURE


def test_other_constants_are_other_passes():
    recorder = Recorder()
    factors = [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0.5, 1]
    eager, training = Training(), Training(capture=recorder, before=2)
    expected, found = (each.losses([8] * len(factors), factors) for each in (eager, training))
    assert recorder.captured == [8]
    assert len(recorder.replayed) == 4  # of seven with a factor of one the first two are not
    assert torch.equal(found, expected)


def test_inputs_that_a_graph_cannot_hold_are_never_captured():
    recorder = Recorder()
    replayed = Replayed(lambda *_: (), [], CPU, capture=recorder, before=0)
    batch = torch.zeros(4, 3)
    for inputs in ((batch.clone().requires_grad_(),), (batch, batch.to("meta")), (batch, 3), (batch, [batch])):
        replayed(*inputs)
    assert recorder.captured == []
    replayed(batch, None)
    replayed(batch, batch)
    assert recorder.captured == [4, 4]  # of two kinds


def test_what_is_cut_for_want_of_memory_is_not_captured():
    recorder, whole = Recorder(), False
    training = Training(capture=recorder, before=1, whole=lambda: whole)
    training.losses([8, 8, 8])
    assert recorder.captured == []
    whole = True
    training.losses([8])
    assert recorder.captured == [8]


def test_a_capture_that_fails_is_tried_once_and_said_in_one_debug_line(caplog):
    tried = []

    def capture(passes, inputs):
        tried.append(len(inputs[0]))
        raise RuntimeError("operation not permitted when stream is capturing")

    training = Training(capture=capture, before=1)
    with caplog.at_level(logging.DEBUG, "bench.graphs"):
        found = training.losses()
    assert tried == [8]
    assert torch.equal(found, Training().losses())
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


def test_a_cpu_is_left_alone():
    training = Training(before=0)
    training.losses()
    assert training.replayed.captured == {}
    assert training.eager == len(SIZES)


def test_a_compiled_network_trains_as_ever_and_is_itself_again_afterwards(monkeypatch):
    # Traced, but not made machine code of, which takes a minute and a compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    recorder, eager = Recorder(), Training()
    training = Training(capture=recorder, before=1, compiled=True)
    expected, found = eager.losses([8] * 5), training.losses([8] * 5)
    assert recorder.captured == [8]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert "forward" not in training.net.__dict__


def test_a_compiler_that_fails_is_told_of_and_training_goes_on(caplog, monkeypatch):
    def failing(*_, **__):
        def forward(*_):
            raise RuntimeError("no C compiler")

        return forward

    monkeypatch.setattr(torch, "compile", failing)
    recorder = Recorder()
    training = Training(capture=recorder, before=1, compiled=True)
    with caplog.at_level(logging.WARNING, "bench"):
        found = training.losses([8] * 5)
    assert torch.equal(found, Training().losses([8] * 5))
    assert recorder.captured == [8]
    assert [record.getMessage() for record in caplog.records] == [
        "bench: training goes on without torch.compile, which failed: no C compiler"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_trains_as_eager_does():
    eager, training = Training("cuda", before=10**9), Training("cuda", before=2)
    expected, found = eager.losses(), training.losses()
    assert len(training.replayed.captured) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for name, value in eager.net.state_dict().items():
        torch.testing.assert_close(training.net.state_dict()[name], value, rtol=1e-3, atol=1e-4)
