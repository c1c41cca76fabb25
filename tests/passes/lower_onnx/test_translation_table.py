"""A `torch.onnx.export` of the user's own, with our translations, runs in onnxruntime as PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F

from sparsify import SparseModel, onnx_translation_table
from sparsify.passes.fuse_moe import FuseMoEPass
from sparsify.passes.lower_onnx.runtime import open_session, run_session


def _squared_relu(z: torch.Tensor) -> torch.Tensor:
    return torch.relu(z).square()


def _tanh_gelu(z: torch.Tensor) -> torch.Tensor:
    return F.gelu(z, approximate="tanh")


def _check(sparse: SparseModel, path: Path) -> None:
    x = sparse.info.args[0]
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        sparse, (x,), path, dynamo=True, dynamic_shapes=(dims,), custom_translation_table=onnx_translation_table(),
        verbose=False,
    )  # fmt: skip
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain for opset in proto.opset_import} == {""}
    session, _ = open_session(path, path.parent, cuda=False)
    for batch, tokens in ((2, 3), (1, 1), (5, 7), (0, 3)):
        inputs = torch.randn(batch, tokens, x.shape[2])
        (found,) = run_session(session, [session.get_outputs()[0].name], {session.get_inputs()[0].name: inputs})
        expected = sparse(inputs)
        assert found.shape == expected.shape
        assert not found.numel() or (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"activation": F.gelu, "shared": 8},
        {"activation": _tanh_gelu, "bias": False},
        {"activation": _squared_relu, "top_k": 4},
        {"activation": F.silu, "gated": True, "top_k": 1, "out": 11},
    ],
)
def test_fused_layers(sparse_layer: Callable[..., SparseModel], tmp_path: Path, options: dict[str, Any]) -> None:
    """Protects: the op that a converted model calls, with every activation, other shapes, and no token at all."""
    sparse = sparse_layer(**options)
    assert FuseMoEPass()(sparse).modified
    sparse.eval().recompile()
    _check(sparse, tmp_path / "model.onnx")


def test_chains_with_unused_slots(
    sparse_layer: Callable[..., SparseModel], skipping_router: Any, tmp_path: Path
) -> None:
    """Protects: the three ops of a layer that no fused op knows, and ids of -1 in both forms."""
    options = {"out": 11, "size": 7}
    _check(sparse_layer(router=skipping_router(), vector=True, **options).eval(), tmp_path / "chain.onnx")
    fused = sparse_layer(router=skipping_router(), **options)
    assert FuseMoEPass()(fused).modified
    fused.eval().recompile()
    _check(fused, tmp_path / "fused.onnx")
