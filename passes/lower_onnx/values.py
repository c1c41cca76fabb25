"""Constants and stored weights, for the lowerings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsify.errors import ExportError


def constant(tape: Tape, value: int | Sequence[int]) -> ir.Value:
    """An int64 scalar, or vector for a sequence."""
    attribute = {"value_int": value} if isinstance(value, int) else {"value_ints": list(value)}
    return tape.op("Constant", [], attribute)


def filled(tape: Tape, shape: ir.Value, number: float, dtype: ir.DataType) -> ir.Value:
    """A tensor of one number; `shape` is an int64 vector, known at run time."""
    value = ir.tensor(np.array([number], dtype=dtype.numpy()), dtype=dtype)
    return tape.op("ConstantOfShape", [shape], {"value": value})


def stored(value: ir.Value) -> np.ndarray:
    """The content of a weight, without a copy.

    Raises:
        ExportError: the value is computed at run time.
    """
    if value.const_value is None:
        raise ExportError(f"the expert weight {value.name} is computed at run time; only stored weights can be lowered")
    return value.const_value.numpy()


def experts_of(tape: Tape, stacked: ir.Value, graph: ir.Graph) -> list[ir.Value]:
    """One initializer an expert, each a slice of the stacked `[E, ...]`; sites that share a weight share them too."""
    return [expert_of(tape, stacked, graph, e) for e in range(len(stored(stacked)))]


def expert_of(tape: Tape, stacked: ir.Value, graph: ir.Graph, expert: int) -> ir.Value:
    """One of `experts_of`."""
    return _initializer(tape, graph, f"{stacked.name}.{expert}", stored(stacked)[expert], dtype_of(stacked))


def packed(tape: Tape, graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """An initializer with a name of its own; the one of that name if it is there already."""
    return _initializer(tape, graph, name, array, dtype)


def dtype_of(value: ir.Value) -> ir.DataType:
    """The element type, which every value of an exported graph has."""
    if value.dtype is None:
        raise ExportError(f"the element type of {value.name} is not known; report this model")
    return value.dtype


def input_of(node: ir.Node, index: int) -> ir.Value:
    """A required input.

    Raises:
        ExportError: it is missing.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise ExportError(f"input {index} of {node.domain}::{node.op_type} is missing")
    return value


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out, at the end or in between."""
    return node.inputs[index] if index < len(node.inputs) else None


def _initializer(tape: Tape, graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    known = graph.initializers.get(name) or next((v for v in tape.initializers if v.name == name), None)
    return known or tape.initializer(ir.Tensor(array, dtype=dtype, name=name))
