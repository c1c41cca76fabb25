"""Protects: layers that are better off dense are the FFNs of the dense model again, in the file and its check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, SparsifyConfig, export_onnx, sparsify
from sparsify.errors import ExportError
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.passes.export_onnx import ExportReport
from sparsify.passes.original_weights import original_weights, with_weights
from sparsify.passes.verify_onnx import verify_onnx

# A refit and training, so that the experts are no parts of the FFN any more; 5 does not divide the neurons.
OPTIONS = SparsifyConfig(num_experts=5, top_k=2, num_shared_experts=1, select="all", distill_steps=3)


@pytest.fixture(scope="module", params=["gated", "with biases"])
def dense(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return (Llama(LlamaConfig()) if request.param == "gated" else Bert(BertConfig())).eval()


@pytest.fixture(scope="module")
def sparse(dense: nn.Module) -> SparseModel:
    batches = torch.randint(0, 256, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    return sparsify(dense, batches[0][:2, :5], calibration=list(batches), config=OPTIONS)


def _run(path: Path, ids: Tensor) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0])


def _error(ours: np.ndarray[Any, Any], theirs: Tensor) -> float:
    return float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max())


@torch.no_grad()
def test_all_original_layers_are_the_dense_model(dense: nn.Module, sparse: SparseModel, tmp_path: Path) -> None:
    """Protects: every weight and bias of the FFNs comes back, padding and folded means go; nothing routes any more."""
    report = export_onnx(sparse, tmp_path / "model.onnx", lowering="original", dense=dense)
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-5
    ids = torch.randint(0, 256, (3, 7))
    assert _error(_run(report.path, ids), sparse(ids)) > 1e-3
    assert _error(_run(report.path, ids), dense(ids)) <= 1e-5
    names = [node.name for node in onnx.load(str(report.path)).graph.node]
    assert not any("router" in name or "shared" in name for name in names)


@torch.no_grad()
def test_one_layer_is_taken_where_it_is_faster(dense: nn.Module, sparse: SparseModel, tmp_path: Path) -> None:
    """Protects: `allow=["dense"]` means the original FFN where dense= is given; the file can be checked later."""
    path = tmp_path / "model.onnx"
    # So few neurons are never worth a router.
    report: ExportReport = export_onnx(sparse, path, target_tokens=1, allow=["dense"], dense=dense)
    assert {layer.lowering for layer in report.layers} == {"original"}
    assert "as before the conversion" in str(report)
    assert verify_onnx(sparse, path, dense).max_relative_error <= 1e-5
    with pytest.raises(ValueError, match="give the dense model that was converted"):
        verify_onnx(sparse, path)


@torch.no_grad()
def test_some_layers(dense: nn.Module, sparse: SparseModel) -> None:
    """Protects: only the layers whose weights are given change; the model stays as it is."""
    found = original_weights(sparse, dense)
    assert list(found) == list(sparse.routers)
    ids = torch.randint(0, 256, (3, 7))
    before = sparse(ids)
    changed = with_weights(sparse, found[next(iter(found))])
    assert not torch.allclose(changed(ids), before)
    assert torch.equal(sparse(ids), before)


def test_refusals(dense: nn.Module, sparse: SparseModel, tmp_path: Path) -> None:
    """Protects: no FFN of another model is taken for the original one."""
    with pytest.raises(ExportError, match="dense= is not given"):
        export_onnx(sparse, tmp_path / "model.onnx", lowering="original")
    gated = isinstance(dense, Llama)
    wider = Llama(LlamaConfig(intermediate_size=512)) if gated else Bert(BertConfig(intermediate_size=512))
    assert not original_weights(sparse, wider.eval())
