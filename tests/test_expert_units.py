"""Experts of different widths: `ExpertUnits`, and a converted model with such experts in everything that it can do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, SparsifyConfig, distill, export_onnx, inspect, sparsify, verify_onnx
from sparsify.expert_units import ExpertUnits, units_of_widths
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.passes.plan import ConversionPlan

D, F = 16, 128
WIDTHS = [64, 32, 16, 16]
X = torch.randn(24, D, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """One FFN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)).eval()


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """A causal model of two FFNs."""
    torch.manual_seed(0)
    return GPT(GPTConfig(32, 16, D, F, 2, 2)).eval()


def converted(model: nn.Module, example: Tensor, **options: Any) -> SparseModel:
    given: dict[str, Any] = {"select": "all", "expert_widths": WIDTHS, "top_k": 2, "num_shared_experts": 0, **options}
    return sparsify(model, (example,), **given)


def even(model: nn.Module, **options: Any) -> SparseModel:
    """Routes are spread: the weights of the untrained router, not fitted to the norms of the experts."""
    torch.manual_seed(3)
    sparse = converted(model, X, router="top-k", **options)
    for router in sparse.routers.values():
        router.get_parameter("weight").data.normal_()
    return sparse


def by_loop(sparse: SparseModel, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The sum of the chosen experts in fp64, token by token, each expert with all its neurons at once."""
    up, up_bias, down, down_bias = (
        sparse.get_parameter(f"ffn0.experts.{name}").double()
        for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    )
    y = torch.zeros(len(x), D, dtype=torch.float64)
    for t, k in np.ndindex(*ids.shape):
        e = int(ids[t, k])
        if e < 0:
            continue
        own = slice(sum(WIDTHS[:e]) // 16, sum(WIDTHS[: e + 1]) // 16)
        hidden = nn.functional.gelu(up[own].reshape(-1, D) @ x[t].double() + up_bias[own].reshape(-1))
        out = down[own].transpose(0, 1).reshape(D, -1) @ hidden + down_bias[own].sum(0)
        y[t] += weights[t, k].double() * out
    return y


@pytest.mark.parametrize("sizes", [[4, 2, 1, 1], [1], [3], [1, 5]])
def test_units_of_experts(sizes: list[int]) -> None:
    """Protects: every expert becomes its own units with its own weight, an unused slot none; no tokens stay none."""
    units = ExpertUnits(sizes)
    ids = torch.randint(-1, len(sizes), (7, 3))
    weights = torch.rand(7, 3, requires_grad=True)
    unit_weights, unit_ids = units(weights, ids)
    empty = float(unit_weights.detach()[unit_ids < 0].abs().sum())
    assert unit_ids.shape == unit_weights.shape == (7, 3 * max(sizes))
    for t in range(7):
        found = [(u, w) for u, w in zip(unit_ids[t].tolist(), unit_weights[t].tolist(), strict=True) if u >= 0]
        own = zip(ids[t].tolist(), weights[t].tolist(), strict=True)
        wanted = [(sum(sizes[:e]) + i, w) for e, w in own if e >= 0 for i in range(sizes[e])]
        assert found == wanted
    assert empty == 0
    (gradient,) = torch.autograd.grad(unit_weights.sum(), weights)
    counts = torch.tensor([*sizes, 0])[ids]
    torch.testing.assert_close(gradient, counts.float())
    assert units(torch.rand(0, 3), ids[:0])[1].shape == (0, 3 * max(sizes))
    assert units.of([0]) == list(range(sizes[0]))


def test_the_unit_is_the_greatest_common_divisor() -> None:
    """Protects: units as wide as the widths allow; no unit for an expert without neurons."""
    assert units_of_widths([768, 384, 192]) == (192, (4, 2, 1))
    assert units_of_widths([96, 96]) == (96, (1, 1))
    with pytest.raises(ValueError, match=r"at least one unit, got \[2, 0\]"):
        ExpertUnits([2, 0])


@pytest.mark.parametrize(
    ("widths", "shared"),
    [
        ([64, 32, 16, 16], 0),
        ([64, 32, 16, 16], 1),
        ([48, 32, 16, 16, 16], 2),
        ([1, 127], 0),
        ([F], 0),
        ([122, 4, 2], 1),
    ],
)
def test_all_experts_on_are_the_dense_model(dense: nn.Module, widths: list[int], shared: int) -> None:
    """Protects: the promise of the split for any widths: one unit, one expert, shared ones of a width of their own."""
    sparse = converted(dense, X, expert_widths=widths, top_k=len(widths), num_shared_experts=shared, refit=False)
    torch.testing.assert_close(sparse(X), dense(X), rtol=1e-5, atol=1e-5)
    assert sparse.report.max_receipt <= 1e-5
    assert sparse(X[:0]).shape == (0, D)
    torch.testing.assert_close(sparse.to_dense()(X), dense(X), rtol=1e-5, atol=1e-5)


def test_equal_widths_are_equal_parts(dense: nn.Module) -> None:
    """Protects: widths that are all equal give the graph and the numbers of `num_experts`."""
    calibration = [torch.randn(300, D)]
    options: dict[str, Any] = {"top_k": 2, "num_shared_experts": 1, "calibration": calibration, "distill_steps": 5}
    parts = converted(dense, X, expert_widths=None, num_experts=4, **options)
    widths = converted(dense, X, expert_widths=[32] * 4, **options)
    assert widths.code == parts.code
    for (name, ours), theirs in zip(widths.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_only_the_shared_expert_is_wider(dense: nn.Module) -> None:
    """Protects: routed experts of one width need no units, whatever the shared one has."""
    sparse = converted(dense, X, expert_widths=[56, 24, 24, 24], num_shared_experts=1)
    assert "units" not in sparse.code
    (ffn,) = sparse.report.converted
    assert ffn.flops_after == 2 * 2 * D * (56 + 24) + 2 * 64 * (D + 3)  # router: D x 64 and 64 x 3


def test_the_report_counts_what_runs(dense: nn.Module) -> None:
    """Protects: FLOPs by the loads of the calibration tokens, and the widths in every form of the report."""
    sparse = converted(dense, X, calibration=[torch.randn(400, D)], router="top-k", refit=False)
    (ffn,) = sparse.report.converted
    assert ffn.expert_widths == tuple(WIDTHS)
    tokens = sum(ffn.tokens_per_expert) // 2
    neurons = sum(n * width for n, width in zip(ffn.tokens_per_expert, WIDTHS, strict=True)) / tokens
    assert ffn.flops_after == 2 * 2 * D * round(neurons) + 2 * D * 4
    assert "experts of 64, 32, 16, 16 neurons" in str(sparse.report)
    assert json.loads(json.dumps(sparse.report.to_json()))["ffns"][0]["expert_widths"] == WIDTHS


def test_a_varying_number_of_experts_is_counted_over_its_own_tokens(dense: nn.Module) -> None:
    """Protects: FLOPs of a split whose router varies: loads are those of the tokens that it was fitted to."""
    sparse = converted(dense, X, expert_widths=None, num_experts=4, router="remoe", calibration=[torch.randn(400, D)])
    (ffn,) = sparse.report.converted  # at the start every expert runs
    assert ffn.flops_after == ffn.flops_before + 2 * D * 4


def test_save_and_load(dense: nn.Module, tmp_path: Path) -> None:
    """Protects: the folder holds the widths; the loaded model gives the same bits, and saves to the same bytes."""
    sparse = even(dense)
    sparse.save(tmp_path / "a")
    loaded = SparseModel.load(tmp_path / "a")
    assert torch.equal(loaded(X), sparse(X))
    loaded.save(tmp_path / "b")
    for file in ("graph.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_routes_are_those_of_experts(dense: nn.Module) -> None:
    """Protects: statistics and the dial count experts, not their units."""
    sparse = even(dense)
    (layer,) = sparse.routing_stats([X]).layers
    assert (len(layer.tokens_per_expert), layer.slots, layer.experts_per_token) == (4, 2, 2.0)
    sparse.set_top_k(4)
    assert sparse.routing_stats([X]).layers[0].tokens_per_expert == (24,) * 4
    torch.testing.assert_close(sparse(X).shape, X.shape)


@pytest.mark.parametrize(
    ("lowering", "router"),
    [("auto", "mlp"), ("expert_chain", "top-k"), ("expert_chain", "remoe"), ("sorted_split", "mlp"),
     ("sorted_split", "remoe"), ("dense_masked", "top-k")],
)  # fmt: skip
def test_onnx(dense: nn.Module, tmp_path: Path, lowering: Any, router: str) -> None:
    """Protects: every lowering; the routes in the file are experts; the file is checked against the saved model."""
    sparse = converted(dense, X, router=router)
    if router == "remoe":
        sparse.routers["ffn0"].get_parameter("weight").data.normal_()
    export_onnx(sparse, tmp_path / "model.onnx", lowering=lowering, routing_outputs=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (name,) = [value.name for value in session.get_inputs()]
    y, ids, weights = session.run(None, {name: X.numpy()})
    expected_weights, expected_ids = sparse.routers["ffn0"](X)
    assert torch.equal(torch.from_numpy(ids), expected_ids)
    torch.testing.assert_close(torch.from_numpy(weights), expected_weights.detach())
    torch.testing.assert_close(torch.from_numpy(y), sparse(X).detach(), rtol=1e-4, atol=1e-5)
    assert verify_onnx(sparse, tmp_path / "model.onnx").expert_id_mismatches == 0


def test_onnx_measured_and_refused(tmp_path: Path) -> None:
    """Protects: lowerings are timed with units too; the op of onnxruntime has one width, and its refusal says so."""
    dense = nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))
    report = export_onnx(converted(dense, X), tmp_path / "model.onnx", measure=True, target_tokens=(4,))
    assert "moe_op does not fit: its experts differ in width" in str(report)
    assert all(time.measured for time in report.layers[0].times)


def test_pruning_takes_whole_experts(dense: nn.Module) -> None:
    """Protects: the units of a pruned expert go, and tokens whose experts are kept have the outputs as before."""
    sparse = even(dense)
    stats = sparse.routing_stats([X])
    kept = sorted(range(4), key=lambda e: -stats.layers[0].tokens_per_expert[e])[:3]
    pruned = sparse.prune(3, stats)
    assert pruned.get_parameter("ffn0.experts.down_proj").shape[0] == sum(WIDTHS[e] // 16 for e in kept)
    ids = sparse.routers["ffn0"](X)[1]
    same = torch.isin(ids, torch.tensor(kept)).all(1)
    assert 0 < int(same.sum()) < len(X)
    torch.testing.assert_close(pruned(X)[same], sparse(X)[same])


def test_compiles_trains_and_keeps_gradients(dense: nn.Module) -> None:
    """Protects: torch.compile and the gradients of experts and router, against eager."""
    sparse = even(dense)
    twin = copy.deepcopy(sparse)
    compiled = torch.compile(twin, backend="aot_eager", dynamic=True)
    for model in (sparse, compiled):
        model(X).square().sum().backward()
    torch.testing.assert_close(compiled(X), sparse(X))
    for ours, theirs in zip(twin.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert sparse.routers["ffn0"].get_parameter("weight").grad is not None


def test_causal_and_grafted(gpt: GPT) -> None:
    """Protects: earlier tokens do not see later ones; the experts work inside the original modules."""
    sparse = converted(gpt, IDS)
    changed = IDS.clone()
    changed[:, -1] += 1
    torch.testing.assert_close(sparse(changed)[:, :-1], sparse(IDS)[:, :-1], rtol=0, atol=1e-6)
    model = copy.deepcopy(gpt)
    assert not sparse.graft(model).skipped
    torch.testing.assert_close(model(IDS), sparse(IDS))
    torch.testing.assert_close(copy.deepcopy(model)(IDS), sparse(IDS))


def test_distillation_reaches_every_width(gpt: GPT) -> None:
    """Protects: light training of the whole model; routers learn which whole experts were worth running."""
    sparse = converted(gpt, IDS, calibration=[IDS, IDS + 3], distill_steps=4)
    before = {name: parameter.clone() for name, parameter in sparse.named_parameters()}
    report = distill(sparse, gpt, [IDS, IDS + 1], steps=6)
    assert report.losses[-1] < report.losses[0]
    routers = [name for name in before if ".router." in name]
    assert all(not torch.equal(before[name], sparse.get_parameter(name)) for name in routers)


def test_layers_of_their_own_widths_and_a_plan(gpt: GPT) -> None:
    """Protects: overrides by layer, and the plan as JSON and back to the same model."""
    overrides = {"*.1.*": {"expert_widths": [96, 32], "top_k": 1}, "*.0.*": {"num_experts": 8}}
    config = SparsifyConfig(expert_widths=WIDTHS, top_k=2, select="all", overrides=overrides)
    plan = inspect(gpt, (IDS,)).plan(config)
    assert [layer.expert_widths for layer in plan.layers] == [(), (96, 32)]
    read = ConversionPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan
    sparse = sparsify(gpt, (IDS,), plan=read)
    torch.testing.assert_close(sparse(IDS), sparsify(gpt, (IDS,), config=config)(IDS))


@pytest.mark.parametrize("router", ["soft-moe", "expert-choice", "top-p", "peer"])
def test_any_router_takes_them(dense: nn.Module, router: str) -> None:
    """Protects: routers with a number of experts of their own, and those that mix tokens: units follow the experts."""
    sparse = converted(dense, X, router=router, top_k=4 if router == "expert-choice" else 1)
    weights, ids, *mixtures = sparse.routers["ffn0"](X)
    y = by_loop(sparse, mixtures[0] if mixtures else X, weights, ids)
    y = (mixtures[1].double() @ y.view(len(mixtures[1]), -1, D)).flatten(0, 1) if mixtures else y
    bias = sparse.get_parameter("ffn0.experts.bias").double()
    torch.testing.assert_close(sparse(X).double(), y + bias, rtol=1e-4, atol=1e-5)
