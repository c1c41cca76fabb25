"""What every router of the catalogue keeps, whatever its family: the contract, its own declarations, and the pipeline.

A router that is added to the catalogue is tested here without another line. What makes it different has its own file.
D hidden_size, E experts, T tokens; routers that read groups are given T tokens as one sequence.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from sparsify import SparseModel, export_onnx, sparsify
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.routers import ROUTERS, IdRouter, PolicyRouter, Router, UnitRouter, make_router

D, VOCABULARY = 16, 32
EXACT = 1e-5  # what promise 1 allows in fp32
IDS = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0])

every_router = pytest.mark.parametrize("made", ROUTERS, ids=lambda router: router.system.name)
routing_tokens = pytest.mark.parametrize(
    "made", [router for router in ROUTERS if not router.mixes], ids=lambda router: router.system.name
)


def new_router(made: type[Router]) -> Router:
    """Weights of size 1, as small ones make ties, and the same at every call; in evaluation mode."""
    table = {"num_ids": 2} if "num_ids" in inspect.signature(made.__init__).parameters else {}
    router = make_router(made.system.name, D, made.default_num_experts, made.default_top_k, table, seed=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return router.eval()


def tokens(made: type[Router], count: int) -> tuple[Tensor, ...]:
    """What `forward` takes: tokens, as one group where the router reads groups, and ids where it reads any."""
    x = torch.randn(1, count, D) if made.reads_groups else torch.randn(count, D)
    return (x, torch.arange(count) % 2) if issubclass(made, IdRouter) else (x,)


def changed_at(given: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    """Another token at one place; the ids stay."""
    x = given[0].clone()
    x[..., place, :] = torch.randn(D)
    return (x, *given[1:])


@routing_tokens
@pytest.mark.parametrize("count", [1, 8])
def test_contract(made: type[Router], count: int) -> None:
    """Protects: shapes, dtypes and ranges that every reader of a route relies on; no expert twice for a head."""
    router, given = new_router(made), tokens(made, count)
    weights, experts = router(*given)[:2]
    assert weights.shape == experts.shape == (count, router.num_slots)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int64)
    assert weights.isfinite().all()
    assert ((experts >= -1) & (experts < router.num_experts)).all()
    for row in experts.view(-1, router.num_slots // getattr(router, "heads", 1)):
        used = row[row >= 0]
        assert len(used.unique()) == len(used)


@every_router
def test_inference_is_deterministic(made: type[Router]) -> None:
    """Protects: no noise outside training: the global generator makes no difference, and is left alone."""
    router, given = new_router(made), tokens(made, 16)
    first = router(*given)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, router(*given), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@routing_tokens
def test_routes_in_fp32(made: type[Router]) -> None:
    """Protects: the routes of bf16 tokens are those of the same numbers in fp32."""
    router, (x, *ids) = new_router(made), tokens(made, 64)
    x = x.bfloat16()
    weights, experts = router(x, *ids)[:2]
    assert weights.dtype == torch.bfloat16
    assert torch.equal(experts, router(x.float(), *ids)[1])


@routing_tokens
@pytest.mark.parametrize("weights", ["native", "one", "sum"])
def test_weights_keep_the_rule_that_is_declared(made: type[Router], weights: Any) -> None:
    """Protects: `rule`, from which the conversion concludes that the start is exact."""
    if issubclass(made, UnitRouter) and weights == "sum":
        pytest.skip("the parts of a split are never averaged")
    router, given = new_router(made), tokens(made, 16)
    router.weights = weights
    routing_weights, experts = router(*given)[:2]
    used = experts >= 0
    if router.rule == "one":
        assert torch.equal(routing_weights[used], torch.ones(int(used.sum())))
    if router.rule == "sum":
        sums = torch.where(used, routing_weights, 0).sum(-1)[used.any(-1)]
        torch.testing.assert_close(sums, torch.ones(len(sums)))


@routing_tokens
def test_causal_as_declared(made: type[Router]) -> None:
    """Protects: claim 21: a later token never moves the route of an earlier one, to the last bit."""
    router = new_router(made)
    if not router.causal:
        pytest.skip("declared non-causal: a causal model refuses it")
    given = tokens(made, 16)
    before = router(*given)[:2]
    for seed in range(8):
        torch.manual_seed(seed)
        after = router(*changed_at(given, -1))[:2]
        assert all(torch.equal(a[:-1], b[:-1]) for a, b in zip(before, after, strict=True))


@routing_tokens
def test_batch_invariant_as_declared(made: type[Router]) -> None:
    """Protects: claim 21: alone as in a batch: the same experts, weights to rounding."""
    router = new_router(made)
    if not router.batch_invariant:
        pytest.skip("declared to depend on the other tokens")
    x, *ids = tokens(made, 9)
    weights, experts = router(x, *ids)[:2]
    for i in range(9):
        alone = router(x[..., i : i + 1, :], *(part[i : i + 1] for part in ids))
        assert torch.equal(experts[i], alone[1][0])
        torch.testing.assert_close(weights[i], alone[0][0], rtol=1e-5, atol=1e-6)


@routing_tokens
def test_compiles_in_one_graph(made: type[Router]) -> None:
    """Protects: `torch.compile` of a converted model does not break at its routers."""
    torch.compiler.reset()
    router, given = new_router(made), tokens(made, 6)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), router(*given), strict=True))


@every_router
def test_gradients_of_the_losses(made: type[Router]) -> None:
    """Protects: what `aux_loss` passes on to the router is its derivative, by finite differences in fp64."""
    torch.manual_seed(0)
    router, (x, *ids) = new_router(made).double().train(), tokens(made, 9)
    own = {name: parameter for name, parameter in router.named_parameters() if parameter.requires_grad}

    def aux_loss(*values: Tensor) -> Tensor:
        torch.manual_seed(0)  # the noise of every call is the same
        called = copy.deepcopy(router)
        torch.func.functional_call(called, dict(zip(own, values, strict=True)), (x.double(), *ids))
        if isinstance(called, PolicyRouter):
            called.give_reward(torch.arange(9.0).double())
        return called.aux_loss()

    values = [parameter.detach().clone().requires_grad_() for parameter in own.values()]
    if not aux_loss(*values).requires_grad:
        pytest.skip("no loss that a gradient comes from")
    assert torch.autograd.gradcheck(aux_loss, values, eps=1e-7, atol=1e-5, rtol=1e-3)


class Pipeline:
    """Converts one decoder with any router, once, and runs it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.dense = GPT(GPTConfig(VOCABULARY, 16, D, 32, 2, 1)).eval()
        self._known: dict[str, SparseModel] = {}

    def convert(self, made: type[Router], **options: Any) -> SparseModel:
        """By the defaults of the catalogue, with `start="split"` where the router passes no gradient on."""
        key = f"{made.system.name} {options}"
        if key not in self._known:
            given: dict[str, Any] = {
                "router": made.system.name,
                "start": "split" if issubclass(made, UnitRouter) else "upcycle",
                "num_experts": made.default_num_experts,
                "top_k": made.default_top_k,
                "select": "all",
                "allow_non_causal": True,
                **options,
            }
            self._known[key] = sparsify(self.dense, (IDS,), self.labels(made, 2), **given)
        return copy.deepcopy(self._known[key])

    def labels(self, made: type[Router], count: int) -> dict[str, Any]:
        """The added input of routers that go by labels."""
        return {"expert_labels": LABELS[:count]} if "labels" in made.system.needs else {}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Shared by the tests of this file: a conversion takes a second."""
    return Pipeline()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@every_router
def test_starts_as_it_says(made: type[Router], pipeline: Pipeline) -> None:
    """Protects: promise 1: the start is the dense model, for other tokens too; or the report states the gap."""
    sparse, other = pipeline.convert(made), IDS.flip(1)
    (ffn,) = sparse.report.converted
    (router,) = sparse.routers.values()
    assert ffn.receipt is not None
    assert ffn.receipt <= EXACT
    difference = relative(sparse(other, **pipeline.labels(made, 2)), pipeline.dense(other))
    if not issubclass(made, UnitRouter) and router.start_sum is not None:
        assert difference <= EXACT
    elif not issubclass(made, UnitRouter):
        assert ffn.error is not None
        assert ffn.error > EXACT
        assert any("not the dense model" in note for note in sparse.report.notes)


@pytest.mark.parametrize(
    "made", [router for router in ROUTERS if router.reads_groups], ids=lambda router: router.system.name
)
def test_groups_of_a_later_layer(made: type[Router]) -> None:
    """Protects: sequences that the model flattens are found in every layer, while the layers before it are experts."""
    dense = GPT(GPTConfig(VOCABULARY, 16, D, 32, 2, 2)).eval()
    options: dict[str, Any] = {"num_experts": made.default_num_experts, "top_k": made.default_top_k, "select": "all"}
    sparse = sparsify(dense, (IDS,), router=made.system.name, start="upcycle", allow_non_causal=True, **options)
    assert len(sparse.report.converted) == 2
    assert sparse(IDS[:1, :6]).shape == (1, 6, VOCABULARY)


@routing_tokens
def test_an_option_makes_the_start_exact(made: type[Router], pipeline: Pipeline) -> None:
    """Protects: `exact_start`: where every token gets its experts, any router of copies starts as the dense model."""
    if issubclass(made, UnitRouter):
        pytest.skip("a split is exact with all experts on, which other tests hold it to")
    sparse, other = pipeline.convert(made, exact_start=True), IDS.flip(1)
    labels = pipeline.labels(made, 2)
    served = sparse.routing_stats([((other,), labels)]).unrouted_share == 0
    assert not served or relative(sparse(other, **labels), pipeline.dense(other)) <= EXACT


@every_router
def test_earlier_outputs_stay(made: type[Router], pipeline: Pipeline) -> None:
    """Protects: claim 21 of the whole model: another last token leaves the outputs of earlier ones as they were."""
    sparse, labels, other = pipeline.convert(made).eval(), pipeline.labels(made, 2), IDS.clone()
    (router,) = sparse.routers.values()
    if not router.causal:
        pytest.skip("declared non-causal: a causal model refuses it")
    generator = torch.Generator().manual_seed(0)
    for parameter in [*router.parameters(), *sparse.get_submodule("h.0.mlp.experts").parameters()]:
        parameter.data += torch.randn(parameter.shape, generator=generator)  # experts and routes that differ
    other[:, -1] = (other[:, -1] + 1) % VOCABULARY
    before, after = sparse(IDS, **labels), sparse(other, **labels)
    assert relative(after[:, :-1], before[:, :-1]) <= 1e-6
    assert relative(after[:, -1], before[:, -1]) > 1e-3


@every_router
def test_exports(made: type[Router], pipeline: Pipeline, tmp_path: Path) -> None:
    """Protects: promise 4: the inference form runs in onnxruntime with the same experts, weights and outputs."""
    report = export_onnx(pipeline.convert(made).eval(), tmp_path / "model.onnx", routing_outputs=True)
    assert report.parity is not None
    assert report.parity.max_relative_error <= 1e-4
    names = [output.name for output in onnx.load(tmp_path / "model.onnx").graph.output]
    assert names[1:] == ["h.0.mlp.expert_ids", "h.0.mlp.routing_weights"]


@every_router
def test_saves_and_loads(made: type[Router], pipeline: Pipeline, tmp_path: Path) -> None:
    """Protects: a loaded model computes the same, bit by bit, and its router has the same options."""
    sparse, labels = pipeline.convert(made).eval(), pipeline.labels(made, 2)
    sparse.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert torch.equal(loaded(IDS, **labels), sparse(IDS, **labels))
    assert [r.options() for r in loaded.routers.values()] == [r.options() for r in sparse.routers.values()]


@every_router
def test_trains(made: type[Router], pipeline: Pipeline) -> None:
    """Protects: `loss + aux_loss()` falls, router weights get finite gradients, and a saved state resumes exactly."""
    step = Training(pipeline.convert(made).train(), pipeline.labels(made, 2))
    losses = [step() for _ in range(12)]
    assert min(losses[-3:]) < losses[0] - 0.3
    for name, parameter in step.sparse.named_parameters():
        if ".router." in name and parameter.requires_grad and made not in NEVER_READ.get(name.rpartition(".")[2], ()):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    resumed = Training(pipeline.convert(made).train(), pipeline.labels(made, 2))
    resumed.load(copy.deepcopy(step.state()))
    torch.manual_seed(3)
    expected = [step() for _ in range(3)]
    torch.manual_seed(3)
    assert [resumed() for _ in range(3)] == expected


# Parameters that no gradient of one model reaches, by name: the routers that leave them so.
NEVER_READ: dict[str, tuple[type[Router], ...]] = {}


class Training:
    """Steps on one batch."""

    def __init__(self, sparse: SparseModel, labels: dict[str, Any]) -> None:
        self.sparse, self.labels = sparse, labels
        self.optimizer = torch.optim.Adam(sparse.parameters(), lr=1e-2)
        self.rewarded = any("reward" in router.system.needs for router in sparse.routers.values())

    def __call__(self) -> float:
        logits = self.sparse(IDS, **self.labels)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        if self.rewarded:
            self.sparse.give_reward(-loss)
        self.optimizer.zero_grad()
        (loss + self.sparse.aux_loss()).backward()
        self.optimizer.step()
        self.sparse.after_step()
        return loss.item()

    def state(self) -> list[Any]:
        return [self.sparse.state_dict(), self.optimizer.state_dict()]

    def load(self, state: list[Any]) -> None:
        self.sparse.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
