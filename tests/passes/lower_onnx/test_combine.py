"""`sparsify::Combine` in onnxruntime against float64 numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sparsify.passes.lower_onnx.lower_placeholders import lower_placeholders

D = 17


@pytest.mark.parametrize("unit_weights", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 2e-3)])
def test_equals_numpy(
    run_placeholder, dtype: type, tolerance: float, tokens: int, top_k: int, unit_weights: int
) -> None:
    """Rows go back to their tokens and are added with their weights."""
    rng = np.random.default_rng(tokens + top_k)
    rows = rng.standard_normal((tokens * top_k, D)).astype(dtype)
    weights = (np.ones((tokens, top_k)) if unit_weights else rng.random((tokens, top_k)) + 0.1).astype(dtype)
    order = rng.permutation(tokens * top_k).astype(np.int64)
    attributes = {"top_k": top_k, "unit_weights": unit_weights}
    inputs = {"rows": rows, "weights": weights, "order": order}
    (y,) = run_placeholder("Combine", inputs, attributes, (dtype,))

    by_slot = rows[np.argsort(order)].reshape(tokens, top_k, D).astype(np.float64)
    expected = (by_slot * weights.astype(np.float64)[..., None]).sum(1)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


def test_adds_halves_in_full_precision(placeholder_model) -> None:
    """2048 + 1 + 1 is 2048 when added in fp16; onnxruntime's CPU kernels add in fp32 by themselves, others may not."""
    inputs = {"rows": np.ones((3, 1), np.float16), "weights": np.ones((1, 3), np.float16), "order": np.arange(3)}
    model = placeholder_model("Combine", inputs, {"top_k": 3, "unit_weights": 1}, (np.float16,))
    lower_placeholders(model)
    (total,) = [node for node in model.graph if node.op_type == "ReduceSum"]
    before, after = total.predecessors()[0], total.successors()[0]
    assert (before.op_type, before.attributes["to"].as_int()) == ("Cast", ir.DataType.FLOAT)
    assert (after.op_type, after.attributes["to"].as_int()) == ("Cast", ir.DataType.FLOAT16)
