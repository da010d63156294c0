"""Muon: SGD with momentum whose steps of convolutions and linear layers are orthogonal matrices.

Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024), as it trains convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Of the Newton-Schulz iteration s -> a s + b s^3 + c s^5 on singular values: steep at zero, and near one afterwards.
_QUINTIC = (3.4445, -4.7750, 2.0315)
#: Rounds of it, and momentum of matrices: two rounds, or a momentum of .9, train no better (rendered faces).
_ROUNDS, _MOMENTUM = 3, 0.6


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and ungrouped convolutions, each once, as matrices a row an output; none that is 0."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    wanted = {id(layer.weight) for layer in layers if getattr(layer, "groups", 1) == 1}
    return [p for p in module.parameters() if id(p) in wanted and p.requires_grad and p.any()]


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, (m, n): its singular values, all but the smallest, moved near one.

    Singular values above some 5 % of the largest possible, the norm, come to lie between .6 and 1.2.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    linear, cubic, quintic = _QUINTIC
    matrix = matrix / torch.linalg.vector_norm(matrix).clamp(min=1e-12)
    # The iteration multiplies by polynomials of X X^T, which commute: they are multiplied with each other, being
    # small, and with X at last.
    gram, product = matrix @ matrix.T, None
    for left in reversed(range(_ROUNDS)):
        factor = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        factor.diagonal().add_(linear)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Trains the matrices of a module by Muon, and everything else by another optimiser.

    A matrix moves by the learning rate times ``share`` times its own Frobenius norm, and keeps that norm: what batch
    norm divides by anyway neither grows nor says how far a step goes, so that it needs no decay. Its momentum is
    Nesterov's.

    Args:
        module: whose learned parameters are trained.
        rest: makes the optimiser of the parameters that are no matrices, of which there is one at least.
        lr: the learning rate, above 0, of both.
        share: what a learning rate of one makes of a matrix's norm.
    """

    def __init__(
        self,
        module: nn.Module,
        rest: Callable[..., torch.optim.Optimizer],
        *,
        lr: float,
        share: float = 1.0,
    ) -> None:
        weights = matrices(module)
        chosen = set(map(id, weights))
        self.rest = rest([p for p in module.parameters() if p.requires_grad and id(p) not in chosen], lr=lr)
        super().__init__([{"params": weights}], {"lr": lr, "share": share})
        self.param_groups, self.state = [*self.rest.param_groups, *self.param_groups], self.rest.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimiser."""
        super().load_state_dict(state_dict)
        self.rest.param_groups, self.rest.state = self.param_groups[:-1], self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = self.rest.step(closure)
        *_, group = self.param_groups
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum_buffer"].mul_(_MOMENTUM).add_(weight.grad)
            step = orthogonal(weight.grad.add(momentum, alpha=_MOMENTUM).flatten(1)).view(weight.shape)
            norm = torch.linalg.vector_norm(weight)
            length = group["lr"] * group["share"] * norm
            weight.sub_(step * (length / torch.linalg.vector_norm(step).clamp(min=1e-12)))
            weight.mul_(norm / torch.linalg.vector_norm(weight))
        return loss
