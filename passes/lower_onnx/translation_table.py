"""The ops of ours for a `torch.onnx.export` of the user's own: `custom_translation_table=onnx_translation_table()`.

Experts become standard operators of opset 18, as by `expert_chain`, but with a Slice an expert in place of one Split:
the exporter takes no Split whose sizes are computed. Stacked weights are stored once, and cut when a runtime loads the
file.

T tokens, K slots, R = T*K rows, E experts, D and N features, M neurons of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from onnxscript import opset18

from sparsify.errors import ExportError
from sparsify.passes.find_layers import COMBINE, DISPATCH, EXPERT_LINEAR, MOE_FFN

op: Any = opset18  # its type hints are those of scripts, which this is not
Value = Any  # what the exporter passes: it has a shape and an element type
_END = 2**31 - 1
_INT64 = 7


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export(sparse, ..., dynamo=True, custom_translation_table=...)` needs to export a SparseModel.

    `export_onnx` writes faster files, and compares them with the model.
    """
    return {DISPATCH: _dispatch, EXPERT_LINEAR: _expert_linear, COMBINE: _combine, MOE_FFN: _moe_ffn}


def _dispatch(x: Value, expert_ids: Value, num_experts: int) -> tuple[Value, Value, Value]:
    order, tokens, offsets = _sort(expert_ids, num_experts)
    return op.Gather(x, tokens, axis=0), order, offsets


def _expert_linear(rows: Value, weight: Value, bias: Value | None, offsets: Value) -> Value:
    weights, biases = _experts_of(weight), _experts_of(bias)
    parts = _parts(rows, offsets, len(weights))
    outputs = [
        op.Gemm(*_given(*each), transB=1) for each in zip(parts, weights, biases or [None] * len(weights), strict=True)
    ]
    return op.Concat(*outputs, _zeros(rows, offsets, weight), axis=0)


def _combine(rows: Value, routing_weights: Value, order: Value) -> Value:
    """`[T, N]`."""
    count = op.Shape(order)
    places = op.Range(_int(0), op.Squeeze(count), _int(1))
    by_slot = op.Gather(rows, op.ScatterElements(places, order, places, axis=0), axis=0)  # [R, N]
    shape = op.Concat(op.Shape(routing_weights), op.Shape(rows, start=1, end=2), axis=0)
    by_slot = op.Reshape(by_slot, shape)  # [T, K, N]
    weights = op.Unsqueeze(op.CastLike(routing_weights, rows), _ints(2))
    return op.ReduceSum(op.Mul(by_slot, weights), _ints(1), keepdims=0)


def _moe_ffn(
    x: Value,
    routing_weights: Value,
    expert_ids: Value,
    up_proj: Value,
    up_bias: Value | None,
    gate_proj: Value | None,
    gate_bias: Value | None,
    down_proj: Value,
    down_bias: Value | None,
    activation: str,
) -> Value:
    num_experts = int(up_proj.shape[0])
    order, tokens, offsets = _sort(expert_ids, num_experts)
    ups, up_biases, gates = _experts_of(up_proj), _experts_of(up_bias), _experts_of(gate_proj)
    gate_biases, downs, down_biases = _experts_of(gate_bias), _experts_of(down_proj), _experts_of(down_bias)
    outputs: list[Value] = []
    for e, part in enumerate(_parts(tokens, offsets, num_experts)):
        rows = op.Gather(x, part, axis=0)  # [tokens of e, D]
        hidden = _linear(rows, ups, up_biases, e)
        if gates:
            hidden = op.Mul(_ACTIVATIONS[activation](_linear(rows, gates, gate_biases, e)), hidden)
        else:
            hidden = _ACTIVATIONS[activation](hidden)
        outputs.append(_linear(hidden, downs, down_biases, e))
    out = op.Concat(*outputs, _zeros(tokens, offsets, down_proj), axis=0)
    return _combine(out, routing_weights, order)


