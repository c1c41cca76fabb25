"""How long a layer takes in onnxruntime on the CPU, lowering by lowering: a model of a few measured constants.

It ranks lowerings; `measure=True` times them.
"""

from __future__ import annotations

from dataclasses import replace

from sparsify.passes.find_layers import LayerFacts
from sparsify.passes.lower_onnx.lowerings import WHOLE, Lowering

# Two cores of a Zen 4 server, onnxruntime 1.31.1, fp32, T 1 to 2048, fitted to what benchmarks/onnx_speed.py measures.
_FLOPS = 1.77e11  # a second, in Gemm
_READ_ROW = 1.13e11  # bytes a second of packed weights, for one row
_READ = 7.5e10  # the same for several
_READ_FAR = 3.8e10  # the same in a layer that no cache holds
_CACHE = 3e7  # bytes
_MOE_FLOPS = 8.9e10  # a second, in com.microsoft.MoE
_PACK = 6.1e10  # bytes a second of weights, which that op packs in every call for an expert of several tokens
_READ_PLAIN = 6.6e10  # the same for an expert of one token
# Of ai.sparsify::MoE, measured on two cores of an Ice Lake server beside the others, in what these take here.
_FUSED_EXPERT, _FUSED_FLOPS, _FUSED_COPY = 2.3e-7, 1.9e11, 1.31e10
_COPY = 1.35e10  # bytes a second of rows, read and written
_NODE = 0.33e-6  # seconds, whatever it computes
_GEMM = 1.8e-6
_SORT_NODES, _MASK_NODES, _MOE_NODES = 15, 9, 7
_ROUTER = 1.5e-5  # seconds, and its products


def predict_seconds(lowering: Lowering, facts: LayerFacts, tokens: int) -> float:
    """The time of one call of a layer, with its router but for those of `WHOLE`, which have none.

    Args:
        lowering: how it is written.
        facts: of the layer.
        tokens: T, at least 1.
    """
    if lowering in WHOLE:
        return _products(facts, tokens, facts.num_experts * facts.expert_size)
    router = _ROUTER + 2 * tokens * facts.router_weights / _FLOPS
    return router + _experts(lowering, facts, tokens)


def _experts(lowering: Lowering, facts: LayerFacts, tokens: int) -> float:
    if lowering == "dense_masked":
        return _masked(facts, tokens)
    if lowering == "moe_op":
        return _moe(facts, tokens)
    if lowering == "fused_op":
        return _fused(facts, tokens)
    if facts.units is not None and lowering == "expert_chain":  # whole experts, of the mean width
        size = round(sum(facts.widths) / len(facts.units))
        facts = replace(facts, units=None, num_experts=len(facts.units), top_k=facts.routed_k, expert_size=size)
    rows, hit = tokens * facts.top_k, _experts_hit(facts, tokens)
    used = tokens * facts.routed_k * facts.num_experts / len(facts.widths)
    products = hit * _products(facts, used / hit, facts.expert_size)
    features = rows * facts.dtype.itemsize * (facts.hidden_size + 2.5 * facts.output_size)
    if lowering == "expert_chain":
        nodes = _SORT_NODES + facts.num_experts * (_projections(facts) + 3)
        return products + 2 * features / _COPY + nodes * _NODE
    hidden = rows * facts.dtype.itemsize * facts.expert_size * (1 + _projections(facts))
    features += rows * facts.dtype.itemsize * facts.hidden_size
    nodes = _SORT_NODES + facts.num_experts * (_projections(facts) + 1)
    return products + 2 * (features + hidden) / _COPY + nodes * _NODE


def _masked(facts: LayerFacts, tokens: int) -> float:
    neurons = facts.num_experts * facts.expert_size
    masked = 2 * tokens * neurons * facts.dtype.itemsize / _COPY
    return _products(facts, tokens, neurons) + masked + _MASK_NODES * _NODE


def _moe(facts: LayerFacts, tokens: int) -> float:
    rows = tokens * facts.top_k
    hit = _experts_hit(facts, tokens)
    weights = hit * _weight_bytes(facts, facts.expert_size)
    read = weights / (_READ_PLAIN if rows / hit < 2 else _PACK)
    if _is_far(facts):
        read *= _READ / _READ_FAR
    flops = 2 * rows * _weight_bytes(facts, facts.expert_size) / facts.dtype.itemsize
    features = rows * facts.dtype.itemsize * (facts.hidden_size + facts.output_size)
    return read + flops / _MOE_FLOPS + 2 * features / _COPY + _MOE_NODES * _NODE


def _fused(facts: LayerFacts, tokens: int) -> float:
    rows, hit = tokens * facts.top_k, _experts_hit(facts, tokens)
    products = hit * _bound(facts, rows / hit, facts.expert_size, _FUSED_FLOPS)
    return hit * _FUSED_EXPERT + products + rows * facts.hidden_size * facts.dtype.itemsize / _FUSED_COPY


def _products(facts: LayerFacts, rows: float, neurons: int) -> float:
    """All Gemms of one FFN of so many neurons."""
    return _bound(facts, rows, neurons, _FLOPS) + _GEMM * (_projections(facts) + 1)


def _bound(facts: LayerFacts, rows: float, neurons: int, flops_a_second: float) -> float:
    """By reading the weights of so many neurons, or by computing."""
    weights = _weight_bytes(facts, neurons)
    flops = 2 * rows * weights / facts.dtype.itemsize
    near = _READ_ROW if rows < 2 else _READ
    return max(weights / (_READ_FAR if _is_far(facts) else near), flops / flops_a_second)


def _is_far(facts: LayerFacts) -> bool:
    """No cache holds the layer."""
    return _weight_bytes(facts, facts.num_experts * facts.expert_size) > _CACHE


def _weight_bytes(facts: LayerFacts, neurons: int) -> int:
    return neurons * (facts.hidden_size * _projections(facts) + facts.output_size) * facts.dtype.itemsize


def _projections(facts: LayerFacts) -> int:
    return 2 if facts.gated else 1


def _experts_hit(facts: LayerFacts, tokens: int) -> float:
    """Expected, if tokens choose independently and evenly; several heads may have more slots than there are experts."""
    return facts.num_experts * (1 - (1 - min(1.0, facts.routed_k / len(facts.widths))) ** tokens)
