"""Constants and stored weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape

from sparsify.errors import ExportError
from sparsify.passes.lower_onnx.values import constant, dtype_of, experts_of, input_of, optional_input, stored


def test_slices_are_views() -> None:
    """A copy of every expert would double the memory that an export takes."""
    array = np.zeros((3, 4, 5), np.float32)
    stacked = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.Tensor(array, name="w"))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    slices = experts_of(Tape(), stacked, graph)
    assert [value.name for value in slices] == ["w.0", "w.1", "w.2"]
    assert all(np.shares_memory(stored(value), array) for value in slices)


def test_constants_keep_their_rank() -> None:
    """Div takes a scalar, Reshape a vector."""
    tape = Tape()
    constant(tape, 3)
    constant(tape, [3])
    scalar, vector = (node.attributes for node in tape.nodes)
    assert scalar["value_int"].as_int() == 3
    assert list(vector["value_ints"].as_ints()) == [3]


def test_a_missing_input_is_named() -> None:
    """A placeholder that lost an input is a defect of ours; the message says where."""
    node = ir.node("Dispatch", [None], domain="sparsify")
    with pytest.raises(ExportError, match="input 0 of sparsify::Dispatch is missing"):
        input_of(node, 0)
    assert optional_input(node, 0) is None
    assert optional_input(node, 5) is None
    with pytest.raises(ExportError, match="element type of x"):
        dtype_of(ir.Value(name="x"))
