"""Distribute a budget of multiply-adds over the FFNs: more experts where skipping hurts more.

Every FFN is divided as for a conversion, on a few tokens of the dense model, and measured with each number of parts
running: routed (the parts of largest norm, as a good router would choose), pruned (always the same parts, which needs
no router), or left dense. What is skipped leaves its mean. An error counts relative to the hidden state that it enters,

    error = mean over tokens of |what is skipped|^2 / |hidden state|^2,

so that layers can be compared, and the sum of the errors is minimised under the budget. Errors are taken before refit
and training, which lower all of them.

T tokens, E parts, D_out output features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparsify.config import SparsifyConfig
from sparsify.passes.calibrate import CalibrationStream, Call
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.plan import ConversionPlan, LayerPlan
from sparsify.passes.residual import residual_terms
from sparsify.passes.split.choose_neurons import activation_profiles, choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn
from sparsify.passes.split.fold_vectors import fold_vectors
from sparsify.passes.split.statistics import importance, measure_neurons

_TOKENS = 4096  # that run through the dense model
_MEASURED = 512  # of them, for the errors: [512, E, D_out]
_BISECTIONS = 60


@dataclass(frozen=True)
class Choice:
    """One way to convert an FFN.

    Attributes:
        top_k: parts that run.
        num_shared: of them, those that always run; all of them where the FFN is pruned.
        num_experts: E; 0 leaves the FFN dense.
        cost: multiply-adds for a token, router included.
        error: that it adds to the hidden state, squared and relative.
    """

    top_k: int
    num_shared: int
    num_experts: int
    cost: float
    error: float


def with_budget(
    graph_module: GraphModule,
    matches: Sequence[FFNMatch],
    plan: ConversionPlan,
    config: SparsifyConfig,
    batches: Sequence[Call] | None,
) -> ConversionPlan:
    """`allocate` where the config has a budget, else the plan as it is."""
    if config.budget is None or batches is None:
        return plan
    return allocate(graph_module, matches, plan, config, batches, config.budget)


@torch.no_grad()
def allocate(
    graph_module: GraphModule,
    matches: Sequence[FFNMatch],
    plan: ConversionPlan,
    config: SparsifyConfig,
    batches: Sequence[Call],
    budget: float,
) -> ConversionPlan:
    """Choose how many parts run in each FFN that `plan` converts.

    Args:
        graph_module: where `matches` were found; it is not changed.
        matches: all of them.
        plan: one entry per match; its numbers of experts are used, not its top_k.
        config: how to divide.
        batches: tokens to measure on.
        budget: share of the multiply-adds of these FFNs that may remain.

    Returns:
        The plan with the chosen numbers; the reasons say what was measured.
    """
    position = {node.name: i for i, node in enumerate(graph_module.graph.nodes)}
    todo = [(m, layer) for m, layer in zip(matches, plan.layers, strict=True) if layer.converts]
    todo.sort(key=lambda pair: position[pair[0].sites[0].x])
    stream = CalibrationStream(GraphModule(graph_module, copy.deepcopy(graph_module.graph)), _few(batches))
    choices = [_choices(graph_module, stream, match, layer.configure(config)) for match, layer in todo]
    total = sum(match.flops_per_token / 2 * len(match.sites) for match, _ in todo)
    chosen = minimise(choices, budget * total)
    layers = {layer.name: _planned(layer, choice, match) for (match, layer), choice in zip(todo, chosen, strict=True)}
    return ConversionPlan(tuple(layers.get(layer.name, layer) for layer in plan.layers))


def minimise(choices: Sequence[Sequence[Choice]], most: float) -> list[Choice]:
    """One choice per FFN with the least sum of errors, at a cost of at most `most` (Lagrange: one price for all).

    Where even the cheapest choices cost more, they are taken.
    """
    cheapest = [min(own, key=lambda choice: (choice.cost, choice.error)) for own in choices]
    low, high = -60.0, 60.0  # logarithm of the price of a multiply-add
    best = cheapest
    for _ in range(_BISECTIONS):
        price = 2 ** ((low + high) / 2)
        taken = [min(own, key=lambda choice: choice.error + price * choice.cost) for own in choices]
        if sum(choice.cost for choice in taken) <= most:
            best, high = taken, (low + high) / 2
        else:
            low = (low + high) / 2
    return _spend(best, choices, most)


def _spend(taken: list[Choice], choices: Sequence[Sequence[Choice]], most: float) -> list[Choice]:
    """Spend what is left, each time where a multiply-add lowers the error most."""
    while True:
        left = most - sum(choice.cost for choice in taken)
        upgrades = [
            ((taken[i].error - choice.error) / (choice.cost - taken[i].cost), i, choice)
            for i, own in enumerate(choices)
            for choice in own
            if 0 < choice.cost - taken[i].cost <= left and choice.error < taken[i].error
        ]
        if not upgrades:
            return taken
        _, index, choice = max(upgrades, key=lambda upgrade: upgrade[0])
        taken = [*taken[:index], choice, *taken[index + 1 :]]


def _few(batches: Sequence[Call]) -> list[Call]:
    """Whole batches from all over the data, about as many as hold the tokens that are needed."""
    count = max(1, min(len(batches), _TOKENS // max(1, _size(batches[0]))))
    return [batches[i * len(batches) // count] for i in range(count)]


def _size(call: Call) -> int:
    if call.mask is not None:
        return int(call.mask.sum())
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0].shape[:2].numel() if tensors else 1


def _choices(
    graph_module: GraphModule, stream: CalibrationStream, match: FFNMatch, config: SparsifyConfig
) -> list[Choice]:
    site = match.sites[0]
    down = next(node for node in graph_module.graph.nodes if node.name == site.down)
    places = [(site.x, site.x_axis), *((term.name, site.down_axis) for term in residual_terms(down))]
    x, *residuals = stream.tokens_at(places, match.name)
    match, dense = fold_vectors(match, read_ffn(graph_module, match))
    rows = torch.arange(0, len(x), -(-len(x) // _MEASURED))
    hidden = dense(x[rows]) + sum(residual[rows] for residual in residuals)
    weight = 1 / (hidden.square().sum(1) + torch.finfo(hidden.dtype).tiny) / len(rows)
    num_shared = 1 if config.num_experts > 2 else 0
    statistics = measure_neurons(dense, x)
    scores = importance(dense, statistics)
    routed = choose_neurons(activation_profiles(dense, x), scores, config.num_experts, num_shared, config.seed)
    size = routed.shape[1]
    pruned = torch.full((config.num_experts * size,), -1)
    pruned[: len(scores)] = scores.argsort(descending=True, stable=True)
    mean = statistics.mean.to(x.dtype)
    by_expert = _outputs(dense, x[rows], routed, mean)[:, num_shared:]
    order = by_expert.square().sum(2).argsort(dim=1, descending=True)
    by_norm = by_expert.gather(1, order.unsqueeze(2).expand_as(by_expert))
    by_importance = _outputs(dense, x[rows], pruned.view(-1, size), mean)
    macs = match.flops_per_token / 2 * len(match.sites)
    part = macs / config.num_experts
    router = config.router_hidden_size * (match.hidden_size + config.num_experts - num_shared) * len(match.sites)
    return [
        Choice(0, 0, 0, macs, 0.0),
        *(
            Choice(k + num_shared, num_shared, config.num_experts, (k + num_shared) * part + router, error)
            for k, error in enumerate(_errors(by_norm, weight))
            if 0 < k < by_norm.shape[1]
        ),
        *(
            Choice(k, k, config.num_experts, k * part, error)
            for k, error in enumerate(_errors(by_importance, weight))
            if 0 < k < config.num_experts
        ),
    ]


def _outputs(dense: DenseFFN, x: Tensor, parts: Tensor, mean: Tensor) -> Tensor:
    """What each of the parts `[E, m]` adds beyond its mean: `[T, E, D_out]`; -1 is no neuron."""
    hidden = dense.hidden(x) - mean
    outputs = [hidden[:, own] @ dense.down.weight[:, own].t() for own in (part[part >= 0] for part in parts)]
    return torch.stack(outputs, dim=1)


def _errors(outputs: Tensor, weight: Tensor) -> list[float]:
    """With the first 0, 1, ..., E of the parts `[T, E, D_out]` running: the squared norm of the sum of the others."""
    skipped = outputs.flip(1).cumsum(1).square().sum(2).flip(1)  # [T, E]
    return [*(weight @ skipped).tolist(), 0.0]


def _planned(layer: LayerPlan, choice: Choice, match: FFNMatch) -> LayerPlan:
    share = choice.cost / (match.flops_per_token / 2 * len(match.sites))
    if choice.num_experts == 0:
        return LayerPlan(layer.name, "the budget is better spent on leaving it dense", times=layer.times)
    way = "pruned" if choice.num_shared == choice.top_k else "routed"
    return replace(
        layer,
        top_k=choice.top_k,
        num_shared_experts=choice.num_shared,
        reason=f"{layer.reason}; the budget gives it {share:.0%}, {way}",
    )
