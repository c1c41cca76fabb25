"""Refit down_proj in closed form to the routing that will be used: ridge regression with a pull to the old weights.

For every token t, with M[t, e] = 1 where expert e runs (1 for shared experts), H = M * (h - mu) `[T, F]`, and Y the
output that is wanted:

    minimise  sum_t w_t |Y - b - H W^T - M beta|^2 + lam |W - W_old|^2 + lam |beta|^2,  lam = ridge mean(diag(H^T w H))

W is the new down_proj, beta a bias per expert, b a bias, w the weight of the token. T tokens, F neurons (of all
experts), R routed experts, U units of m neurons (one an expert, if all are of one width).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.passes.heap import trim_heap
from sparsify.passes.split.bf16_products import bf16_products, has_bf16_products
from sparsify.passes.split.dense_ffn import Linear
from sparsify.passes.split.experts import Experts
from sparsify.passes.split.statistics import CHUNK, chunks

_BLOCK = 256  # rows of the Gram matrix at a time


def refit(
    experts: Experts,
    mean: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    expert_ids: Tensor,
    ridge: float,
    *,
    may_round: bool = False,
) -> Experts:
    """Solve for the down projections and biases.

    Args:
        experts: the split; `expert_bias` is replaced.
        mean: `[F]`, mean of the neurons in the order of the experts, shared ones first.
        x: `[T, D]`.
        target: `[T, D_out]`, the output that is wanted for each token.
        weight: `[T]`, of each token in the error.
        expert_ids: `[T, K]` of the routed experts, by the router that will be deployed.
        ridge: relative strength of the pull.
        may_round: sum products of bf16 where these are faster.

    Returns:
        The experts with new `down`, `expert_bias`, `bias` and shared down_proj.
    """
    moments = _Moments(len(mean) + experts.num_routed, target.shape[1])
    for part, ids, wanted, w in zip(chunks(x), chunks(expert_ids), chunks(target), chunks(weight), strict=True):
        rounds = may_round and len(part) == CHUNK and has_bf16_products(part.device, part.dtype)
        with bf16_products() if rounds else nullcontext():  # of few shapes: oneDNN keeps megabytes for each
            moments.add(_features(experts, mean, part, ids), wanted, w)
    trim_heap()
    solution, intercept = moments.solve(_stacked_down(experts), ridge)
    return _with_solution(experts, mean.double(), solution, intercept)


def _features(experts: Experts, mean: Tensor, x: Tensor, expert_ids: Tensor) -> Tensor:
    """`[T, F + R]`: H beside M."""
    selected = torch.zeros(len(x), experts.num_routed, dtype=x.dtype).scatter_(1, expert_ids.long(), 1.0)
    num_units, size = experts.num_units, experts.down.shape[2]
    hidden = _all_hidden(experts, x).sub_(mean.to(x.dtype))
    routed = hidden[:, hidden.shape[1] - num_units * size :].unflatten(1, (num_units, size))
    routed.mul_(selected[:, experts.owners].unsqueeze(-1))
    return torch.cat([hidden, selected], dim=1)


def _all_hidden(experts: Experts, x: Tensor) -> Tensor:
    """`[T, F]`, in the order of the experts, shared ones first."""
    hidden = experts.hidden(x).flatten(1)
    return hidden if experts.shared is None else torch.cat([experts.shared.hidden(x), hidden], dim=1)


def _stacked_down(experts: Experts) -> Tensor:
    """`[F, D_out]`."""
    routed = experts.down.transpose(1, 2).flatten(0, 1)
    return routed if experts.shared is None else torch.cat([experts.shared.down.weight.t(), routed])


class _Moments:
    """Sums over tokens from which the regression is solved; tokens come in chunks and are not kept."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.total = 0.0
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.sum_inputs = torch.zeros(inputs, dtype=torch.float64)
        self.sum_outputs = torch.zeros(outputs, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor, weight: Tensor) -> None:
        """`[T, inputs]`, `[T, outputs]`, `[T]`. Products of a chunk in their own dtype, sums of chunks in fp64."""
        weighted = inputs * weight.unsqueeze(1)
        self.total += float(weight.sum())
        for start in range(0, len(self.gram), _BLOCK):  # it is symmetric: what lies left of its diagonal is not needed
            rows = slice(start, start + _BLOCK)
            self.gram[rows, start:] += weighted[:, rows].t() @ inputs[:, start:]
        self.cross += weighted.t() @ outputs
        self.sum_inputs += weighted.sum(0)
        self.sum_outputs += weight @ outputs

    def solve(self, old: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Weights `[inputs, outputs]` and intercept `[outputs]`.

        The first weights are pulled to `old` `[F, outputs]`, the others, of the bias of an expert, to zero.

        The sums are used up: with many neurons the Gram matrix is the largest tensor there is.
        """
        mean_inputs, mean_outputs = self.sum_inputs / self.total, self.sum_outputs / self.total
        pull = ridge * self.gram.diagonal()[: len(old)].mean().clamp(min=1e-12)
        gram = self.gram.addr_(mean_inputs, mean_inputs, alpha=-self.total)
        gram.diagonal().add_(pull)
        factor, failed = torch.linalg.cholesky_ex(gram, upper=True)  # which reads no more than add() summed
        while failed and pull.isfinite():  # the pull is below the rounding of the sums
            gram.diagonal().add_(9 * pull)
            pull = 10 * pull
            factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
        cross = self.cross.addr_(mean_inputs, mean_outputs, alpha=-self.total)
        cross[: len(old)].add_(old, alpha=float(pull))
        weights = torch.cholesky_solve(cross, factor, upper=True)
        return weights, mean_outputs - mean_inputs @ weights


def _with_solution(experts: Experts, mean: Tensor, solution: Tensor, intercept: Tensor) -> Experts:
    """Undo the centring: W (h - mu) + beta = W h + (beta - W mu), per expert; the shared part goes into the bias."""
    dtype, (num_units, outputs, size) = experts.down.dtype, experts.down.shape
    weights, beta = solution[: len(mean)], solution[len(mean) :]
    num_shared = len(mean) - num_units * size
    routed = weights[num_shared:].view(num_units, size, outputs)
    means = mean[num_shared:].view(num_units, size)
    beta = experts.to_units(beta)
    bias = intercept - mean[:num_shared] @ weights[:num_shared]
    shared = experts.shared
    if shared is not None:
        down = Linear(shared.down.role, weights[:num_shared].t().to(dtype).contiguous(), None)
        shared = replace(shared, down=down)
    return replace(
        experts,
        down=routed.transpose(1, 2).to(dtype).contiguous(),
        expert_bias=(beta - torch.einsum("em,emo->eo", means, routed)).to(dtype),
        bias=bias.to(dtype),
        shared=shared,
    )
