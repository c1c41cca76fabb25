"""`com.microsoft::MoE` as we feed it, in onnxruntime against float64 numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sparsify.passes.lower_onnx.lower_placeholders import lower_placeholders
from sparsify.passes.lower_onnx.runtime import open_session, run_session

E = 5
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda a: np.maximum(a, 0),
    "silu": lambda a: a / (1 + np.exp(-a)),
    "identity": lambda a: a,
    "gelu": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "swiglu": lambda a: a / (1 + np.exp(-a)),
}


def _inputs(tokens: int, top_k: int, hidden: int, size: int, gated: bool, biases: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    inputs: dict[str, Any] = {
        "x": normal(tokens, hidden),
        "ids": np.argsort(rng.random((tokens, E)), axis=1)[:, :top_k].astype(np.int64),
        "weights": (rng.random((tokens, top_k)) * 3 + 0.1).astype(np.float32),
        "down_proj": normal(E, hidden, size),
        "down_bias": normal(E, hidden) if "down" in biases else None,
        "up_proj": normal(E, size, hidden),
        "up_bias": normal(E, size) if "up" in biases else None,
    }
    if gated:
        inputs |= {"gate_proj": normal(E, size, hidden), "gate_bias": normal(E, size) if "gate" in biases else None}
    return inputs


def _expected(inputs: dict[str, Any], activation: str, unit_weights: bool) -> np.ndarray:
    wide: dict[str, Any] = {name: None if a is None else a.astype(np.float64) for name, a in inputs.items()}

    def linear(x: np.ndarray, role: str, e: int) -> np.ndarray:
        bias = wide[f"{role}_bias"]
        return wide[f"{role}_proj"][e] @ x + (0 if bias is None else bias[e])

    y = np.zeros_like(wide["x"])
    act = _ACTIVATIONS[activation]
    for t, k in np.ndindex(*inputs["ids"].shape):
        e, x = int(inputs["ids"][t, k]), wide["x"][t]
        up = linear(x, "up", e)
        hidden = act(linear(x, "gate", e)) * up if "gate_proj" in wide else act(up)
        y[t] += (1.0 if unit_weights else wide["weights"][t, k]) * linear(hidden, "down", e)
    return y


def _check(run_placeholder, inputs: dict[str, Any], activation: str, unit_weights: int) -> None:
    top_k = inputs["ids"].shape[1]
    attributes = {"num_experts": E, "top_k": top_k, "activation": activation, "unit_weights": unit_weights}
    (y,) = run_placeholder("MoE", inputs, attributes)
    expected = _expected(inputs, activation, bool(unit_weights))
    assert y.shape == expected.shape
    assert not y.size or np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("unit_weights", [0, 1])
@pytest.mark.parametrize("sizes", [(17, 11), (13, 13)])
@pytest.mark.parametrize("activation", list(_ACTIVATIONS))
def test_equals_numpy(run_placeholder, activation: str, sizes: tuple[int, int], unit_weights: int) -> None:
    """Unequal weights, biases and K < E: wrong probabilities, a swapped gate or an unweighted bias would show.

    D = M is there because the op accepts a wrong weight layout then.
    """
    inputs = _inputs(7, 2, *sizes, activation == "swiglu", "up gate down")
    _check(run_placeholder, inputs, activation, unit_weights)


def test_survives_the_reuse_of_its_input(placeholder_model) -> None:
    """Inside a model the input is no graph input, and onnxruntime may write the output of the op over it.

    The kernel before 1.32 is wrong then, unless it normalises; a test of the op alone cannot see it.
    """
    inputs = _inputs(7, 2, 17, 11, False, "up down")
    attributes = {"num_experts": E, "top_k": 2, "activation": "relu", "unit_weights": 0}
    model = placeholder_model("MoE", inputs, attributes, (np.float32,))
    placeholder = model.graph[0]
    doubled = ir.node("Add", [placeholder.inputs[0], placeholder.inputs[0]])
    model.graph.insert_before(placeholder, doubled)
    doubled.outputs[0].dtype = ir.DataType.FLOAT
    placeholder.replace_input_with(0, doubled.outputs[0])
    lower_placeholders(model)
    session, _ = open_session(ir.to_proto(model).SerializeToString(), Path(), cuda=False)
    feeds = {name: torch.from_numpy(inputs[name]) for name in ("x", "ids", "weights")}
    (y,) = run_session(session, ["y0"], feeds)
    inputs["x"] = 2 * inputs["x"]
    expected = _expected(inputs, "relu", unit_weights=False)
    assert np.abs(y.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("biases", ["", "up", "gate", "down", "gate down"])
@pytest.mark.parametrize("gated", [True, False])
def test_biases_are_optional(run_placeholder, gated: bool, biases: str) -> None:
    """A missing bias leaves a gap in the inputs of the op, and half a gated pair is filled with zeros."""
    _check(run_placeholder, _inputs(7, 2, 17, 11, gated, biases), "swiglu" if gated else "silu", 1)


@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [1, E])
def test_extreme_sizes(run_placeholder, tokens: int, top_k: int) -> None:
    """No token, one token, one expert and all experts."""
    _check(run_placeholder, _inputs(tokens, top_k, 17, 11, False, "up down"), "relu", 0)
