"""`sparsify::ExpertLinear` in onnxruntime against float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_ir import DataType

from sparsify.errors import ExportError
from sparsify.passes.lower_onnx.lower_placeholders import lower_placeholders


def _inputs(counts: list[int], features: tuple[int, int], bias: bool, dtype: type) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    out, hidden = features
    return {
        "rows": rng.standard_normal((sum(counts), hidden)).astype(dtype),
        "proj": rng.standard_normal((4, out, hidden)).astype(dtype),
        "bias": rng.standard_normal((4, out)).astype(dtype) if bias else None,
        "tokens_per_expert": np.array(counts, np.int64),
    }


def _expected(inputs: dict[str, Any]) -> np.ndarray:
    rows, weight, counts = (inputs[name].astype(np.float64) for name in ("rows", "proj", "tokens_per_expert"))
    bias = inputs["bias"]
    out = np.zeros((len(rows), weight.shape[1]))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    for e in range(len(weight)):
        part = slice(starts[e], starts[e + 1])
        out[part] = rows[part] @ weight[e].T + (0 if bias is None else bias[e])
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [(11, 17), (17, 11), (13, 13)])
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 0, 0], [0, 13, 0, 0], [2, 1, 0, 3, 5], [0, 0, 0, 0, 4]])
def test_equals_numpy(run_placeholder, counts: list[int], features: tuple[int, int], bias: bool) -> None:
    """Every expert applies its own weight and bias, experts without tokens none, and unused rows become zero."""
    inputs = _inputs(counts, features, bias, np.float32)
    (out,) = run_placeholder("ExpertLinear", inputs, {"num_parts": len(counts)})
    np.testing.assert_allclose(out, _expected(inputs), rtol=1e-5, atol=1e-5)
    if len(counts) > 4:
        assert not out[sum(counts[:4]) :].any()


def test_stores_every_expert_once(placeholder_model) -> None:
    """The stacked weight would double the file if it stayed beside its slices."""
    inputs = _inputs([1, 2, 3, 4], (11, 17), True, np.float32)
    model = placeholder_model("ExpertLinear", inputs, {"num_parts": 4}, (np.float32,))
    lower_placeholders(model)
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert stored == inputs["proj"].nbytes + inputs["bias"].nbytes
    assert not any(node.op_type in ("Slice", "Transpose") for node in model.graph)


def test_keeps_half_precision(run_placeholder) -> None:
    """The zero rows of unused slots have the dtype of the others, else Concat refuses them."""
    inputs = _inputs([2, 1, 0, 3, 5], (11, 17), False, np.float16)
    (out,) = run_placeholder("ExpertLinear", inputs, {"num_parts": 5}, (np.float16,))
    assert DataType.from_numpy(out.dtype) == DataType.FLOAT16
    np.testing.assert_allclose(out, _expected(inputs), rtol=1e-2, atol=3e-2)


def test_refuses_a_weight_that_is_computed(placeholder_model) -> None:
    """Slicing at run time would be slow in silence."""
    inputs = _inputs([1, 2, 3, 4], (11, 17), False, np.float32)
    inputs["computed"] = inputs.pop("proj")
    inputs = {name: inputs[name] for name in ("rows", "computed", "bias", "tokens_per_expert")}
    model = placeholder_model("ExpertLinear", inputs, {"num_parts": 4}, (np.float32,))
    with pytest.raises(ExportError, match="computed is computed at run time"):
        lower_placeholders(model)
