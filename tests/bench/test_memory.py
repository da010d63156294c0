"""Batches that become smaller where memory is full, against the same without."""

import copy
import logging

import pytest
import torch
from torch import nn

from bench.memory import Parts, current, in_halves, remembering
from bench.nets.recogniser import build_recogniser


def full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def doubled(most, asked):
    def work(rows):
        asked.append(rows)
        if rows.stop - rows.start > most:
            full()
        return torch.arange(rows.start, rows.stop) * 2

    return work


@pytest.mark.parametrize(("count", "size", "most"), [(10, 8, 8), (10, 8, 3), (10, 4, 1), (1, 8, 1), (0, 8, 1)])
def test_what_does_not_fit_is_done_in_halves(count, size, most):
    parts = list(in_halves(doubled(most, []), count, size, "doubling"))
    assert [len(part) for part in parts if len(part) > most] == []
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), torch.arange(count) * 2)


def test_what_did_not_fit_is_not_tried_again_and_told_once(caplog):
    asked = []
    with caplog.at_level(logging.WARNING), remembering() as memory, current().collecting() as notes:
        for _ in range(2):
            list(in_halves(doubled(2, asked), 9, 8, "doubling"))
    assert [rows.stop - rows.start for rows in asked].count(8) == 1
    assert [record.message for record in caplog.records] == [f"bench: {memory.notes['doubling']}"]
    assert "2 instead of 8" in memory.notes["doubling"]
    assert notes == memory.notes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("out of memory")])
def test_one_row_that_does_not_fit_and_other_errors(error):
    def work(rows):
        raise error

    with pytest.raises(type(error)):
        list(in_halves(work, 3, 2, "nothing"))


def cramped(network, most, *, backward=False):
    """Memory is full where the last convolution is given more than ``most`` rows, or their gradients."""

    def look(module, inputs):
        if module.training and len(inputs[0]) > most:
            full()

    def look_back(module, inputs, gradients):
        if len(gradients[0]) > most:
            full()

    *_, last = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    last.register_full_backward_hook(look_back) if backward else last.register_forward_pre_hook(look)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    ).double()


def gradients(network, batch, parts=None):
    """Of a loss that is no mean over rows."""

    def passes():
        network.zero_grad()
        outputs = network(batch)
        loss = torch.logsumexp(outputs @ outputs.T, dim=(0, 1))
        loss.backward()
        return loss.detach()

    loss = passes() if parts is None else parts.step(passes)
    return [loss, *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_the_gradient_of_the_whole_batch_from_parts(most, backward):
    batch, network = torch.rand(7, 3, 8, 8, dtype=torch.float64), convolutions()
    expected = gradients(network, batch)
    cramped(network, most, backward=backward)
    with remembering() as memory, Parts([network], "training") as parts:
        found = gradients(network, batch, parts)
        again = gradients(network, batch, parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert all(map(torch.equal, found, again))
    assert "instead of 7" in memory.notes["training"]
    assert "forward" not in network.__dict__


def test_smallest_parts_that_do_not_fit():
    network = convolutions()
    cramped(network, 0)
    with Parts([network], "training") as parts, pytest.raises(torch.OutOfMemoryError):
        gradients(network, torch.rand(4, 3, 8, 8, dtype=torch.float64), parts)


def test_running_statistics_see_each_part_once_and_parts_of_one_row_are_none():
    """Against the parts one after the other, as a loop over micro-batches has them; dropout and all."""
    batch = torch.rand(5, 3, 16, 16)
    recogniser = build_recogniser("mobilefacenet", (3, 16, 16), 8, dropout=0.4).train()
    by_hand = copy.deepcopy(recogniser)
    parts_of = batch.tensor_split(2)  # 2 rows would fit, and one left over has no statistics
    torch.manual_seed(1)
    torch.cat([by_hand(part) for part in parts_of]).sum().backward()
    cramped(recogniser, 3)

    def passes():
        torch.manual_seed(1)
        recogniser.zero_grad()
        if parts._most is not None:  # what failed has been seen; start from nothing, to compare
            recogniser.load_state_dict(build_recogniser("mobilefacenet", (3, 16, 16), 8, dropout=0.4).state_dict())
        recogniser(batch).sum().backward()

    with Parts([recogniser], "training") as parts:
        parts.step(passes)
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, recogniser.state_dict()[name]), name
    for ours, theirs in zip(recogniser.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_what_gives_no_rows_stays_whole():
    class Loss(nn.Module):
        def forward(self, outputs):
            return outputs.square().mean(), [outputs > 0]

    network, loss, batch = convolutions(), Loss(), torch.rand(4, 3, 8, 8, dtype=torch.float64)

    def passes():
        network.zero_grad()
        value, (positive,) = loss(network(batch))
        value.backward()
        return value, positive, next(network.parameters()).grad.clone()

    expected = passes()
    cramped(network, 2)
    with Parts([network, loss], "training") as parts:
        torch.testing.assert_close(parts.step(passes), expected, rtol=1e-12, atol=1e-14)
