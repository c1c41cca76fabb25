"""`to_dense`: a split and fresh copies give the dense model back; trained copies their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, sparsify
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.routers import Router

X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """An FFN with biases, a learned scale per neuron and an activation that no kernel knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.rand(24) + 0.5)
        nn.init.normal_(self.up.bias)
        nn.init.normal_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sin(self.up(x) * self.scale) * self.scale)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max() / b.detach().abs().max()) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"start": "split", "num_experts": 4, "top_k": 2},
        {"start": "split", "num_experts": 4, "top_k": 2, "num_shared_experts": 0},
        {"start": "upcycle", "num_experts": 3, "top_k": 2},
        {"start": "upcycle", "num_experts": 4, "top_k": 2, "granularity": 2},
        {"start": "shared", "num_experts": 3, "top_k": 2},
    ],
)
def test_gives_the_dense_model_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Protects: every start, biases and per-neuron vectors, at other sizes, after saving and loading too."""
    model = Block()
    sparse = sparsify(model, (X,), select="all", **options)
    sparse.save(tmp_path)
    for converted in (sparse, SparseModel.load(tmp_path)):
        dense = converted.to_dense()
        assert close(dense(X[:2, :5]), model(X[:2, :5]))
        assert not [module for module in dense.modules() if isinstance(module, Router)]


@pytest.mark.parametrize("model", [GPT(GPTConfig()), Llama(LlamaConfig())], ids=["plain", "gated"])
def test_whole_models(model: nn.Module) -> None:
    """Protects: fused layers are taken apart, the rest of the graph stays, and as many parameters come back."""
    ids = torch.arange(14).reshape(2, 7)
    sparse = sparsify(model.eval(), (ids,), num_experts=4, top_k=2, select="all")
    dense = sparse.to_dense()
    assert close(dense(ids), model(ids))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(sum(parameter.numel() for parameter in dense.parameters()) - count) <= 8 * 64  # a split's own biases


def test_trained_copies_are_averaged() -> None:
    """Protects: the mean of the weights, on the model as it is now, which is left alone."""
    sparse = sparsify(Block(), (X,), start="upcycle", num_experts=2, top_k=1, select="all")
    up = next(p for name, p in sparse.named_parameters() if name.endswith("experts.up_proj"))
    up.data[0] += 1
    before, expected = up.clone(), up.mean(0)
    merged = next(p for name, p in sparse.to_dense().named_parameters() if name.endswith("dense.up_proj"))
    torch.testing.assert_close(merged, expected)
    assert torch.equal(up, before)


def test_mixtures_of_tokens_have_no_dense_model() -> None:
    """Protects: the refusal says why, instead of a model that computes something else."""
    tokens = torch.randn(2, 5, X.shape[-1])
    sparse = sparsify(Block(), (tokens,), start="upcycle", router="soft-moe", num_experts=2, top_k=1, select="all")
    with pytest.raises(ValueError, match="run on mixtures of tokens"):
        sparse.to_dense()
