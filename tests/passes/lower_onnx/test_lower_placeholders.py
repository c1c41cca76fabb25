"""The lowered model as a whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsify.passes.lower_onnx.lower_placeholders import lower_placeholders


def _moe(ids: np.ndarray) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((3, 8)).astype(np.float32),
        "ids": ids,
        "weights": np.ones(ids.shape, np.float32),
        "down_proj": rng.standard_normal((4, 8, 6)).astype(np.float32),
        "down_bias": None,
        "up_proj": rng.standard_normal((4, 6, 8)).astype(np.float32),
        "up_bias": None,
    }


def test_imports_what_it_uses_and_nothing_else(placeholder_model) -> None:
    """Onnxruntime refuses com.microsoft above version 1, and knows no domain of ours."""
    attributes = {"num_experts": 4, "top_k": 2, "activation": "relu", "unit_weights": 1}
    model = placeholder_model("MoE", _moe(np.zeros((3, 2), np.int64)), attributes, (np.float32,))
    lower_placeholders(model)
    assert dict(model.opset_imports) == {"": 20, "com.microsoft": 1}
    assert [output.name for output in model.graph.outputs] == ["y0"]


def test_sites_that_share_a_weight_share_its_slices(placeholder_model) -> None:
    """One expert bank read at many places (ALBERT) is stored once."""
    inputs = {
        "rows": np.zeros((4, 5), np.float32),
        "proj": np.random.default_rng(0).standard_normal((4, 5, 5)).astype(np.float32),
        "bias": None,
        "tokens_per_expert": np.ones(4, np.int64),
    }
    model = placeholder_model("ExpertLinear", inputs, {"num_parts": 4}, (np.float32,))
    first = model.graph[0]
    again = [first.outputs[0], *first.inputs[1:]]
    second = ir.node("ExpertLinear", again, {"num_parts": 4, "layer": "ffn"}, domain="sparsify")
    second.outputs[0].name, second.outputs[0].type = "again", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    lower_placeholders(model)
    weights = [node.inputs[1] for node in model.graph if node.op_type == "Gemm"]
    assert weights[:4] == weights[4:]
    assert sorted(name for name in model.graph.initializers if "proj" in name) == [f"proj.{e}" for e in range(4)]


def test_small_numbers_are_stored_once_and_shapes_are_noted(placeholder_model) -> None:
    """Protects: the time to load a file, which grows with its nodes and with the shapes that are left to find."""
    attributes = {"num_experts": 4, "num_parts": 4, "top_k": 2}
    inputs = {"x": np.zeros((3, 8), np.float32), "ids": np.zeros((3, 2), np.int64)}
    model = placeholder_model("Dispatch", inputs, attributes, (np.float32, np.int64, np.int32, np.int64))
    lower_placeholders(model)
    assert "Constant" not in {node.op_type for node in model.graph}
    stored = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value]
    assert len(stored) == len({(array.shape, array.tobytes()) for array in stored})
    assert all(output.shape is not None for node in model.graph for output in node.outputs if output.name)
