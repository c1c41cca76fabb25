"""Lower one placeholder alone and run it in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sparsify.passes.lower_onnx.lower_placeholders import lower_placeholders


def _value(name: str, array: np.ndarray, stored: bool) -> ir.Value:
    dtype = ir.DataType.from_numpy(array.dtype)
    # Graph inputs have free sizes, as tokens have in a model.
    shape = ir.Shape(array.shape if stored else [f"{name}_{i}" for i in range(array.ndim)])
    return ir.Value(
        name=name, shape=shape, type=ir.TensorType(dtype), const_value=ir.Tensor(array, name=name) if stored else None
    )


@pytest.fixture
def placeholder_model() -> Callable[..., ir.Model]:
    """Makes a model that is one placeholder; values whose names hold "proj" or "bias" are stored in it."""

    def make(
        op: str,
        inputs: Mapping[str, np.ndarray | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[np.dtype | type],
    ) -> ir.Model:
        values = {
            name: None if array is None else _value(name, array, "proj" in name or "bias" in name)
            for name, array in inputs.items()
        }
        attributes = {"layer": "ffn", **attributes}
        node = ir.node(op, list(values.values()), attributes, domain="sparsify", num_outputs=len(outputs), version=1)
        for i, (value, dtype) in enumerate(zip(node.outputs, outputs, strict=True)):
            value.name, value.type = f"y{i}", ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
            # Rows first, then (of a dispatch) vectors.
            value.shape = ir.Shape([f"y{i}_{dim}" for dim in range(1 if i else 2)])
        present = [value for value in values.values() if value is not None]
        graph = ir.Graph(
            inputs=[value for value in present if value.const_value is None],
            outputs=node.outputs,
            nodes=[node],
            initializers=[value for value in present if value.const_value is not None],
            opset_imports={"": 20, "sparsify": 1},
            name="main",
        )
        return ir.Model(graph, ir_version=10)

    return make


@pytest.fixture
def run_placeholder(placeholder_model: Callable[..., ir.Model]) -> Callable[..., list[np.ndarray]]:
    """Makes such a model, lowers it, checks it, and runs it."""

    def run(
        op: str,
        inputs: Mapping[str, np.ndarray | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[np.dtype | type] = (np.float32,),
    ) -> list[np.ndarray]:
        model = placeholder_model(op, inputs, attributes, outputs)
        lower_placeholders(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {name: array for name, array in inputs.items() if name in {i.name for i in session.get_inputs()}}
        return [np.asarray(output) for output in session.run(None, feeds)]

    return run
