"""Fit a router to predict the norm of what each expert adds (D2DMoE, arXiv 2310.04361, section 3.3).

T tokens, D hidden_size, R routed experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.passes.split.choice_loss import squared_outputs
from sparsify.passes.split.experts import Experts
from sparsify.passes.split.statistics import chunks
from sparsify.routers import MLPRouter

_BATCH = 512
_STEPS = 300
_LEARNING_RATE = 1e-2


def expert_norms(experts: Experts, x: Tensor) -> Tensor:
    """`[T, R]`: the norm of `E_e(x) + expert_bias_e`, the deviation from what stands in when e is skipped."""
    norms = _norms if experts.sizes else _norms_of_units
    return torch.cat([norms(experts, part) for part in chunks(x)])


def _norms_of_units(experts: Experts, x: Tensor) -> Tensor:
    hidden = experts.hidden(x).transpose(0, 1)  # [U, T, m]
    return squared_outputs(hidden, experts.down.transpose(1, 2), experts.expert_bias).t().clamp(min=0).sqrt()


def _norms(experts: Experts, x: Tensor) -> Tensor:
    columns: list[Tensor] = []
    sizes = experts.sizes or (1,) * experts.num_units
    for e, last in enumerate(itertools.accumulate(sizes)):
        own = slice(last - sizes[e], last)  # units
        projected = [
            functional.linear(x, weight[own].flatten(0, 1), None if bias is None else bias[own].flatten())
            for weight, bias in zip(experts.projections, experts.projection_biases, strict=True)
        ]
        hidden = experts.activation(*projected, *(v[own].flatten() if v.dim() == 2 else v for v in experts.vectors))
        bias = None if experts.expert_bias is None else experts.expert_bias[own].sum(0)
        down = experts.down[own].transpose(0, 1).flatten(1)
        columns.append(functional.linear(hidden, down, bias).norm(dim=1))
    return torch.stack(columns, dim=1)


def train_router(x: Tensor, norms: Tensor, top_k: int, router_hidden_size: int, seed: int) -> MLPRouter:
    """Regress the norms, which are put on one scale.

    Args:
        x: `[T, D]`, T > 0.
        norms: `[T, R]`.
        top_k: routed experts that will run for a token.
        router_hidden_size: width of the hidden layer.
        seed: of the initial weights and the order of the batches.
    """
    targets = norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
    return learn_logits(x, targets, top_k, router_hidden_size, seed, functional.mse_loss)


def learn_logits(
    x: Tensor, targets: Tensor, top_k: int, router_hidden_size: int, seed: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> MLPRouter:
    """Bring logits near targets, on standardised tokens, with Adam and a falling learning rate.

    Args:
        x: `[T, D]`, T > 0.
        targets: `[T, R]`.
        top_k: routed experts that will run for a token.
        router_hidden_size: width of the hidden layer.
        seed: of the initial weights and the order of the batches.
        loss: of logits and targets.

    Returns:
        A router that takes `x` as it is: the standardisation is folded into its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = MLPRouter(x.shape[1], targets.shape[1], top_k, router_hidden_size).to(x.dtype)
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    for _ in range(_STEPS):
        batch = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator)
        with torch.enable_grad():
            tokens = (x.index_select(0, batch) - mean) / std
            error = loss(router.logits(tokens), targets.index_select(0, batch))
            optimizer.zero_grad()
            error.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        router.hidden.weight /= std
        router.hidden.bias.sub_(router.hidden.weight @ mean)
    return router.requires_grad_(False)
