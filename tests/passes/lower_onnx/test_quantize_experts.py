"""Quantised experts: the numbers that are stored, what they cost, and what is left as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator

from sparsify.errors import VerificationError
from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.lower_onnx.lowerings import Lowering, Target
from sparsify.passes.lower_onnx.quantize_experts import Quantized
from sparsify.passes.verify_onnx import verify_onnx
from sparsify.sparse_model import SparseModel

Make = Callable[..., SparseModel]
# Hidden sizes of 40 and 12: the last block of 32 is not full.
LAYER: dict[str, Any] = {"hidden": 40, "size": 12, "activation": F.gelu}
WHOLE_BLOCKS: dict[str, Any] = {"size": 32}  # a layer that is one product rounds across its experts
LARGEST = {"int8": 127, "int4": 7}


def _rounded(weight: torch.Tensor, largest: int) -> torch.Tensor:
    """`[..., M]`, by blocks of 32 along M."""
    parts: list[torch.Tensor] = []
    for block in weight.split(32, dim=-1):
        scale = block.abs().amax(-1, keepdim=True) / largest
        parts.append((block / scale).round() * scale)
    return torch.cat(parts, -1)


@pytest.mark.parametrize(
    ("kind", "target", "lowering", "options"),
    [
        ("int8", "ort-cpu", "expert_chain", {}),
        ("int4", "ort-cpu", "sorted_split", {"gated": True, "activation": F.silu, "bias": False}),
        ("int4", "ort-cpu", "dense_masked", WHOLE_BLOCKS),
        ("int8", "portable", "dense_masked", WHOLE_BLOCKS | {"shared": 8}),
        ("int4", "portable", "expert_chain", {}),
    ],
)
def test_computes_with_rounded_weights(
    sparse_layer: Make, tmp_path: Path, kind: Quantized, target: Target, lowering: Lowering, options: dict[str, Any]
) -> None:
    """Protects: every expert weight is rounded as said, none twice or not at all, and no other weight is touched.

    Exact in the reference evaluator, which does not round the rows; within 2 % in onnxruntime, which does.
    """
    sparse, path = sparse_layer(**LAYER | options), tmp_path / "model.onnx"
    report = export_onnx(sparse, path, target=target, lowering=lowering, quantize_experts=kind, opset=21)
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-5
    assert report.quantized is not None
    assert report.quantized.error is not None
    assert report.quantized.error.output_error <= (0.02 if kind == "int8" else 0.2)
    assert 0 < report.quantized.weight_error <= (0.01 if kind == "int8" else 0.1)
    assert report.quantized.error.same_experts == 1  # one layer: its router reads what it read before
    assert f"experts in {kind}: weights off by" in str(report)
    assert json.loads(json.dumps(report.to_json()))["quantized"]["kind"] == kind

    with torch.no_grad():
        for name, weight in sparse.named_parameters():
            if "experts." in name and name.endswith("proj"):
                weight.copy_(_rounded(weight, LARGEST[kind]))
        x = torch.randn(3, 5, 40)
        expected = sparse(x).numpy()
    found = _run(path, x.numpy(), target)
    assert np.abs(found - expected).max() <= (1e-5 if target == "portable" else 0.02) * np.abs(expected).max()


def _run(path: Path, x: np.ndarray, target: Target) -> np.ndarray:
    if target == "portable":
        (y,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    else:
        (y,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    return np.asarray(y)


def test_the_file_shrinks_and_cannot_pass_for_an_exact_one(sparse_transformer: Make, tmp_path: Path) -> None:
    """Protects: no full-precision copy stays in the file, whose nodes keep their place, and no receipt is given."""
    sparse, path = sparse_transformer(vocabulary=100, hidden=64, size=64), tmp_path / "model.onnx"
    full = export_onnx(sparse, path, lowering="expert_chain", verify=False).file_bytes
    report = export_onnx(sparse, path, lowering="expert_chain", quantize_experts="int4", verify=False)
    experts = sum(p.numel() for name, p in sparse.named_parameters() if "experts." in name and name.endswith("proj"))
    assert full - report.file_bytes > 0.8 * experts * (4 - 0.5 - 4 / 32)  # bytes: fp32, int4, a scale for 32
    assert report.quantized is not None
    assert report.quantized.error is None
    products = [node for node in onnx.load(str(path)).graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 2 * 4  # layers, products, experts
    assert {node.name.split("/experts")[0] for node in products} == {"/layers.0", "/layers.1"}
    with pytest.raises(VerificationError, match="are int4, so its outputs differ"):
        verify_onnx(sparse, path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantize_experts": "int2"}, "must be one of int8, int4"),
        ({"quantize_experts": "int8", "target": "portable"}, "need opset 21 or later"),
        ({"quantize_experts": "int8", "lowering": "moe_op"}, "takes no quantised weights"),
    ],
)
def test_refuses_what_cannot_work(sparse_layer: Make, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    """Protects: a wrong wish is told at once, before any work."""
    with pytest.raises(ValueError, match=reason):
        export_onnx(sparse_layer(), tmp_path / "model.onnx", **options)