def _sort(expert_ids: Value, num_experts: int) -> tuple[Value, Value, Value]:
    """Order `[R]` and tokens `[R]` by expert, unused slots (-1) last; offsets `[E+1]` int32."""
    ids = op.Reshape(expert_ids, _ints(-1))
    key = op.Where(op.Less(ids, _int(0)), _int(num_experts), ids)
    count = op.Shape(key)
    _, order = op.TopK(key, count, axis=0, largest=0, sorted=1)  # the lower index first among equals: stable
    tokens = op.Div(order, op.Squeeze(op.Shape(expert_ids, start=1, end=2)))
    per_part = op.ScatterElements(
        op.Expand(_int(0), _ints(num_experts + 1)), key, op.Expand(_int(1), count), axis=0, reduction="add"
    )
    ends = op.Slice(op.CumSum(per_part, _int(0)), _ints(0), _ints(num_experts))
    return order, tokens, op.Cast(op.Concat(_ints(0), ends, axis=0), to=6)


def _parts(values: Value, offsets: Value, num_experts: int) -> list[Value]:
    """What belongs to each expert, of values sorted by expert."""
    edges = op.Split(op.Cast(offsets, to=_INT64), axis=0, num_outputs=num_experts + 1)
    return [op.Slice(values, edges[e], edges[e + 1], _ints(0)) for e in range(num_experts)]


def _zeros(values: Value, offsets: Value, weight: Value) -> Value:
    """`[unused, N]`, behind the rows of the last expert."""
    last = op.Slice(op.Cast(offsets, to=_INT64), _ints(-1), _ints(_END))
    unused = op.Sub(op.Shape(values, start=0, end=1), last)
    zero = op.CastLike(op.Constant(value_float=0.0), weight)
    return op.Expand(zero, op.Concat(unused, _ints(int(weight.shape[1])), axis=0))


def _experts_of(stacked: Value | None) -> list[Value]:
    """The weight `[N, M]` or bias `[N]` of every expert; none where there is no such tensor."""
    if stacked is None:
        return []
    if any(not isinstance(size, int) for size in stacked.shape):
        raise ExportError(f"the expert weight {stacked.name} has a dynamic shape; only stored weights can be exported")
    shape = list(stacked.shape)
    flat = op.Reshape(stacked, _ints(-1, *shape[2:]))
    parts = op.Split(flat, axis=0, num_outputs=shape[0])
    return list(parts) if shape[0] > 1 else [parts]


def _linear(rows: Value, weights: list[Value], biases: list[Value], expert: int) -> Value:
    return op.Gemm(*_given(rows, weights[expert], biases[expert] if biases else None), transB=1)


def _given(*values: Value | None) -> list[Value]:
    return [value for value in values if value is not None]


def _int(value: int) -> Value:
    return op.Constant(value_int=value)


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def _number(value: float, like: Value) -> Value:
    return op.CastLike(op.Constant(value_float=value), like)


def _gelu(z: Value) -> Value:
    half = op.Mul(z, _number(0.5, z))
    return op.Mul(half, op.Add(op.Erf(op.Mul(z, _number(math.sqrt(0.5), z))), _number(1.0, z)))


def _gelu_tanh(z: Value) -> Value:
    cube = op.Mul(op.Mul(z, op.Mul(z, z)), _number(0.044715, z))
    inner = op.Mul(op.Add(z, cube), _number(math.sqrt(2 / math.pi), z))
    return op.Mul(op.Mul(z, _number(0.5, z)), op.Add(op.Tanh(inner), _number(1.0, z)))


def _squared_relu(z: Value) -> Value:
    positive = op.Relu(z)
    return op.Mul(positive, positive)


_ACTIVATIONS: Mapping[str, Callable[[Value], Value]] = {
    "relu": op.Relu,
    "squared_relu": _squared_relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda z: op.Mul(z, op.Sigmoid(z)),
}
