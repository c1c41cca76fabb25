"""Claims of the review that belong to no single file, as docs/routing.md numbers them.

n converted FFNs, M = 2 D F multiply-adds of one, N its parameters with the bias of up_proj, E experts, K top_k.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

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


WIDTHS, UNIT = (32, 16, 8, 8), 8


@pytest.fixture(scope="module")
def uneven() -> tuple[SparseModel, Tensor]:
    """One FFN as experts of four and two units and two of one, 2 for a token, and tokens that use all of them."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    sparse = sparsify(
        dense, (torch.randn(8, D),), select="all", router="top-k", expert_widths=WIDTHS, top_k=2, num_shared_experts=0
    )
    (router,) = sparse.routers.values()
    router.get_parameter("weight").data.normal_()
    return sparse, torch.randn(50, D)


def loads_and_output(sparse: SparseModel, x: Tensor) -> tuple[list[int], Tensor]:
    """Tokens of each expert, and the output by a loop over tokens and experts in fp64."""
    ((name, router),) = sparse.routers.items()
    weights, ids = router(x)
    names = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias", "bias")
    up, up_bias, down, down_bias, bias = (sparse.get_parameter(f"{name}.experts.{key}").double() for key in names)
    y = bias.repeat(len(x), 1)
    for t in range(len(x)):
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            own = slice(sum(WIDTHS[:e]) // UNIT, sum(WIDTHS[: e + 1]) // UNIT)
            hidden = nn.functional.gelu(up[own].flatten(0, 1) @ x[t].double() + up_bias[own].flatten())
            y[t] += weight * (down[own].movedim(0, 1).flatten(1) @ hidden + down_bias[own].sum(0))
    return torch.bincount(ids.flatten(), minlength=len(WIDTHS)).tolist(), y.detach()


def macs_by_loads(loads: list[int]) -> int:
    """Multiply-adds of the experts: sum over e of n_e cost(width_e)."""
    return sum(tokens * 2 * D * width for tokens, width in zip(loads, WIDTHS, strict=True))


def test_claim_19_experts_of_different_width_cost_their_width(
    uneven: tuple[SparseModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch: rows that reach the products of experts, times the size of their weights; output as by a loop."""
    sparse, x = uneven
    loads, expected = loads_and_output(sparse, x)
    assert min(loads) > 0
    multiplied: list[int] = []
    linear = nn.functional.linear

    def counted(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.numel() == UNIT * D:  # of a unit; the router has another size
            multiplied.append(rows.shape[0] * weight.numel())
        return linear(rows, weight, bias)

    exact = copy.deepcopy(sparse).double()  # fp64 runs the reference, which multiplies expert by expert
    monkeypatch.setattr(nn.functional, "linear", counted)
    y = exact(x.double()).detach()
    assert sum(multiplied) == macs_by_loads(loads)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sparse(x).detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", ["expert_chain", "sorted_split"])
def test_claim_19_in_onnxruntime(uneven: tuple[SparseModel, Tensor], lowering: Any, tmp_path: Path) -> None:
    """Rows of every Gemm of the experts in the file, times the size of its weight; output as by the loop."""
    sparse, x = uneven
    loads, expected = loads_and_output(sparse, x)
    export_onnx(sparse, tmp_path / "model.onnx", lowering=lowering)
    model = onnx.load(tmp_path / "model.onnx")
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "Gemm" and ".experts" in node.input[1]]
    for node in products:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    y, *rows = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    multiplied = sum(len(np.asarray(part)) * sizes[node.input[1]] for part, node in zip(rows, products, strict=True))
    assert multiplied == macs_by_loads(loads)
    torch.testing.assert_close(torch.from_numpy(y).double(), expected, rtol=1e-4, atol=1e-5)
    widest = max(sizes[node.input[1]] for node in products)
    assert widest == (WIDTHS[0] if lowering == "expert_chain" else UNIT) * D  # whole experts, or their units
