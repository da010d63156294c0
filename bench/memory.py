"""Batches that become smaller where an accelerator's memory is full.

Inference goes on with half of the rows at once (:func:`in_halves`). A training step is made again with its network's
pass cut into parts (:class:`Parts`), of which one at a time is in memory, for the gradient of the whole batch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.errors import memory_is_full

T = TypeVar("T")


class Memory:
    """What fitted so far.

    Attributes:
        rows: what was done -> rows that fit at once.
        notes: what was done -> what to tell of it, for a result.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.notes: dict[str, str] = {}
        self._told: dict[str, int] = {}
        self._collecting: list[dict[str, str]] = []

    def note(self, what: str, asked: int, fits: int) -> None:
        """Tell, once for each number that ``fits``, that ``what`` goes on with fewer rows at once."""
        told = f"the accelerator's memory was full: {what} went on with {fits} instead of {asked} faces at once"
        if self._told.get(what) == fits:
            told = self.notes[what]
        else:
            logging.getLogger("bench").warning("bench: %s", told)
        self._told[what] = fits
        for notes in (self.notes, *self._collecting):
            notes[what] = told

    @contextmanager
    def collecting(self) -> Iterator[dict[str, str]]:
        """The notes of what is done within."""
        notes: dict[str, str] = {}
        self._collecting.append(notes)
        try:
            yield notes
        finally:
            self._collecting.pop()


_MEMORY: ContextVar[Memory | None] = ContextVar("memory", default=None)


def current() -> Memory:
    """The innermost one, or one that is forgotten again."""
    return _MEMORY.get() or Memory()


@contextmanager
def remembering() -> Iterator[Memory]:
    """Within, what did not fit once is not tried again, and everything that became smaller is noted."""
    memory = Memory()
    token = _MEMORY.set(memory)
    try:
        yield memory
    finally:
        _MEMORY.reset(token)


def _tried(work: Callable[[], T]) -> tuple[T] | RuntimeError:
    """The result, or the error that says that memory is full: without its frames, which hold what is in the way."""
    try:
        return (work(),)
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        full = error.with_traceback(None)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return full


def in_halves(work: Callable[[slice], T], count: int, size: int, what: str) -> Iterator[T]:
    """``work(rows)`` for successive slices of ``count`` rows, ``size`` at once, fewer where memory is full.

    Of no rows it is asked once, as ``torch.split`` gives one empty part: what it makes has a shape.

    What did not fit is done again with half of the rows, so ``work`` must give the same for the same rows however often
    it is asked, and for a row whatever stands beside it.

    Args:
        work: of at most ``size`` rows.
        count: rows in all.
        size: rows at once, if they fit.
        what: is done, in words, for the note.

    Raises:
        RuntimeError: torch's own, where not even one row fits.
    """
    memory = current()
    start = 0
    while True:
        fits = min(size, memory.rows.get(what, size))
        rows = slice(start, min(start + fits, count))
        done = _tried(lambda rows=rows: work(rows))  # type: ignore[misc]
        if isinstance(done, tuple):
            if fits < size:
                memory.note(what, size, fits)
            yield done[0]
            start = rows.stop
            if start >= count:
                return
        elif rows.stop - rows.start <= 1:
            raise done
        else:
            memory.rows[what] = (rows.stop - rows.start) // 2


