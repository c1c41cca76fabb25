"""`ai.sparsify::Route` in onnxruntime, against a perceptron in fp64.

T tokens, D features, H neurons, E experts.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsify.cpu.blocks import in_blocks
from sparsify.cpu.kernel import kernel_status
from sparsify.cpu.onnx_library import onnx_ops_library

pytestmark = pytest.mark.skipif(not kernel_status().available, reason=kernel_status().reason)

NAMES = ["hidden", "hidden_bias", "output", "output_bias"]


def make(hidden_size: int, neurons: int, experts: int) -> dict[str, np.ndarray]:
    """Random weights by name, `[N, M]`, and biases `[1, N]`."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    values = normal(neurons, hidden_size), normal(1, neurons), normal(experts, neurons), normal(1, experts)
    return dict(zip(NAMES, values, strict=True))


def in_file(name: str, array: np.ndarray) -> np.ndarray:
    """Weights of two dimensions in blocks; others as they are."""
    is_weight = not name.endswith("bias") and array.ndim == 2
    return in_blocks(torch.from_numpy(array).unsqueeze(0)).numpy() if is_weight else array


def run(x: np.ndarray, top_k: int, weights: dict[str, np.ndarray], threads: int = 2) -> np.ndarray:
    """A session with one node; a weight that is not there is left out."""
    inputs = ["x", *(name if name in weights else "" for name in NAMES)]
    node = helper.make_node("Route", inputs, ["ids"], domain="ai.sparsify", top_k=top_k)
    fed = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * x.ndim)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [None, None])
    stored = [numpy_helper.from_array(in_file(name, array), name) for name, array in weights.items()]
    graph = helper.make_graph([node], "router", [fed], [ids], stored)
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("ai.sparsify", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(onnx_ops_library())
    file = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def logits(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """`[T, E]` in fp64."""
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    hidden = np.maximum(x @ wide["hidden"].T + wide.get("hidden_bias", 0), 0)
    return hidden @ wide["output"].T + wide.get("output_bias", 0)


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "neurons", "experts", "top_k"),
    # none, one, a tile, more; odd sizes; half, several and padded blocks; K = 1 and K = E; many tokens for two threads
    [(0, 7, 5, 3, 2), (1, 64, 64, 16, 4), (6, 37, 8, 8, 8), (7, 101, 67, 131, 34), (53, 9, 130, 5, 1), (1, 1, 1, 1, 1),
     (700, 96, 64, 180, 34)],
)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_takes_the_largest(tokens: int, hidden_size: int, neurons: int, experts: int, top_k: int, threads: int) -> None:
    """Protects: tails of every dimension, the order of the slots, and no expert twice."""
    x = np.random.default_rng(1).standard_normal((tokens, hidden_size)).astype(np.float32)
    weights = make(hidden_size, neurons, experts)
    ids, expected = run(x, top_k, weights, threads), logits(x, weights)
    assert ids.shape == (tokens, top_k)
    assert ids.dtype == np.int64
    assert all(len(set(row)) == top_k for row in ids.tolist())
    chosen = np.take_along_axis(expected, ids, 1)
    best = -np.sort(-expected, axis=1)[:, :top_k]
    np.testing.assert_allclose(chosen, best, rtol=0, atol=1e-5)  # of two that are that near either may be first


@pytest.mark.parametrize("experts", [6, 16, 45])
@pytest.mark.parametrize("values", [[-1e30, -1, -0.0, 0, 2, 1e30], [3], [0, 1e-40, np.inf, -np.inf]])
def test_equal_logits_are_taken_in_order(experts: int, values: list[float]) -> None:
    """Protects: the same choice everywhere; no number depends on where a tile or a vector ends; -0 is 0."""
    weights = make(5, 4, experts)
    weights["hidden"][:], weights["hidden_bias"][:] = 0, -1
    weights["output"][:] = -1  # of hidden values that are 0, so that -0 stays what it is
    weights["output_bias"][:] = np.random.default_rng(0).choice(values, experts)
    expected = np.argsort(-weights["output_bias"][0], kind="stable").tolist()
    for top_k in (1, 5, experts - 1, experts):
        assert run(np.ones((9, 5), np.float32), top_k, weights).tolist() == [expected[:top_k]] * 9


def test_without_biases() -> None:
    """Protects: an input that is left out is no bias of the one before."""
    x = np.random.default_rng(1).standard_normal((9, 12)).astype(np.float32)
    weights = {name: array for name, array in make(12, 16, 8).items() if not name.endswith("bias")}
    assert run(x, 3, weights).tolist() == np.argsort(-logits(x, weights), axis=1)[:, :3].tolist()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("hidden", np.ones((64, 36), np.float32), r"hidden must be \[1, B, D, b\]"),
        ("hidden", np.ones((2, 1, 37, 64), np.float32), r"hidden must be \[1, B, D, b\]"),
        ("hidden_bias", np.ones((1, 65), np.float32), r"hidden must be \[1, B, D, b\], its bias \[1, H\]"),
        ("hidden_bias", np.ones(64, np.float32), r"hidden must be \[1, B, D, b\], its bias \[1, H\]"),
        ("output", np.ones((5, 63), np.float32), r"output must be \[1, C, H, c\]"),
        ("output_bias", np.ones((1, 66), np.float32), r"output must be \[1, C, H, c\], its bias \[1, E\]"),
    ],
)
def test_refuses_what_does_not_fit(name: str, array: np.ndarray, message: str) -> None:
    """Protects: the kernel reads by raw pointers, so wrong shapes are an error and no read beyond an array."""
    with pytest.raises(Exception, match=message):
        run(np.ones((3, 37), np.float32), 2, make(37, 64, 5) | {name: array})


@pytest.mark.parametrize(("top_k", "message"), [(6, "top_k must be at most E"), (0, "top_k must be at least 1")])
def test_refuses_a_number_that_cannot_be(top_k: int, message: str) -> None:
    """Protects: nothing is written beyond the ids."""
    with pytest.raises(Exception, match=message):
        run(np.ones((3, 37), np.float32), top_k, make(37, 64, 5))


def test_refuses_tokens_in_sequences() -> None:
    """Protects: x has two dimensions."""
    with pytest.raises(Exception, match=r"x must be \[T, D\]"):
        run(np.ones((1, 3, 37), np.float32), 2, make(37, 64, 5))
