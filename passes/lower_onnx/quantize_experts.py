"""Expert weights of a lowered graph -> int8 or int4, one scale for a block of 32 input features of a neuron.

    com.microsoft::MatMulNBits(rows, weight, scale)     onnxruntime, which also rounds the rows to int8: its fast kernel
    MatMul(rows, DequantizeLinear(weight, scale))       portable; blocks and int4 came with opset 21

Symmetric: w = scale * q, where q is -127..127 or -7..7 and scale the largest |w| of the block over the largest q.
Routers, shared experts and everything else keep their dtype. M input and N output features, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from sparsify.passes.lower_onnx.lowerings import Target
from sparsify.passes.lower_onnx.name_nodes import node_path
from sparsify.passes.lower_onnx.values import dtype_of, input_of, optional_input, stored

Quantized = Literal["int8", "int4"]
BITS: Mapping[Quantized, int] = {"int8": 8, "int4": 4}
# The first opset in which DequantizeLinear has blocks.
BLOCK_OPSET = 21

_BLOCK = 32
_INT8_ROWS = 4  # the accuracy_level that names it
_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _Blocks:
    """A weight `[N, M]`: `numbers` `[N, B, 32]` int8, padded by zeros, and `scales` `[N, B]` fp32."""

    numbers: np.ndarray
    scales: np.ndarray


def quantize_experts(model: ir.Model, kind: Quantized, target: Target, layers: Sequence[str]) -> float:
    """Replace the product of every expert, in place.

    Args:
        model: lowered, by any lowering but "moe_op"; its nodes have their names.
        kind: of the new weights.
        target: what will run the file; "portable" needs opset 21.
        layers: the names of the converted layers.

    Returns:
        The largest relative error (Frobenius norm) of a weight.
    """
    graph = model.graph
    errors = [0.0]
    known: dict[tuple[ir.Value, bool], tuple[ir.Value, ...]] = {}
    parts = tuple(f"{node_path(f'{layer}.experts')}{end}" for layer in layers for end in "./")
    for node in [node for node in graph if _is_product(node, parts)]:
        tape = Tape()
        transposed = bool(node.attributes["transB"].as_int()) if "transB" in node.attributes else False
        key = (input_of(node, 1), transposed)
        if key not in known:
            array = stored(key[0]).astype(np.float32)
            weight = array if transposed else array.T  # [N, M]
            blocks = _quantize(weight, BITS[kind])
            errors.append(_error(weight, blocks))
            stores = _store_portable if target == "portable" else _store_packed
            known[key] = stores(tape, str(key[0].name), blocks, kind, weight.shape[1], dtype_of(key[0]))
        multiply = _multiply_portable if target == "portable" else _multiply_packed
        product = multiply(tape, node, known[key], kind, stored(key[0]).shape[:: 1 if transposed else -1])
        _replace(graph, node, tape, product)
    if target != "portable":
        model.opset_imports[_DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return max(errors)


def _is_product(node: ir.Node, parts: tuple[str, ...]) -> bool:
    """A product with a stored weight, in the experts of a converted layer."""
    return node.op_type == "Gemm" and str(node.name).startswith(parts) and input_of(node, 1).const_value is not None


def _quantize(weight: np.ndarray, bits: int) -> _Blocks:
    outputs, features = weight.shape
    blocks = -(-features // _BLOCK)
    padded = np.zeros((outputs, blocks * _BLOCK), np.float32)
    padded[:, :features] = weight
    padded = padded.reshape(outputs, blocks, _BLOCK)
    largest = 2 ** (bits - 1) - 1
    scales = np.abs(padded).max(-1) / largest
    numbers = np.round(padded / np.where(scales == 0, 1, scales)[..., None])
    return _Blocks(numbers.astype(np.int8), scales)


def _error(weight: np.ndarray, blocks: _Blocks) -> float:
    back = (blocks.numbers * blocks.scales[..., None]).reshape(len(weight), -1)[:, : weight.shape[1]]
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(back - weight)) / norm if norm else 0.0


def _store_packed(
    tape: Tape, name: str, blocks: _Blocks, kind: Quantized, features: int, dtype: ir.DataType
) -> tuple[ir.Value, ...]:
    """Unsigned, so that the middle is zero; of two int4 the even feature stands in the low half of a byte."""
    numbers = (blocks.numbers.astype(np.int16) + 2 ** (BITS[kind] - 1)).astype(np.uint8)
    if kind == "int4":
        numbers = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    scales = blocks.scales.astype(dtype.numpy())
    return (
        tape.initializer(ir.Tensor(numbers, name=f"{name}.{kind}")),
        tape.initializer(ir.Tensor(scales, dtype=dtype, name=f"{name}.scale")),
    )


def _multiply_packed(
    tape: Tape, node: ir.Node, weight: tuple[ir.Value, ...], kind: Quantized, shape: tuple[int, ...]
) -> ir.Value:
    outputs, features = shape
    attributes = {"K": features, "N": outputs, "bits": BITS[kind], "block_size": _BLOCK, "accuracy_level": _INT8_ROWS}
    return tape.op("MatMulNBits", [input_of(node, 0), *weight], attributes, domain=_DOMAIN, version=1)


def _store_portable(
    tape: Tape, name: str, blocks: _Blocks, kind: Quantized, features: int, dtype: ir.DataType
) -> tuple[ir.Value, ...]:
    """`[M, N]` and `[B, N]`: as MatMul reads it, which onnxruntime takes for a quantised product."""
    numbers = blocks.numbers.reshape(len(blocks.numbers), -1)[:, :features].T
    scales = ir.Tensor(np.ascontiguousarray(blocks.scales.T).astype(dtype.numpy()), dtype=dtype, name=f"{name}.scale")
    if kind == "int4":
        numbers = numbers.astype(ml_dtypes.int4)
    return tape.initializer(ir.Tensor(np.ascontiguousarray(numbers), name=f"{name}.{kind}")), tape.initializer(scales)


def _multiply_portable(
    tape: Tape, node: ir.Node, weight: tuple[ir.Value, ...], kind: Quantized, shape: tuple[int, ...]
) -> ir.Value:
    back = tape.op("DequantizeLinear", [*weight], {"axis": 0, "block_size": _BLOCK})
    return tape.op("MatMul", [input_of(node, 0), back])


def _replace(graph: ir.Graph, node: ir.Node, tape: Tape, product: ir.Value) -> None:
    bias = optional_input(node, 2)
    new = product if bias is None else tape.op("Add", [product, bias])
    for made in tape.nodes:
        made.name = f"{node.name}/{made.op_type}"
    for initializer in tape.initializers:
        graph.initializers[str(initializer.name)] = initializer
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    new.shape, new.type, new.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