class Parts:
    """Cuts the passes of networks into parts where memory is full; used as a context manager.

    Without gradients a pass goes on in halves (:func:`in_halves`). In training each part is run again when its gradient
    is due (Chen et al., arXiv 1604.06174), so that the activations of one are in memory at a time, while whoever calls
    the network sees the outputs of the whole batch: losses, and gradients up to rounding, are those of the whole batch,
    also where the loss is no mean over rows. Exceptions are what the network itself computes over rows: batch norm
    takes the statistics of a part, and dropout draws part by part.

    Args:
        networks: each maps tensors of N rows to one of N rows, or several; one that does not stays whole.
        what: is trained, for the note.
        method: of the networks, that is cut.
    """

    def __init__(self, networks: Iterable[nn.Module], what: str, method: str = "forward") -> None:
        self._networks, self._what, self._method = list(networks), what, method
        self._memory = current()
        self._rows = 0
        self._most: int | None = None
        self._count: int | None = None
        # Batch norm has no statistics of one row.
        modules = (module for network in self._networks for module in network.modules())
        self._least = 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules) else 1

    @property
    def cuts(self) -> bool:
        """Whether training passes are cut now."""
        return self._most is not None or self._count is not None

    def __enter__(self) -> Parts:
        for network in self._networks:
            network.__dict__[self._method] = self._cutting(network)
        return self

    def __exit__(self, *_: object) -> None:
        for network in self._networks:
            del network.__dict__[self._method]

    def step(self, attempt: Callable[[], T]) -> T:
        """The result of a forward and backward pass, which is attempted with ever smaller parts until it fits.

        ``attempt`` clears the gradients first, and draws the same every time.

        Raises:
            RuntimeError: torch's own, where the smallest parts do not fit either.
        """
        self._rows = 0
        while isinstance(done := _tried(attempt), RuntimeError):
            rows = self._rows if self._most is None else min(self._most, self._rows)
            if rows // 2 < self._least:
                raise done
            self._most = rows // 2
        if self._most is not None and self._rows > self._most:
            self._memory.note(self._what, self._rows, self._most)
        return done[0]

    def settle(self, attempt: Callable[[], object], rows: int, largest: Callable[[int], int]) -> None:
        """Cut every training pass from here on into one number of parts: of several processes, what the neediest takes.

        What they exchange within a pass they exchange part by part, so none may have more parts than another, and none
        can find out by itself amid the exchange. Buffers are afterwards as they were.

        Args:
            attempt: makes a pass of as many rows as one can have, and its gradients, and exchanges nothing.
            rows: the fewest that a pass has, in any process.
            largest: of a number of each process the largest one, told to all.

        Raises:
            RuntimeError: torch's own, in every process, where in one of them the smallest parts do not fit.
        """
        full: RuntimeError | None = None
        with ExitStack() as kept:
            for network in self._networks:
                kept.enter_context(_at(network, _buffers(network)))
            try:
                self.step(attempt)
            except RuntimeError as error:
                if not memory_is_full(error):
                    raise
                full = error
        # One part more than there can be says that memory is full of however few.
        most = rows // self._least
        needed = 1 if self._most is None else min(most, -(-self._rows // self._most))
        self._count = largest(needed if full is None else most + 1)
        if self._count > most:
            raise full or torch.OutOfMemoryError("out of memory in another process of this training")
        if self._count > 1:
            self._memory.note(self._what, self._rows, -(-self._rows // self._count))

    def _cutting(self, network: nn.Module) -> Callable[..., Any]:
        """What stands in front of a network's method."""
        whole: Callable[..., Any] = getattr(network, self._method)
        cut = True

        def call(*inputs: Any, **named: Any) -> Any:
            nonlocal cut
            if not cut or not inputs or not isinstance(inputs[0], Tensor):
                return whole(*inputs, **named)
            rows = len(inputs[0])
            if not torch.is_grad_enabled():
                what = f"{self._what}, where it only looks,"
                made = list(in_halves(lambda part: _call(whole, rows, part, inputs, named), rows, rows, what))
            elif network.training and (count := self._parts_of(rows)) > 1:
                made = list(_in_parts(network, whole, count, inputs, named))
            else:
                made = []
            self._rows = max(self._rows, rows if torch.is_grad_enabled() else 0)
            if len(made) == 1:
                return made[0]
            joined = _joined(made, rows) if made else None
            cut = not made or joined is not None
            return whole(*inputs, **named) if joined is None else joined

        return call

    def _parts_of(self, rows: int) -> int:
        """Into how many parts a training pass of so many rows is cut."""
        if self._count is not None:
            return self._count
        return 1 if self._most is None or rows <= self._most else min(-(-rows // self._most), rows // self._least)


def _call(call: Callable[..., Any], count: int, rows: slice, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """``call`` with those of ``count`` rows; what has other rows is given as it is."""

    def some(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim and len(value) == count else value
        return [some(each) for each in value] if isinstance(value, list | tuple) else value

    return call(*(some(value) for value in inputs), **{name: some(value) for name, value in named.items()})


def _in_parts(
    network: nn.Module, call: Callable[..., Any], parts: int, inputs: Sequence[Any], named: Mapping[str, Any]
) -> Iterator[Any]:
    """What ``call`` gives for so many parts of the rows, of even size, each to be run again for its gradient."""
    count = len(inputs[0])
    for rows in torch.arange(count).tensor_split(parts):
        part = slice(int(rows[0]), int(rows[-1]) + 1)

        def again(before: Mapping[str, Any] = _buffers(network)) -> tuple[Any, Any]:
            return nullcontext(), _at(network, before)

        yield checkpoint(_call, call, count, part, inputs, named, use_reentrant=False, context_fn=again)


def _joined(parts: list[Any], rows: int) -> Any:
    """The outputs of parts as one of so many rows; None where they are none."""
    if isinstance(parts[0], list | tuple):
        joined = [_joined(list(each), rows) for each in zip(*parts, strict=True)]
        return None if any(each is None for each in joined) else type(parts[0])(joined)
    if not all(isinstance(part, Tensor) and part.ndim for part in parts) or sum(map(len, parts)) != rows:
        return None
    return torch.cat(parts)


def _buffers(network: nn.Module) -> dict[str, Any]:
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {name: copy.deepcopy(value) for name, value in network.state_dict().items() if name not in parameters}


@contextmanager
def _at(network: nn.Module, buffers: Mapping[str, Any]) -> Iterator[None]:
    """Within, the network's buffers are as they were: what is run again is no second batch for running statistics."""
    now = _buffers(network)
    network.load_state_dict(buffers, strict=False)
    try:
        yield
    finally:
        network.load_state_dict(now, strict=False)
