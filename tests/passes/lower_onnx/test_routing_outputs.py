"""The routes as outputs of the file: named, equal to those in PyTorch, whatever the lowering, and checked at export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from sparsify import SparseModel, export_onnx, sparsify, verify_onnx
from sparsify.errors import VerificationError
from sparsify.models.gpt import GPT, GPTConfig

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def models() -> dict[str, SparseModel]:
    """A split, whose weights are all 1, and copies."""
    torch.manual_seed(0)
    dense = GPT(GPTConfig(32, 16, 16, 32, 2, 2)).eval()
    options: dict[str, Any] = {"num_experts": 4, "top_k": 2, "select": "all"}
    return {start: sparsify(dense, (IDS,), start=start, **options) for start in ("split", "upcycle")}


@pytest.mark.parametrize("start", ["split", "upcycle"])
@pytest.mark.parametrize("lowering", ["expert_chain", "sorted_split", "dense_masked"])
def test_equal_those_of_torch(models: dict[str, SparseModel], start: str, lowering: Any, tmp_path: Path) -> None:
    """Protects: claim 20: ids equal, weights to rounding, `[T, K]`, at other sizes than traced."""
    sparse, path, ids = models[start], tmp_path / "model.onnx", IDS[:1, :5].repeat(3, 1)
    report = export_onnx(sparse, path, lowering=lowering, routing_outputs=True)
    assert report.parity is not None
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input_ids": ids.numpy()}), strict=True))
    routes: dict[str, tuple[Tensor, Tensor]] = {}
    for name, router in sparse.routers.items():
        router.register_forward_hook(lambda _m, _i, route, name=name: routes.update({name: route}))
    sparse(ids)
    assert list(found) == ["output", *(f"{n}.{v}" for n in routes for v in ("expert_ids", "routing_weights"))]
    for name, (weights, expert_ids) in routes.items():
        assert torch.equal(torch.from_numpy(found[f"{name}.expert_ids"]), expert_ids)
        torch.testing.assert_close(torch.from_numpy(found[f"{name}.routing_weights"]), weights, rtol=1e-4, atol=1e-5)


def test_are_part_of_the_check(models: dict[str, SparseModel], tmp_path: Path) -> None:
    """Protects: the receipt covers them: weights that are not those of the router are found."""
    path = tmp_path / "model.onnx"
    export_onnx(models["upcycle"], path, routing_outputs=True)
    proto = onnx.load(path)
    name = next(output.name for output in proto.graph.output if output.name.endswith("routing_weights"))
    (node,) = (node for node in proto.graph.node if name in node.output)
    node.op_type = "Neg"
    del node.attribute[:]
    onnx.save(proto, path)
    with pytest.raises(VerificationError, match="routing_weights differs"):
        verify_onnx(models["upcycle"], path)
