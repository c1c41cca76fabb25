"""`prune`: the most important neurons stay, the others leave their mean; a model without routers is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsify import SparseModel, sparsify
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.prune import prune

NOBODY = torch.zeros(300, 0, dtype=torch.int64)


def test_all_parts_are_the_dense_ffn(dense: DenseFFN) -> None:
    """Protects: order and bias; parts may have a place too many, as 5 parts of 24 neurons have."""
    x = torch.randn(300, 7)
    experts, _ = prune(dense, x, 25)
    torch.testing.assert_close(experts(x, NOBODY), dense(x), rtol=1e-4, atol=1e-5)


def test_the_mean_error_is_zero_and_the_right_neurons_stay(dense: DenseFFN) -> None:
    """Protects: mean folding, and that dropping the important half instead would be worse."""
    x = torch.randn(300, 7)
    experts, mean = prune(dense, x, 12)
    assert mean.shape == (12,)
    assert experts.num_routed == 0
    error = experts(x, NOBODY) - dense(x)
    torch.testing.assert_close(error.mean(0), torch.zeros(7), rtol=0, atol=1e-5)
    shared = experts.shared
    assert shared is not None
    kept = shared(x)
    assert float((kept - kept.mean(0)).norm()) > float(error.norm())


def test_a_pruned_model_runs_saves_and_grafts(tmp_path: Path) -> None:
    """Protects: `num_shared_experts = top_k` from the options to the files, beside a routed layer."""
    torch.manual_seed(0)
    model = Bert(BertConfig()).eval()
    ids = torch.randint(0, 256, (4, 16))
    overrides = {"layers.0.ffn": {"num_shared_experts": 2}}
    options: dict[str, Any] = {"num_experts": 4, "top_k": 2, "select": "all", "overrides": overrides}
    sparse = sparsify(model, ids[:2], calibration=[ids], **options)
    assert list(sparse.routers) == ["layers.1.ffn"]
    pruned, routed = sparse.report.converted
    assert pruned.flops_after * 2 == pruned.flops_before
    assert routed.flops_after > pruned.flops_after
    sparse.save(tmp_path)
    expected = sparse(ids)
    torch.testing.assert_close(SparseModel.load(tmp_path)(ids), expected)
    assert "layers.0.ffn" in str(sparse.report)
    assert not sparse.graft(model).skipped
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
