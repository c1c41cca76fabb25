"""What each way to convert an FFN would cost, and how far it would move the outputs of the model.

Every FFN is divided as for a conversion, on a few tokens of the dense model, and measured with each number of parts
running: routed (the parts of largest norm, as a good router would choose), pruned (always the same parts, which needs
no router), or left dense. What is skipped leaves its mean. An error counts relative to the hidden state that it enters,
and by what such an error does to the outputs, which is measured once for each FFN, with half of its neurons pruned:

    error = mean over tokens of |what is skipped|^2 / |hidden state|^2  *  effect
    effect = how far the outputs move with half pruned (`output_change`)  /  the same mean with half pruned

so that layers can be compared. Of the error of a number of parts, what a refit would leave of it if they were pruned
(`refit_share`) is what counts, routed or pruned. Training lowers all errors further.

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
from sparsify.passes.choices import Choice, FFNChoices
from sparsify.passes.match_ffn import FFNMatch, Site
from sparsify.passes.output_change import find_logits, output_change
from sparsify.passes.plan import ConversionPlan
from sparsify.passes.refit_share import refit_share
from sparsify.passes.residual import residual_terms
from sparsify.passes.split.choose_neurons import activation_profiles, choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn
from sparsify.passes.split.fold_vectors import fold_vectors
from sparsify.passes.split.statistics import chunks, importance, measure_neurons

_TOKENS = 4096  # that run through the dense model
_STEPS = 8  # of the number of shared experts: each takes a clustering
_TRIED = 0  # the batch whose outputs are looked at
_MEASURED = 512  # of them, for the errors: [512, E, D_out]


@torch.no_grad()
def measure_choices(
    graph_module: GraphModule,
    matches: Sequence[FFNMatch],
    plan: ConversionPlan,
    config: SparsifyConfig,
    batches: Sequence[Call],
) -> list[FFNChoices]:
    """Measure every FFN of a graph that `plan` converts.

    Args:
        graph_module: where `matches` were found; it is not changed.
        matches: all of them.
        plan: has an entry for each of them; its numbers of experts are used, not its top_k.
        config: how to divide.
        batches: tokens to measure on.

    Returns:
        Their choices in the order of the graph, without seconds.
    """
    layers = {layer.name: layer for layer in plan.layers}
    position = {node.name: i for i, node in enumerate(graph_module.graph.nodes)}
    todo = [match for match in matches if layers[match.name].converts]
    todo.sort(key=lambda match: position[match.sites[0].x])
    stream = CalibrationStream(GraphModule(graph_module, copy.deepcopy(graph_module.graph)), _few(batches))
    found: list[FFNChoices] = []
    whole = _Outputs(stream.outputs(_TRIED), find_logits(graph_module))
    for match in todo:
        layer = layers[match.name]
        choices = _choices(graph_module, stream, whole, match, layer.configure(config))
        found.append(FFNChoices(match, layer, config, choices[0], tuple(choices[1:])))
    return found


@dataclass(frozen=True)
class _Outputs:
    """Of the model that nothing was pruned from, in one batch; and which of them are logits."""

    tensors: list[Tensor]
    are_logits: list[bool]


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
    graph_module: GraphModule, stream: CalibrationStream, outputs: _Outputs, match: FFNMatch, config: SparsifyConfig
) -> list[Choice]:
    site = match.sites[0]
    down = next(node for node in graph_module.graph.nodes if node.name == site.down)
    places = [(site.x, site.x_axis), *((term.name, site.down_axis) for term in residual_terms(down))]
    x, *residuals = stream.tokens_at(places, match.name)
    match, dense = fold_vectors(match, read_ffn(graph_module, match))
    rows = torch.arange(0, len(x), -(-len(x) // _MEASURED))
    weight = _relative(dense, x[rows], [residual[rows] for residual in residuals]) / len(rows)
    statistics = measure_neurons(dense, x)
    scores = importance(dense, statistics)
    mean = statistics.mean.to(x.dtype)
    num_experts = config.num_experts
    macs = match.flops_per_token / 2 * len(match.sites)
    part = macs / num_experts
    found = [Choice(0, 0, 0, macs, 0.0)]
    profiles = activation_profiles(dense, x)
    for num_shared, counts in _routed_counts(config).items():
        parts = choose_neurons(profiles, scores, num_experts, num_shared, config.seed)
        by_expert = _outputs(dense, x[rows], parts, mean)[:, num_shared:]
        order = by_expert.square().sum(2).argsort(dim=1, descending=True)
        errors = _errors(by_expert.gather(1, order.unsqueeze(2).expand_as(by_expert)), weight)
        router = config.router_hidden_size * (match.hidden_size + num_experts - num_shared) * len(match.sites)
        found += [Choice(k, num_shared, num_experts, k * part + router, errors[k - num_shared]) for k in counts]
    pruned = torch.full((num_experts * -(-len(scores) // num_experts),), -1)
    kept = scores.argsort(descending=True, stable=True)
    pruned[: len(scores)] = kept
    errors = _errors(_outputs(dense, x[rows], pruned.view(num_experts, -1), mean), weight)
    found += [Choice(k, k, num_experts, k * part, errors[k]) for k in range(1, num_experts)]
    half = num_experts // 2
    skipped = pruned.view(num_experts, -1)[half:].flatten()
    moved = _moved(stream, outputs, site, dense, skipped[skipped >= 0], mean)
    effect = 1.0 if moved is None or not errors[half] else moved / errors[half]
    left = [1.0] * (num_experts + 1)
    if config.refit:
        thin = slice(None, None, -(-len(x) // _TOKENS))
        relative = _relative(dense, x[thin], [residual[thin] for residual in residuals])
        hidden = (dense.hidden(x[thin]) - mean)[:, kept] * relative.sqrt().unsqueeze(1)
        left = refit_share(hidden, dense.down.weight[:, kept], num_experts, config.ridge)
    return [replace(choice, error=choice.error * effect * left[choice.top_k]) for choice in found]


def _relative(dense: DenseFFN, x: Tensor, residuals: list[Tensor]) -> Tensor:
    """`[T]`: one over the squared norm of the hidden state."""
    state = dense(x) + sum(residuals)
    return 1 / (state.square().sum(1) + torch.finfo(state.dtype).tiny)


def _moved(
    stream: CalibrationStream, outputs: _Outputs, site: Site, dense: DenseFFN, skipped: Tensor, mean: Tensor
) -> float | None:
    """How far the outputs move in one batch without some neurons, whose means stay; None where they say nothing."""
    tokens = stream.value(site.x, _TRIED).movedim(site.x_axis, -1)
    flat = tokens.reshape(-1, tokens.shape[-1]).to(mean.dtype)
    columns = dense.down.weight[:, skipped].t()
    lost = torch.cat([(dense.hidden(part)[:, skipped] - mean[skipped]) @ columns for part in chunks(flat)])

    def without(value: Tensor) -> Tensor:
        last = value.movedim(site.down_axis, -1)
        return (last - lost.view_as(last).to(last.dtype)).movedim(-1, site.down_axis)

    return output_change(outputs.tensors, stream.outputs(_TRIED, site.down, without), outputs.are_logits)


def _routed_counts(config: SparsifyConfig) -> dict[int, list[int]]:
    """The numbers of parts that may run, by how many of them are shared: as by default, in a few steps."""
    step = max(1, config.num_experts // _STEPS)
    found: dict[int, list[int]] = {}
    for k in range(min(2, config.num_experts - 1), config.num_experts):
        default = replace(config, top_k=k, num_shared_experts=None).shared
        found.setdefault(max(min(1, k - 1), default // step * step), []).append(k)
    return found


def _outputs(dense: DenseFFN, x: Tensor, parts: Tensor, mean: Tensor) -> Tensor:
    """What each of the parts `[E, m]` adds beyond its mean: `[T, E, D_out]`; -1 is no neuron."""
    hidden = dense.hidden(x) - mean
    outputs = [hidden[:, own] @ dense.down.weight[:, own].t() for own in (part[part >= 0] for part in parts)]
    return torch.stack(outputs, dim=1)


def _errors(outputs: Tensor, weight: Tensor) -> list[float]:
    """With the first 0, 1, ..., E of the parts `[T, E, D_out]` running: the squared norm of the sum of the others."""
    skipped = outputs.flip(1).cumsum(1).square().sum(2).flip(1)  # [T, E]
    return [*(weight @ skipped).tolist(), 0.0]
