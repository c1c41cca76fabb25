"""How long an FFN takes on the machine that converts it, dense and as experts: predicted, and measured.

Predictions are those of `sparsify.cpu.Costs`. Measurements run both with random weights of the right sizes, router and
shared experts included. T tokens, D hidden_size, F intermediate_size, E num_experts, S of them shared, m neurons each.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify import ops
from sparsify.config import SparsifyConfig
from sparsify.cpu import Costs, FFNShape
from sparsify.expert_units import ExpertUnits, units_of_widths
from sparsify.kernels.reference import ACTIVATIONS
from sparsify.passes.activation import ActivationName, name_activation
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.split.dense_ffn import DenseFFN, Linear
from sparsify.passes.split.experts import Experts, divide_unevenly, take_neurons
from sparsify.passes.split.fold_vectors import fold_function
from sparsify.routers import MLPRouter

Call = Callable[[Tensor], Tensor]

_ROUNDS = 9
_BATCHES = 4  # tokens and routing differ from round to round, as in a model
_SECONDS = 2.0  # no further round once an FFN took this long
_PREDICTED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one call of an FFN.

    Attributes:
        tokens: T of the call.
        predicted_dense: by the cost model; None where it knows neither device nor dtype.
        predicted_experts: the same for router, experts and shared experts.
        form: of the experts that the cost model would choose; "pruned" where all that run are shared.
        dense: measured, median; None for a model without data (on the meta device).
        experts: the same for router, experts and shared experts.
    """

    tokens: int
    predicted_dense: float | None
    predicted_experts: float | None
    form: str
    dense: float | None
    experts: float | None

    @property
    def pays(self) -> bool:
        """The experts are faster: as measured where they were, else as predicted. True where nothing is known."""
        if self.dense is not None and self.experts is not None:
            return self.experts < self.dense
        if self.predicted_dense is not None and self.predicted_experts is not None:
            return self.predicted_experts < self.predicted_dense
        return True

    def __str__(self) -> str:
        predicted = _pair(self.predicted_dense, self.predicted_experts)
        measured = _pair(self.dense, self.experts)
        return f"{self.tokens} tokens: dense -> experts {measured} measured, {predicted} predicted"


def time_layer(match: FFNMatch, config: SparsifyConfig, tokens: int) -> LayerTime:
    """Predict and measure. FFNs of the same sizes on the same device are measured once in a process.

    Args:
        match: the FFN.
        config: its numbers of experts.
        tokens: T, at least 1.
    """
    predicted = predict_layer(match, config, tokens)
    if match.device == "meta":
        return predicted
    dense, experts = _measure(_subject(match, config), tokens, torch.get_num_threads())
    return replace(predicted, dense=dense, experts=experts)


def layer_calls(match: FFNMatch, config: SparsifyConfig) -> tuple[Call, Call]:
    """What `time_layer` times: the FFN, and router, experts and shared experts, each from `[T, D]` to `[T, O]`."""
    subject = _subject(match, config)
    dense = _random_ffn(subject)
    return dense, _runner(subject, dense)


def predict_layer(match: FFNMatch, config: SparsifyConfig, tokens: int) -> LayerTime:
    """As `time_layer`, without measurements."""
    form, experts = _predict_experts(match, config, tokens)
    return LayerTime(tokens, _predict_dense(match, match.intermediate_size, tokens), experts, form, None, None)


def _predict_dense(match: FFNMatch, neurons: int, tokens: int) -> float | None:
    shape = _shape(match, neurons, 1, 1)
    return None if shape is None else Costs.load().dense_seconds(shape, tokens, packed=False)


def _predict_experts(match: FFNMatch, config: SparsifyConfig, tokens: int) -> tuple[str, float | None]:
    """Of the routed experts, the shared ones and the router; or of what pruning leaves."""
    widths = config.widths_of(match.intermediate_size)
    shared, routed = sum(widths[: config.shared]), widths[config.shared :]
    if config.top_k == config.shared:
        return "pruned", _predict_dense(match, shared, tokens)
    shape = _shape(match, sum(routed), len(routed), config.top_k - config.shared)  # of the mean width
    if shape is None:
        return "", None
    costs = Costs.load()
    form, seconds = costs.experts(shape, tokens)
    beside = [FFNShape(match.hidden_size, config.router_hidden_size, len(routed), 1, 1, False, torch.float32)]
    beside += [replace(shape, intermediate_size=shared)] if shared else []
    return form, seconds + sum(costs.dense_seconds(dense, tokens, packed=False) for dense in beside)


def _shape(match: FFNMatch, neurons: int, num_experts: int, top_k: int) -> FFNShape | None:
    known = match.device in ("cpu", "meta") and match.dtype in _PREDICTED
    if not known or len(match.projections) > 2:
        return None
    gated = match.kind == "gated"
    return FFNShape(match.hidden_size, neurons, match.out_features, num_experts, top_k, gated, match.dtype)


