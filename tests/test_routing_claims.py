"""Claims of the review that belong to no single file, as docs/routing.md numbers them.

n converted FFNs, M = 2 D F multiply-adds of one, N its parameters with the bias of up_proj, E experts, K top_k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sparsify import SparseModel, export_onnx, sparsify
from sparsify.models.gpt import GPT, GPTConfig

D, F, LAYERS = 16, 64, 2
IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def dense() -> GPT:
    """Two FFNs with biases."""
    torch.manual_seed(0)
    return GPT(GPTConfig(32, 16, D, F, 2, LAYERS)).eval()


def converted(dense: nn.Module, **options: Any) -> SparseModel:
    given: dict[str, Any] = {"select": "all", "start": "upcycle", "router": "top-k", **options}
    return sparsify(dense, (IDS,), **given)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("experts", [1, 4, 16, 64])
def test_claim_1_parameters_grow_and_compute_does_not(dense: GPT, experts: int) -> None:
    """Copies: parameters are dense + n ((E - 1) N + D E), multiply-adds dense + n ((K - 1) M + D E), exactly."""
    ffn_macs, ffn_parameters = 2 * D * F, 2 * D * F + F
    top_k = min(2, experts)
    sparse = converted(dense, num_experts=experts, top_k=top_k)
    assert count(sparse) == count(dense) + LAYERS * ((experts - 1) * ffn_parameters + D * experts)
    for ffn in sparse.report.converted:
        assert ffn.flops_after is not None
        assert ffn.flops_after / 2 == top_k * ffn_macs + D * experts


@pytest.mark.parametrize("experts", [1, 4, 16, 64])
def test_claim_1_a_split_computes_less(dense: GPT, experts: int) -> None:
    """Parts: parameters are dense + n D E, multiply-adds dense - n ((1 - K / E) M - D E).

    The parts that hold means of skipped neurons (a bias each) are measured off: they come with the calibration.
    """
    top_k = max(1, experts // 4)
    sparse = converted(dense, start="split", num_experts=experts, top_k=top_k, num_shared_experts=0)
    means = sum(p.numel() for name, p in sparse.named_parameters() if name.endswith("down_proj_bias"))
    assert count(sparse) == count(dense) + LAYERS * D * experts + means
    for ffn in sparse.report.converted:
        assert ffn.flops_after is not None
        assert ffn.flops_after / 2 == 2 * D * F * top_k / experts + D * experts


def test_claim_3_a_batch_touches_as_many_experts_as_chance_says() -> None:
    """Distinct experts of T tokens at uniform routing: E (1 - (1 - K / E)^T), to 5 % over 300 draws."""
    torch.manual_seed(0)
    experts, top_k = 16, 2
    sparse = sparsify(
        nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)), (torch.randn(8, D),), select="all",
        start="upcycle", router="top-k", num_experts=experts, top_k=top_k,
    )  # fmt: skip
    (router,) = sparse.routers.values()
    for tokens in (1, 2, 4, 8, 16):
        found = torch.zeros(300)
        for i in range(300):
            # New logits for every draw: fixed rows share tokens unevenly.
            router.get_parameter("weight").data.normal_()
            with torch.no_grad():
                found[i] = len(router(torch.eye(D)[torch.randperm(D)[:tokens]])[1].unique())
        expected = experts * (1 - (1 - top_k / experts) ** tokens)
        assert found.mean().item() == pytest.approx(expected, rel=0.05), tokens


@pytest.mark.parametrize("router", ["top-k", "switch", "deepseek-moe"])
def test_claim_4_one_expert_is_the_dense_model(dense: GPT, router: str, tmp_path: Path) -> None:
    """E = 1, any weights of one expert: at most 1e-6 of the largest output apart, in torch and in onnxruntime."""
    sparse = converted(dense, router=router, num_experts=1, top_k=1)
    expected = dense(IDS).detach()
    size = expected.abs().max()
    assert float((sparse(IDS).detach() - expected).abs().max() / size) <= 1e-6
    export_onnx(sparse, tmp_path / "model.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input_ids": IDS.numpy()})
    assert float((torch.from_numpy(found) - expected).abs().max() / size) <= 1e-6


def test_claim_9_the_file_casts_before_it_routes(dense: GPT, tmp_path: Path) -> None:
    """The router of an fp16 model multiplies and takes its softmax in fp32; all logits in the file are float."""
    torch.manual_seed(0)
    half = GPT(GPTConfig(32, 16, D, F, 2, 1)).half().eval()
    sparse = converted(half, num_experts=4, top_k=2)
    export_onnx(sparse, tmp_path / "model.onnx", verify=False)  # onnxruntime lacks fp16 on the CPU in places
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    routing = [node for node in model.graph.node if node.op_type == "TopK"]
    assert routing
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in routing:
        assert types[node.input[0]] == onnx.TensorProto.FLOAT
        product = makers[node.input[0]]
        while product.op_type not in ("MatMul", "Gemm"):
            product = makers[product.input[0]]
        assert types[product.output[0]] == onnx.TensorProto.FLOAT
        assert makers[product.input[0]].op_type == "Cast"
