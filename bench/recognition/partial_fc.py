"""Partial FC (An et al., CVPR 2022): a margin softmax over millions of identities that samples its negatives.

K processes own C / K class centres each. In a step, all embeddings and labels go to every process; each keeps the
centres of the labels that it owns and fills up to r C / K with others drawn at random; only those are multiplied,
share the softmax and are updated. With r = 1 it is the full softmax, spread over the processes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bench.errors import BenchError, DataError, UsageError
from bench.files import replacing
from bench.nets.heads import margin_target
from bench.randomness import Streams
from bench.recognition.processes import Processes

#: Bytes of momentum brought together at once: small enough to stay in a processor's cache.
BLOCK_BYTES = 4 * 2**20


#: As in torch.nn.functional.normalize: shorter centres count as this long.
SHORTEST = 1e-12


class Cosines(torch.autograd.Function):
    """cos t of unit embeddings (N, D) to the n active centres, and once more for each embedding's own one.

    ``apply(unit, centres, rows, columns, dtype)``: int64 ``rows`` and ``columns`` (P,) say which embeddings have their
    centre here, and which it is. Gives float32 (N, n) and (P,).

    The centres are not normalised one by one: with w_j = |w_j| u_j, the products <x, w_j> are divided by |w_j|, and

        dL/dw_j = (sum_i g_ij x_i - (sum_i g_ij cos_ij) u_j) / |w_j|,   g_ij = dL/dcos_ij,

    which saves three passes over n x D values. It goes to ``centres.gradient_buffer()``, not to autograd: the rows are
    a step's loan, not a parameter. ``dtype`` is that of the large products; own cosines are always float32, because the
    margin works on them and half precision rounds a cosine by up to 0.002 (bfloat16), 0.1 of a logit.
    """

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, centres: PartialFC, rows: Tensor, columns: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(unit.device.type, enabled=False):
            active = centres.active
            inverse = torch.linalg.vector_norm(active, dim=1).clamp_min_(SHORTEST).reciprocal_()
            narrow = active.to(dtype)
            cosine = (unit.to(dtype) @ narrow.T).to(active.dtype).mul_(inverse)
            own_cosine = (unit[rows] * active[columns]).sum(1) * inverse[columns]
            cosine[rows, columns] = own_cosine
        ctx.save_for_backward(unit, cosine, inverse, narrow, rows, columns)
        ctx.centres = centres
        return cosine, own_cosine

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor, own_gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        unit, cosine, inverse, narrow, rows, columns = ctx.saved_tensors
        with torch.autocast(unit.device.type, enabled=False):
            gradient[rows, columns] += own_gradient  # the softmax hands its gradient over: nobody else holds it
            along = cosine.mul_(gradient).sum(0).mul_(inverse).mul_(inverse)
            scaled = gradient.mul_(inverse).to(narrow.dtype)
            to_unit = (scaled @ narrow).to(unit.dtype)
            active, to_centres = ctx.centres.active, ctx.centres.gradient_buffer()
            if narrow.dtype == unit.dtype:
                torch.mm(scaled.T, unit, out=to_centres)
            else:
                to_centres.copy_(scaled.T @ unit.to(narrow.dtype))
            to_centres.addcmul_(active, along.unsqueeze(1), value=-1)
        return to_unit, None, None, None, None


class ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of N samples over the classes of all processes, from each one's cosines.

    ``apply(cosine, target, rows, columns, scale, filter, processes)``: the logits are ``scale`` times ``cosine``,
    (N, n), with ``target`` (P,) in its place at ``rows`` and ``columns``. Every sample's own class lies on exactly one
    process. Other classes whose cosine exceeds ``filter`` are left out of the softmax (None keeps all).

    Gives the same float32 scalar on every process. The exponentials are summed over all processes after subtracting the
    maximum over all (An et al., CVPR 2022, section 3.1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        cosine: Tensor,
        target: Tensor,
        rows: Tensor,
        columns: Tensor,
        scale: float,
        filter: float | None,
        processes: Processes,
    ) -> Tensor:
        logits = cosine * scale
        if filter is not None:
            logits.masked_fill_(cosine > filter, -torch.inf)
        logits[rows, columns] = target * scale
        peak = processes.maximum(logits.amax(1))
        shares = logits.sub_(peak.unsqueeze(1)).exp_()
        sums = torch.stack([shares.sum(1), torch.zeros_like(peak).index_copy_(0, rows, target * scale)])
        total, own_logit = processes.sum(sums)
        ctx.save_for_backward(shares.div_(total.unsqueeze(1)), rows, columns)
        ctx.factor = scale / len(cosine)
        loss: Tensor = (total.log() + peak - own_logit).mean()
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        shares, rows, columns = ctx.saved_tensors
        gradient = shares.mul_(outer * ctx.factor)
        to_target = gradient[rows, columns] - outer * ctx.factor
        gradient[rows, columns] = 0.0
        return gradient, to_target, None, None, None, None, None


#: Identities whose first centres are drawn from one random stream, so that a process draws only those near its own.
INITIAL_BLOCK = 8192


class PartialFC(nn.Module):
    """A sampled margin softmax over ``classes`` identities, of which this process holds a part.

    The centres are no parameters: autograd and optimisers never see them. ``backward`` leaves the gradient of the
    sampled ones in :attr:`gradient`, and :meth:`update` takes one step of SGD on these and on their momentum.

    Where a process has more positives than its quota, it takes them all and no negative (section 3.2), and
    :attr:`overfull` counts the step.

    Args:
        embedding_size: D.
        classes: C, identities over all processes.
        scale: s, the radius of the sphere on which logits live.
        margin, angle_factor, cosine_margin: m, m1, m3 of cos(m1 t + m) - m3 (:class:`bench.nets.heads.ArcFace`).
        sample_rate: r, in (0, 1]: share of the centres in each step.
        interclass_filter: negatives whose cosine to the sample exceeds this are left out of its softmax: they may well
            be the same person under another label. The paper's is 0.4; None keeps all.
        seed: of the centres and, until :meth:`reseed`, of the sampling.
        processes: among which the centres are shared out; one process by default.

    Attributes:
        weight, momentum: float32 (n, D), of the centres ``owned``.
        owned: the identities whose centres are here, a contiguous range.
        sampled: int64 (q,) ascending, the rows of ``weight`` that took part in the last step.
        active: float32 (q, D), their values.
        gradient: float32 (q, D), their gradient after ``backward``; None before.
        overfull: steps in which this process had more positives than its quota.

    Raises:
        UsageError: fewer identities than processes.
    """

    weight: Tensor
    momentum: Tensor

    def __init__(
        self,
        embedding_size: int,
        classes: int,
        *,
        scale: float,
        margin: float,
        angle_factor: float = 1.0,
        cosine_margin: float = 0.0,
        sample_rate: float = 0.1,
        interclass_filter: float | None = None,
        seed: int = 0,
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self.processes = processes or Processes()
        if classes < self.processes.size:
            raise UsageError(
                f"{classes} identities cannot be shared out among {self.processes.size} processes: start fewer"
            )
        self.classes, self.scale, self.interclass_filter = classes, scale, interclass_filter
        self.margin, self.angle_factor, self.cosine_margin = margin, angle_factor, cosine_margin
        self.owned = self.processes.share(classes)
        self.quota = max(1, round(sample_rate * len(self.owned)))
        self.overfull = 0
        self.register_buffer("weight", _initial(self.owned, embedding_size, seed))
        self.register_buffer("momentum", torch.zeros_like(self.weight))
        self.gradient: Tensor | None = None
        # Kept from step to step: fresh memory of this size costs more time than filling it.
        self._values: Tensor | None = None
        self._gradients: Tensor | None = None
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the sampling anew; each process draws numbers of its own."""
        self._generator = Streams(seed).generator(f"centres/{self.processes.rank}")

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean margin cross-entropy over the samples of all processes and the sampled centres of all processes.

        Under autocast the large products are computed in its type, the samples' cosines to their class and the softmax
        in float32. Of this process's embeddings (N, D) of any scale and labels, int64 (N,) in [0, C); others may bring
        other numbers.

        Returns:
            The loss, a float32 scalar, the same on every process, and, for this process's samples, which are nearer
            to their own centre than to any other sampled one (no margin): bool (N,). ``backward`` gives each process
            the whole gradient of its embeddings.

        Raises:
            ValueError: labels of another type or shape, or, on every process, outside [0, C) on one of them.
        """
        if labels.dtype != torch.int64 or labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(embeddings)},), got {labels.dtype} {tuple(labels.shape)}")
        everyone, mine = self.processes.gather(embeddings.to(self.weight.dtype))
        identities, _ = self.processes.gather(labels)
        if len(identities):
            low, high = torch.stack(identities.aminmax()).tolist()
            if low < 0 or high >= self.classes:
                raise ValueError(f"labels must lie in [0, {self.classes}), got {low} to {high}")
        rows = ((identities >= self.owned.start) & (identities < self.owned.stop)).nonzero().squeeze(1)
        positives = identities[rows] - self.owned.start
        self._sample(positives)
        columns = torch.searchsorted(self.sampled, positives)

        device = embeddings.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            cosine, own_cosine = Cosines.apply(F.normalize(everyone), self, rows, columns, dtype)
            hits = self._hits(cosine.detach(), own_cosine.detach(), rows)[mine]
            target = margin_target(own_cosine.clamp(-1.0, 1.0), self.angle_factor, self.margin, self.cosine_margin)
            loss: Tensor = ShardedCrossEntropy.apply(
                cosine, target, rows, columns, self.scale, self.interclass_filter, self.processes
            )
        return loss, hits

    def gradient_buffer(self) -> Tensor:
        """Memory for the gradient of the active centres, which becomes :attr:`gradient`."""
        self._gradients = _room(self._gradients, self.active)
        self.gradient = self._gradients[: len(self.active)]
        return self.gradient

    @torch.no_grad()
    def update(self, *, learning_rate: float, momentum: float, weight_decay: float) -> None:
        """One step of SGD, as :class:`torch.optim.SGD` takes it, on the sampled centres and their momentum.

        Those not sampled keep weight and momentum: neither decays while they wait (An et al., CVPR 2022).
        """
        if self.gradient is None:
            raise RuntimeError("update follows backward")
        weight, velocity = self.weight, self.momentum
        per_block = max(1, BLOCK_BYTES // (weight.shape[1] * weight.element_size()))
        whole = self.active.data_ptr() == weight.data_ptr()
        gathered = velocity.new_empty(0 if whole else min(per_block, len(self.sampled)), weight.shape[1])
        # Block by block, every value is brought from memory once and not once for each of the operations on it.
        for at in range(0, len(self.sampled), per_block):
            block = slice(at, at + per_block)
            chosen, value, step = self.sampled[block], self.active[block], self.gradient[block]
            step.add_(value, alpha=weight_decay)
            if whole:
                value.sub_(velocity[block].mul_(momentum).add_(step), alpha=learning_rate)
                continue
            moving = torch.index_select(velocity, 0, chosen, out=gathered[: len(chosen)]).mul_(momentum).add_(step)
            velocity.index_copy_(0, chosen, moving)
            weight.index_copy_(0, chosen, value.sub_(moving, alpha=learning_rate))
        self.gradient = None

    def overfull_everywhere(self) -> int:
        """:attr:`overfull` summed over the processes; every one calls it."""
        return int(self.processes.sum(torch.tensor(self.overfull, device=self.weight.device)))

    @torch.no_grad()
    def _sample(self, positives: Tensor) -> None:
        """Choose the centres of this step: all positives, and negatives up to the quota, each set equally likely."""
        count, self.gradient = len(self.owned), None
        if self.quota == count:
            self.sampled, self.active = torch.arange(count, device=self.weight.device), self.weight
            return
        needed = positives.unique()
        self.overfull += len(needed) > self.quota
        if len(needed) < self.quota:
            score = torch.rand(count, generator=self._generator).to(positives.device)
            score[needed] = -1.0
            # The quota-th smallest by partition: sorting all of a million scores would cost as much as the products.
            border = score.kthvalue(self.quota).values
            needed = (score <= border).nonzero().squeeze(1)
            if len(needed) > self.quota:  # equal scores on the border: of those, the last go
                tied = (score[needed] == border).nonzero().squeeze(1)[self.quota - len(needed) :]
                needed = needed[torch.ones_like(needed, dtype=torch.bool).index_fill_(0, tied, False)]
        self.sampled = needed
        self._values = _room(self._values, self.weight, len(needed))
        self.active = torch.index_select(self.weight, 0, needed, out=self._values[: len(needed)])

    def _hits(self, cosine: Tensor, own_cosine: Tensor, rows: Tensor) -> Tensor:
        there = own_cosine.new_full((len(cosine),), -torch.inf).index_copy_(0, rows, own_cosine)
        nearest, owns = self.processes.maximum(torch.stack([cosine.amax(1), there]))
        hits: Tensor = owns >= nearest
        return hits


def _room(buffer: Tensor | None, like: Tensor, count: int | None = None) -> Tensor:
    """``buffer`` if it has ``count`` rows on the right device, else a fresh one."""
    count = len(like) if count is None else count
    if buffer is not None and len(buffer) >= count and buffer.device == like.device:
        return buffer
    return torch.empty(count, like.shape[1], dtype=like.dtype, device=like.device)


def _initial(owned: range, embedding_size: int, seed: int) -> Tensor:
    """First centres, normal with deviation 0.01: float32 (len(owned), D), the same however they are shared out."""
    weight = torch.empty(len(owned), embedding_size)
    streams = Streams(seed)
    for block in range(owned.start // INITIAL_BLOCK, -(-owned.stop // INITIAL_BLOCK)):
        first = block * INITIAL_BLOCK
        drawn = torch.randn(INITIAL_BLOCK, embedding_size, generator=streams.generator(f"centre-start/{block}"))
        start, stop = max(first, owned.start), min(first + INITIAL_BLOCK, owned.stop)
        weight[start - owned.start : stop - owned.start] = 0.01 * drawn[start - first : stop - first]
    return weight


#: Rows of a file: 2^16 centres of 512 values and their momentum are a quarter of a gigabyte.
BLOCK_ROWS = 2**16

#: Names say which rows a file holds, so that any number of processes can read what another number wrote.
_NAME = re.compile(r"rows-(\d+)-(\d+)\.safetensors")


def save_centres(head: PartialFC, folder: Path) -> None:
    """Write this process's centres and momentum; all processes write into the same folder.

    Raises:
        BenchError: a file cannot be written.
    """
    owned = head.owned
    try:
        for first in range(owned.start, owned.stop, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, owned.stop)
            rows = slice(first - owned.start, stop - owned.start)
            block = {
                "weight": head.weight[rows].cpu().contiguous(),
                "momentum": head.momentum[rows].cpu().contiguous(),
            }
            with replacing(folder / f"rows-{first:010d}-{stop:010d}.safetensors") as temporary:
                save_file(block, temporary)
    except (OSError, SafetensorError) as error:
        raise BenchError(
            f"cannot write centres to {folder}: {error}; free some space or choose another --out"
        ) from error


@torch.no_grad()
def load_centres(head: PartialFC, folder: Path) -> None:
    """Read this process's centres and momentum, however many processes wrote them.

    Raises:
        DataError: a file is damaged, or some rows are in none.
    """
    owned, filled = head.owned, 0
    for file in sorted(folder.glob("rows-*.safetensors")):
        match = _NAME.fullmatch(file.name)
        if match is None:
            continue
        first, stop = max(int(match[1]), owned.start), min(int(match[2]), owned.stop)
        if first >= stop:
            continue
        try:
            with safe_open(file, framework="pt") as content:
                for name, target in (("weight", head.weight), ("momentum", head.momentum)):
                    rows = content.get_slice(name)[first - int(match[1]) : stop - int(match[1])]
                    target[first - owned.start : stop - owned.start] = rows.to(target.device)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise DataError(f"cannot read centres {file}: {error}; delete {folder.parent} to start again") from error
        filled += stop - first
    if filled != len(owned):
        raise DataError(
            f"{folder} holds {filled} of the {len(owned)} centres {owned.start} to {owned.stop - 1}: it is incomplete "
            f"or not on a disk that all processes share; delete {folder.parent} to start again"
        )