@dataclass(frozen=True)
class _Subject:
    """What is measured; equal where the times are."""

    match: FFNMatch
    function: GraphModule
    vectors: int
    named: ActivationName
    config: SparsifyConfig

    @property
    def key(self) -> tuple[object, ...]:
        match, config = self.match, self.config
        sizes = (match.hidden_size, match.intermediate_size, match.out_features, match.dtype, match.device)
        numbers = (config.num_experts, config.top_k, config.shared, config.router_hidden_size, config.expert_widths)
        return *sizes, *numbers, len(match.projections), self.function.code

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Subject) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _subject(match: FFNMatch, config: SparsifyConfig) -> _Subject:
    function, vectors = fold_function(match)
    return _Subject(match, function, vectors, name_activation(function, len(match.projections), vectors), config)


@functools.lru_cache(maxsize=1024)
@torch.no_grad()
def _measure(subject: _Subject, tokens: int, threads: int) -> tuple[float, float]:
    """Medians of interleaved rounds. `threads` is part of what the cached result depends on."""
    dense = _random_ffn(subject)
    experts = _runner(subject, dense)
    batches = [_random(subject, tokens, subject.match.hidden_size) for _ in range(_BATCHES)]
    for x in batches:
        dense(x)
        experts(x)
    seconds: list[tuple[float, float]] = []
    start = time.perf_counter()
    for i in range(_ROUNDS):
        x = batches[i % _BATCHES]
        seconds.append((_seconds(dense, x), _seconds(experts, x)))
        if time.perf_counter() - start > _SECONDS:
            break
    return statistics.median(a for a, _ in seconds), statistics.median(b for _, b in seconds)


def _seconds(layer: Call, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _random_ffn(subject: _Subject) -> DenseFFN:
    """In the dtype of the model, so without the constants that were folded away."""
    match, width = subject.match, subject.match.intermediate_size
    projections = tuple(
        Linear(p.role, _random(subject, width, match.hidden_size), None if p.bias is None else _random(subject, width))
        for p in match.projections
    )
    bias = None if match.down_proj.bias is None else _random(subject, match.out_features)
    down = Linear("down_proj", _random(subject, match.out_features, width), bias)
    vectors = tuple(_random(subject, width) for _ in range(subject.vectors))
    return DenseFFN(projections, vectors, subject.function, down, requires_grad=False)


def _runner(subject: _Subject, dense: DenseFFN) -> Call:
    """Router, experts and shared experts as a converted model runs them."""
    match, config = subject.match, subject.config
    widths = config.widths_of(match.intermediate_size)
    neurons = torch.arange(sum(widths), device=match.device).clamp(max=match.intermediate_size - 1)
    shared, own = neurons.tensor_split([sum(widths[: config.shared])])
    if config.top_k == config.shared:
        kept = take_neurons(dense, shared)
        return replace(kept, down=replace(kept.down, bias=dense.down.bias))
    unit, sizes = units_of_widths(widths[config.shared :])
    experts = divide_unevenly(dense, shared, own.view(-1, unit), None if max(sizes) == 1 else sizes)
    routed, top_k = experts.num_routed, config.top_k - config.shared
    router = MLPRouter(match.hidden_size, routed, top_k, config.router_hidden_size).to(match.device)
    if subject.named.name not in ACTIVATIONS:
        return lambda x: experts(x, router(x)[1])
    gate = None if subject.named.gate is None else experts.projections[subject.named.gate]
    gate_bias = None if subject.named.gate is None else experts.projection_biases[subject.named.gate]
    up = next(i for i in range(len(match.projections)) if i != subject.named.gate)
    up_proj, gate_proj, down_proj = map(_parameter, (experts.projections[up], gate, experts.down))
    weights = (up_proj, experts.projection_biases[up], gate_proj, gate_bias, down_proj, None)
    return functools.partial(_run_fused, experts, router, experts.units, weights, subject.named.name)


def _parameter(weight: Tensor | None) -> Tensor | None:
    """As a converted model holds it."""
    return None if weight is None else nn.Parameter(weight, requires_grad=False)


def _run_fused(
    experts: Experts,
    router: MLPRouter,
    units: ExpertUnits | None,
    weights: tuple[Tensor | None, ...],
    activation: str,
    x: Tensor,
) -> Tensor:
    routing_weights, expert_ids = router(x)
    if units is not None:
        routing_weights, expert_ids = units(routing_weights, expert_ids)
    y = ops.moe_ffn(x, routing_weights, expert_ids, *weights, activation)
    y = y if experts.shared is None else y + experts.shared(x)
    return y if experts.bias is None else y + experts.bias


def _random(subject: _Subject, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=subject.match.dtype, device=subject.match.device) / shape[-1] ** 0.5


def _pair(dense: float | None, experts: float | None) -> str:
    return "not" if dense is None or experts is None else f"{dense * 1e3:.3g} -> {experts * 1e3:.3g} ms"
