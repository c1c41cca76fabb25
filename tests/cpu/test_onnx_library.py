"""`ai.sparsify::MoE` in onnxruntime, against the loop over experts in fp64.

T tokens, K slots, E experts, D and N features, M neurons of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsify.cpu import build, onnx_library
from sparsify.cpu.blocks import in_blocks
from sparsify.cpu.kernel import kernel_status
from sparsify.cpu.onnx_library import onnx_ops_library
from sparsify.errors import ExportError
from sparsify.kernels.reference import ACTIVATIONS, moe_ffn_reference

pytestmark = pytest.mark.skipif(not kernel_status().available, reason=kernel_status().reason)

NAMES = ["x", "ids", "routing", "up", "up_bias", "gate", "gate_bias", "down", "down_bias", "bias", "added"]
WEIGHTS = ["up", "gate", "down"]


@dataclass(frozen=True)
class Op:
    """One node and its inputs, by name; what is not there is left out."""

    activation: str
    inputs: dict[str, np.ndarray] = field(default_factory=lambda: {})
    in_rows: tuple[str, ...] = ()

    def without(self, *names: str) -> Op:
        return replace(self, inputs={name: array for name, array in self.inputs.items() if name not in names})

    def with_input(self, name: str, array: np.ndarray) -> Op:
        return replace(self, inputs=self.inputs | {name: array})

    def stored(self, name: str) -> np.ndarray:
        """As the file holds it."""
        array = self.inputs[name]
        lies_in_blocks = name in WEIGHTS and array.ndim == 3 and name not in self.in_rows
        return in_blocks(torch.from_numpy(array)).numpy() if lies_in_blocks else array

    def file(self) -> bytes:
        inputs = [name if name in self.inputs else "" for name in NAMES]
        node = helper.make_node("MoE", inputs, ["y"], domain="ai.sparsify", activation=self.activation)
        fed = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.inputs[name].dtype), [None, None])
            for name in NAMES[:3]
            if name in self.inputs
        ]
        stored = [numpy_helper.from_array(self.stored(name), name) for name in NAMES[3:] if name in self.inputs]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])]
        graph = helper.make_graph([node], "layer", fed, outputs, stored)
        versions = [helper.make_opsetid("", 20), helper.make_opsetid("ai.sparsify", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()

    def run(self, threads: int = 2) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        options.register_custom_ops_library(onnx_ops_library())
        session = onnxruntime.InferenceSession(self.file(), options, providers=["CPUExecutionProvider"])
        feeds = {name: self.inputs[name] for name in NAMES[:3] if name in self.inputs}
        return np.asarray(session.run(None, feeds)[0])

    def expected(self) -> np.ndarray:
        wide: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.inputs.items()}
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in wide.items()}
        routing = wide.get("routing", torch.ones(wide["ids"].shape, dtype=torch.float64))
        up, up_bias, gate, gate_bias, down, down_bias = (wide.get(name) for name in NAMES[3:9])
        assert up is not None
        assert down is not None
        weights = (up, up_bias, gate, gate_bias, down, down_bias)
        y = moe_ffn_reference(wide["x"], routing, wide["ids"], *weights, self.activation)
        return (y + wide.get("bias", 0) + wide.get("added", 0)).numpy()

    def check(self, threads: int = 2) -> None:
        y, expected = self.run(threads), self.expected()
        assert y.shape == expected.shape
        assert not y.size or np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


def make(tokens: int = 53, top_k: int = 2, sizes: tuple[int, ...] = (5, 37, 19, 23), activation: str = "gelu") -> Op:
    """All inputs; `sizes` are E, D, M and N."""
    num_experts, hidden, width, outputs = sizes
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    up, down = (num_experts, width, hidden), (num_experts, outputs, width)
    return Op(
        activation,
        {
            "x": 3 * normal(tokens, hidden),
            "ids": random.random((tokens, num_experts)).argsort(1)[:, :top_k].astype(np.int64),
            "routing": random.random((tokens, top_k)).astype(np.float32) + 0.5,
            "up": normal(*up),
            "up_bias": normal(*up[:2]),
            "gate": normal(*up),
            "gate_bias": normal(*up[:2]),
            "down": normal(*down),
            "down_bias": normal(*down[:2]),
            "bias": normal(outputs),
            "added": normal(tokens, outputs),
        },
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "missing",
    [(), ("gate", "gate_bias"), ("routing",), ("up_bias", "gate_bias", "down_bias"), ("bias",), ("bias", "added")],
)
def test_equals_the_reference(activation: str, missing: tuple[str, ...]) -> None:
    """Protects: each input reaches its place, by itself and left out, under the name of its activation."""
    make(activation=activation).without(*missing).check()


@pytest.mark.parametrize("missing", [(), ("gate", "gate_bias")])
@pytest.mark.parametrize("tokens", [3, 211])
def test_projections_in_rows(tokens: int, missing: tuple[str, ...]) -> None:
    """Protects: those of few neurons may lie as they are; the same result as in blocks, as older files have them."""
    op = make(tokens, sizes=(5, 37, 8, 23)).without(*missing)
    op.check()
    rows = replace(op, in_rows=("up", "gate"))
    rows.check()
    assert rows.stored("up").ndim == 3
    with pytest.raises(Exception, match=r"or \[E, M, D\] for few neurons"):
        replace(make(), in_rows=("up", "gate")).run()
    if not missing:
        with pytest.raises(Exception, match=r"gate_proj must be .* as up_proj"):
            replace(op, in_rows=("up",)).run()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize("tokens", [0, 1, 7, 211])
def test_awkward_sizes(tokens: int, top_k: int, threads: int) -> None:
    """Protects: no token, one, primes; one expert a token and all of them; one thread and two."""
    make(tokens, top_k).without("gate", "gate_bias").check(threads)


def test_large_layers_are_divided_among_threads() -> None:
    """Protects: whole segments, phase by phase, and the same bits with any number of threads."""
    for tokens in (2, 400):
        op = make(tokens, 2, (8, 128, 512, 128)).without("gate", "gate_bias")
        op.check()
        np.testing.assert_array_equal(op.run(1), op.run(2))


@pytest.mark.parametrize("width", [5, 131])
def test_many_tokens(width: int) -> None:
    """Protects: rows that are added find their tokens, by tokens and in several chunks of pairs."""
    make(2100, 2, (3, 9, width, 7)).check()


def test_unused_slots_and_empty_experts() -> None:
    """Protects: a slot of id -1 adds nothing whatever its weight, and experts without a token are no matter."""
    op = make(13, 3)
    ids = np.where(op.inputs["routing"] < 0.8, -1, op.inputs["ids"])
    ids[0] = -1
    op.with_input("ids", ids).check()
    op.with_input("ids", np.full((13, 3), 3)).check()


def test_experts_that_were_not_chosen_are_not_read() -> None:
    """Protects: skipping, which a time would not show for certain: NaN times zero would be NaN."""
    op = make().without("gate", "gate_bias")
    op = op.with_input("ids", op.inputs["ids"] % 3)
    expected = op.run()
    for name in ("up", "down", "down_bias"):
        poisoned = op.inputs[name].copy()
        poisoned[3:] = np.nan
        op = op.with_input(name, poisoned)
    np.testing.assert_array_equal(op.run(), expected)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("ids", np.full((53, 2), 5), r"an expert id is not in \[-1, E\)"),
        ("ids", np.full((53, 2), -2), r"an expert id is not in \[-1, E\)"),
        ("ids", np.zeros((52, 2), np.int64), r"expert_ids must be \[T, K\]"),
        ("routing", np.ones((53, 3), np.float32), r"routing_weights must be \[T, K\]"),
        ("routing", np.ones((53, 0), np.float32), r"routing_weights must be \[T, K\]"),
        ("x", np.ones((53, 36), np.float32), r"up_proj must be \[E, B, D, b\]"),
        ("up_bias", np.ones((5, 18), np.float32), r"up_proj must be .*, its bias"),
        ("gate", np.ones((4, 19, 37), np.float32), r"gate_proj must be \[E, B, D, b\]"),
        ("gate", np.ones((5, 2, 37, 10), np.float32), r"gate_proj must be .* as up_proj"),
        ("down", np.ones((5, 23, 20), np.float32), r"up_proj must be \[E, B, D, b\]"),
        ("down", np.ones((4, 23, 19), np.float32), r"down_proj must be \[E, C, M, c\]"),
        ("bias", np.ones(22, np.float32), r"bias must be \[N\]"),
        ("bias", np.ones((1, 23), np.float32), r"bias must be \[N\]"),
        ("added", np.ones((52, 23), np.float32), r"added must be \[T, N\]"),
        ("down_bias", np.ones((5, 24), np.float32), r"down_proj must be \[E, C, M, c\], its bias"),
    ],
)
def test_refuses_what_does_not_fit(name: str, array: np.ndarray, message: str) -> None:
    """Protects: the kernel reads by raw pointers, so wrong shapes and ids are an error and no read beyond an array."""
    with pytest.raises(Exception, match=message):
        make().with_input(name, array).run()


def test_refuses_an_unknown_activation() -> None:
    """Protects: a name of a later version is no other function."""
    with pytest.raises(Exception, match="activation must be relu"):
        make(activation="swish").run()


def test_says_why_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the reason and what to do, where a compiler is missing."""
    monkeypatch.setattr(onnx_library, "kernel_status", lambda: _NoKernel)
    with pytest.raises(ExportError, match=r"no C compiler.*install a C compiler"):
        onnx_ops_library()


class _NoKernel:
    available, reason = False, "no C compiler: cc not found"


def test_is_kept_where_the_cache_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects: without a cache folder the library lies elsewhere, and stays while the process runs."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(build, "cache_folder", lambda: blocked / "sparsify")
    onnx_library._kept.cache_clear()
    try:
        path = Path(onnx_ops_library())
        assert path.is_file()
        assert blocked not in path.parents
    finally:
        onnx_library._kept.cache_clear()
