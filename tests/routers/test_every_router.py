"""What every router of the catalogue keeps, whatever its family: the contract, its own declarations, and the pipeline.

A router that is added to the catalogue is tested here without another line. What makes it different has its own file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import SparseModel, SparsifyConfig, export_onnx, sparsify
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.routers import ROUTERS, Router, UnitRouter, make_router

D, E, VOCABULARY = 16, 4, 32
GAP = 1e-5  # what promise 1 allows in fp32

every_router = pytest.mark.parametrize("made", ROUTERS, ids=lambda router: router.system.name)


def new_router(made: type[Router], seed: int = 1) -> Router:
    """At random weights of size 1, as small ones make ties; in evaluation mode."""
    router = make_router(made.system.name, D, E, made.default_top_k, {}, seed=seed)
    for parameter in router.parameters():
        parameter.data = torch.randn_like(parameter)
    return router.eval()


def route(router: Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """With ids where the router reads any."""
    return router(x, ids) if needs_ids(type(router)) else router(x)


def needs_ids(made: type[Router]) -> bool:
    return bool({"ids", "labels"} & set(made.system.needs))


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """Tokens and an id of each."""
    return torch.randn(count, D), torch.arange(count) % E


@every_router
@pytest.mark.parametrize("count", [1, 7])
def test_contract(made: type[Router], count: int) -> None:
    """Protects: shapes, dtypes and ranges that every reader of a route relies on; no expert twice for a token."""
    router, (x, ids) = new_router(made), tokens(count)
    weights, experts = route(router, x, ids)
    assert weights.shape == experts.shape == (count, router.num_slots)
    assert (weights.dtype, experts.dtype) == (x.dtype, torch.int64)
    assert weights.isfinite().all()
    assert ((experts >= -1) & (experts < E)).all()
    for row in experts:
        used = row[row >= 0]
        assert len(used.unique()) == len(used)


@every_router
def test_inference_is_deterministic(made: type[Router]) -> None:
    """Protects: no noise outside training, and none left behind by it."""
    router, (x, ids) = new_router(made), tokens(16)
    first = route(router, x, ids)
    route(router.train(), x, ids)
    router.load_state_dict(new_router(made).state_dict())  # training may move buffers
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, route(router.eval(), x, ids), strict=True))


@every_router
def test_routes_in_fp32(made: type[Router]) -> None:
    """Protects: the routes of bf16 tokens are those of the same numbers in fp32."""
    router, (x, ids) = new_router(made), tokens(64)
    x = x.bfloat16()
    weights, experts = route(router, x, ids)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(experts, route(router, x.float(), ids)[1])


@every_router
@pytest.mark.parametrize("weights", ["native", "one", "sum"])
def test_weights_keep_the_rule_that_is_declared(made: type[Router], weights: Any) -> None:
    """Protects: `rule`, from which the conversion concludes that the start is exact."""
    router, (x, ids) = new_router(made), tokens(16)
    router.weights = weights
    routing_weights, experts = route(router, x, ids)
    used = experts >= 0
    if router.rule == "one":
        assert torch.equal(routing_weights[used], torch.ones(int(used.sum())))
    if router.rule == "sum":
        sums = torch.where(used, routing_weights, 0).sum(-1)
        torch.testing.assert_close(sums, torch.ones(len(x)))


@every_router
def test_causal_as_declared(made: type[Router]) -> None:
    """Protects: claim 21: a later token never moves the route of an earlier one, to the last bit."""
    router = new_router(made)
    if not router.causal:
        pytest.skip("declared non-causal: a causal model refuses it")
    x, ids = tokens(16)
    before = route(router, x, ids)
    for seed in range(8):
        torch.manual_seed(seed)
        x[-1] = torch.randn(D)
        ids[-1] = seed % E
        after = route(router, x, ids)
        assert all(torch.equal(a[:-1], b[:-1]) for a, b in zip(before, after, strict=True))


@every_router
def test_batch_invariant_as_declared(made: type[Router]) -> None:
    """Protects: claim 21: alone as in a batch: the same experts, weights to rounding."""
    router = new_router(made)
    if not router.batch_invariant:
        pytest.skip("declared to depend on the other tokens")
    x, ids = tokens(9)
    weights, experts = route(router, x, ids)
    for i in range(len(x)):
        alone = route(router, x[i : i + 1], ids[i : i + 1])
        assert torch.equal(experts[i], alone[1][0])
        torch.testing.assert_close(weights[i], alone[0][0], rtol=1e-5, atol=1e-6)


@every_router
def test_gradients_reach_every_parameter(made: type[Router]) -> None:
    """Protects: a router learns from the task or from its own losses, and no gradient is NaN."""
    if issubclass(made, UnitRouter):
        pytest.skip("is fitted, not trained")
    router, (x, ids) = new_router(made).train(), tokens(64)
    weights, experts = route(router, x, ids)
    target = torch.linspace(1, 2, weights.numel()).view_as(weights)
    loss = (torch.where(experts >= 0, weights, 0) * target).sum() + router.aux_loss()
    if not any(True for _ in router.parameters()):
        return
    loss.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every_router
def test_compiles_in_one_graph(made: type[Router]) -> None:
    """Protects: `torch.compile` of a converted model does not break at its routers."""
    torch.compiler.reset()
    router, (x, ids) = new_router(made), tokens(6)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    found = compiled(x, ids) if needs_ids(made) else compiled(x)
    assert all(torch.equal(a, b) for a, b in zip(found, route(router, x, ids), strict=True))


IDS = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense() -> GPT:
    """A decoder of one block."""
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCABULARY, 16, D, 32, 2, 1)).eval()


@pytest.fixture(scope="module")
def converted(dense: GPT) -> Callable[[type[Router]], SparseModel]:
    """Converts with a router of the catalogue and its defaults, once."""
    known: dict[str, SparseModel] = {}

    def get(made: type[Router]) -> SparseModel:
        name = made.system.name
        if name not in known:
            known[name] = sparsify(dense, example(made), **options(made))
        return copy.deepcopy(known[name])

    return get


def options(made: type[Router]) -> dict[str, Any]:
    start = "split" if issubclass(made, UnitRouter) else "upcycle"
    return {
        "router": made.system.name,
        "start": start,
        "num_experts": E,
        "top_k": made.default_top_k,
        "select": "all",
        "allow_non_causal": True,
    }


def example(made: type[Router]) -> tuple[Any, ...]:
    return (IDS,)


@every_router
def test_starts_as_it_says(
    made: type[Router], dense: GPT, converted: Callable[[type[Router]], SparseModel]
) -> None:
    """Protects: promise 1: exact where the rule says so, for other tokens too; else the report states the gap."""
    sparse = converted(made)
    (ffn,) = sparse.report.converted
    assert ffn.receipt is not None
    assert ffn.receipt <= GAP
    (router,) = sparse.routers.values()
    difference = (sparse(IDS.flip(1)) - dense(IDS.flip(1))).abs().max() / dense(IDS.flip(1)).abs().max()
    if options(made)["start"] == "upcycle" and router.rule == "sum":
        assert difference <= GAP
    else:
        assert ffn.error is not None
        assert any(note for note in sparse.report.notes)


@every_router
def test_exports(made: type[Router], converted: Callable[[type[Router]], SparseModel], tmp_path: Path) -> None:
    """Protects: promise 4: the inference form runs in onnxruntime with the same experts and outputs."""
    report = export_onnx(converted(made).eval(), tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-4


@every_router
def test_saves_and_loads(made: type[Router], converted: Callable[[type[Router]], SparseModel], tmp_path: Path) -> None:
    """Protects: a loaded model computes the same, bit by bit, and its router has the same options."""
    sparse = converted(made).eval()
    sparse.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert torch.equal(loaded(IDS), sparse(IDS))
    assert [r.options() for r in loaded.routers.values()] == [r.options() for r in sparse.routers.values()]


@every_router
def test_one_step_of_training_lowers_the_loss(
    made: type[Router], converted: Callable[[type[Router]], SparseModel]
) -> None:
    """Protects: a converted model trains with `loss + aux_loss()`: twenty steps on one batch."""
    sparse = converted(made).train()
    optimizer = torch.optim.Adam(sparse.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(20):
        logits = sparse(IDS)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + sparse.aux_loss()).backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_the_catalogue_covers_the_review() -> None:
    """Protects: the options of every entry build a config, so that the tests above saw all of them."""
    for made in ROUTERS:
        assert SparsifyConfig(**options(made)).router_name == made.system.name
