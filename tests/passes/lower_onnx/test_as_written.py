"""Protects: a file that deviates by leave of the user is checked against a model that deviates alike, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F

from sparsify.errors import ExportError, VerificationError
from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.lower_onnx.as_written import as_written, deviation_of, flat_model
from sparsify.passes.lower_onnx.metadata import FileLayer
from sparsify.passes.verify_onnx import verify_onnx
from sparsify.sparse_model import SparseModel

Make = Callable[..., SparseModel]


def _names(path: Path) -> list[str]:
    return [node.name for node in onnx.load(str(path)).graph.node]


def test_a_dense_layer_is_the_one_with_all_experts_on(sparse_transformer: Make, tmp_path: Path) -> None:
    """Protects: no router is left, the report says how far outputs move, and the file can be verified later."""
    sparse = sparse_transformer(activation=F.gelu, gated=True)
    report = export_onnx(sparse, tmp_path / "model.onnx", lowering="dense")
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-5
    assert report.parity.tokens_checked == 0
    assert report.deviation is not None
    assert report.deviation > 1e-3
    assert "through what was allowed" in str(report)
    assert not any("router" in name or "dispatch" in name for name in _names(report.path))
    assert sum(name.startswith("/layers.1/dense/Gemm") for name in _names(report.path)) == 3
    assert verify_onnx(sparse, report.path).max_relative_error <= 1e-5

    layers = [FileLayer(name, "dense", "", "") for name in ("layers.0", "layers.1")]
    written = as_written(sparse, layers, {})
    for router in sparse.routers.values():
        router.top_k = router.num_experts
    assert deviation_of(flat_model(sparse), written) <= 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert_becomes_part_of_it(sparse_transformer: Make, tmp_path: Path, gated: bool) -> None:
    """Protects: a layer with a shared expert is as fast as the dense one it came from; one of another form stays."""
    sparse = sparse_transformer(shared=8, activation=F.gelu, gated=gated)  # the shared expert is not gated
    report = export_onnx(sparse, tmp_path / "model.onnx", lowering="dense")
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-5
    products = [node for node in onnx.load(str(report.path)).graph.node if node.op_type == "Gemm"]
    of_layer = [node.name for node in products if node.name.startswith("/layers.0/dense/")]
    assert len(of_layer) == (3 if gated else 2)
    assert len([node for node in products if "shared" in " ".join(node.input)]) == (4 if gated else 0)


def test_one_dense_layer_beside_one_that_routes(sparse_transformer: Make) -> None:
    """Protects: only the layers that the file holds so are merged; the others keep weights and routes."""
    sparse = sparse_transformer()
    flat = as_written(
        sparse, [FileLayer("layers.0", "dense", "", ""), FileLayer("layers.1", "expert_chain", "", "ids")], {}
    )
    routers = [node.target for node in flat.graph.find_nodes(op="call_module") if "router" in str(node.target)]
    assert routers == ["layers.1.router"]
    assert 1e-3 < deviation_of(flat_model(sparse), flat) < 1


def test_tanh_only_when_allowed(sparse_layer: Make, tmp_path: Path) -> None:
    """Protects: the op computes GELU by tanh; it passes the check at full precision, and never unasked."""
    sparse, path = sparse_layer(activation=F.gelu), tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="its GELU is the tanh form"):
        export_onnx(sparse, path, lowering="moe_op")
    report = export_onnx(sparse, path, lowering="moe_op", allow=["tanh_gelu"])
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-5
    assert report.deviation is not None
    assert 1e-5 < report.deviation < 1e-2
    assert verify_onnx(sparse, path).max_relative_error <= 1e-5
    down = next(parameter for name, parameter in sparse.named_parameters() if name.endswith("down_proj"))
    down.data.mul_(1.01)
    with pytest.raises(VerificationError, match="output output differs by"):
        verify_onnx(sparse, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"routing_outputs": True}, "its routes are asked for"), ({"quantize_experts": "int8"}, "are to be quantised")],
)
def test_dense_is_refused(sparse_layer: Make, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Protects: routes and quantised experts are not dropped in silence."""
    with pytest.raises(ExportError, match=message):
        export_onnx(sparse_layer(), tmp_path / "model.onnx", lowering="dense", **options)


def test_weighted_experts_are_no_dense_layer(sparse_layer: Make, skipping_router: Any, tmp_path: Path) -> None:
    """Protects: the sum of experts that count by their routing weights is no FFN."""
    with pytest.raises(ExportError, match="its router weighs experts"):
        export_onnx(sparse_layer(router=skipping_router()), tmp_path / "model.onnx", lowering="dense")


def test_exact_files_do_not_deviate(sparse_transformer: Make, tmp_path: Path) -> None:
    """Protects: what is allowed and not used is not reported, and nothing is dense unasked."""
    sparse = sparse_transformer()
    report = export_onnx(sparse, tmp_path / "model.onnx", lowering="expert_chain", allow=["dense", "tanh_gelu"])
    assert report.deviation is None
    asked = export_onnx(sparse, tmp_path / "model.onnx")
    assert asked.layers[0].lowering != "dense"
    allowed = export_onnx(sparse, tmp_path / "model.onnx", allow=["dense"], measure=True, target_tokens=3)
    assert {time.lowering for time in allowed.layers[0].times if time.measured} >= {"dense", "expert_chain"}
    assert torch.isfinite(torch.tensor(allowed.layers[0].times[0].score))
