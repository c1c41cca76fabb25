"""A converted model in the rest of PyTorch: torch.compile, torch.export, autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sparsify import SparseModel, sparsify
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.routers import MLPRouter

_SIZES = ((2, 5), (3, 7), (4, 16))


@pytest.fixture(scope="module")
def sparse() -> SparseModel:
    """A small Llama with fused experts."""
    model = Llama(LlamaConfig()).eval()
    return sparsify(model, torch.randint(0, 256, (2, 5)), num_experts=4, top_k=2, select="all")


def test_compile(sparse: SparseModel) -> None:
    """Protects: one graph for every size, with gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend=counter)
    for size in _SIZES:
        ids = torch.randint(0, 256, size)
        y = compiled(ids)
        y.square().mean().backward()
        torch.testing.assert_close(y, sparse(ids))
    assert counter.frame_count == 1
    assert all(p.grad is not None for name, p in sparse.named_parameters() if ".experts." in name)


def test_export(sparse: SparseModel, tmp_path: Path) -> None:
    """Protects: an export of the converted model, with one op a layer, and its file."""
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(sparse, (torch.randint(0, 256, (2, 5)),), dynamic_shapes=({0: dynamic, 1: dynamic},))
    fused = [node for node in program.graph.nodes if node.target is torch.ops.sparsify.moe_ffn.default]
    assert len(fused) == len(sparse.routers)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in _SIZES:
        ids = torch.randint(0, 256, size)
        torch.testing.assert_close(loaded(ids), sparse(ids))


def test_autocast(sparse: SparseModel) -> None:
    """Protects: the experts run in the dtype of autocast, and the router in its own: it chooses the same experts."""
    router = next(iter(sparse.routers.values()))
    assert isinstance(router, MLPRouter)
    x = torch.randn(50, router.hidden.in_features)
    _, expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        weights, chosen = router(x)
        assert sparse(torch.randint(0, 256, (2, 5))).dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    torch.testing.assert_close(chosen, expected, rtol=0, atol=0)
