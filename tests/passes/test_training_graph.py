"""`routed_ffns` and `expert_outputs`: what light training reads off a converted model is what the model computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from sparsify import SparseModel, sparsify
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.capture import capture
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.bf16_products import has_bf16_products
from sparsify.passes.split.choice_loss import choose
from sparsify.passes.training_graph import TracingInterpreter, expert_outputs, routed_ffns
from sparsify.routers import UnitRouter

IDS = torch.randint(0, 256, (2, 8))


def converted() -> tuple[SparseModel, GraphModule]:
    """A converted encoder, and the graph of the dense one."""
    torch.manual_seed(0)
    model = Bert(BertConfig()).eval()
    sparse = sparsify(model, IDS, num_experts=4, top_k=2, num_shared_experts=0, select="all")
    return sparse, NormalizeLinearPass()(capture(model, (IDS,))).graph_module


@torch.no_grad()
def test_the_outputs_of_the_chosen_experts_add_up() -> None:
    """Protects: gains are computed from what the experts of this layer really add."""
    sparse, dense = converted()
    for ffn in routed_ffns(sparse, dense):
        flat = ffn.router_call.all_input_nodes[0].name
        interpreter = TracingInterpreter(sparse, [flat, ffn.mixed.name])
        interpreter.run(IDS, enable_io_processing=False)
        x = interpreter.kept[flat]
        router = sparse.routers[ffn.name]
        assert isinstance(router, UnitRouter)
        chosen = choose(router.logits(x), 2)
        added = expert_outputs(ffn, x, 4)
        expected = (added * chosen.unsqueeze(2)).sum(1)
        torch.testing.assert_close(interpreter.kept[ffn.mixed.name], expected, rtol=1e-4, atol=1e-5)


def test_the_hidden_state_is_behind_the_residual_connection() -> None:
    """Protects: the value that both models call the same is compared, not the bare output of the FFN."""
    sparse, dense = converted()
    ffns = routed_ffns(sparse, dense)
    assert [ffn.name for ffn in ffns] == ["layers.0.ffn", "layers.1.ffn"]
    names = {node.name for node in dense.graph.nodes}
    assert all(ffn.hidden.name in names and str(ffn.hidden.target).startswith("aten.add") for ffn in ffns)


class _WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.dropout(self.down(functional.gelu(self.up(x))))).cos()


def test_a_loaded_model_is_compared_at_the_same_place(tmp_path: Path) -> None:
    """Protects: the hidden state behind dropout and the residual connection, where shapes of values are not known."""
    model, x = _WithDropout().eval(), torch.randn(5, 8)
    dense = NormalizeLinearPass()(capture(model, (x,))).graph_module
    sparse = sparsify(model, x, num_experts=4, top_k=2, select="all")
    sparse.save(tmp_path)
    places = [routed_ffns(each, dense)[0].hidden for each in (sparse, SparseModel.load(tmp_path))]
    assert [str(place.target) for place in places] == ["aten.add.Tensor"] * 2
    assert places[0].name == places[1].name


def test_detached_nodes_send_no_gradient_back() -> None:
    """Protects: training within blocks."""
    sparse, dense = converted()
    first, second = routed_ffns(sparse, dense)
    for detach in ([], [first.hidden.name]):
        interpreter = TracingInterpreter(sparse, [second.hidden.name], detach=detach)
        interpreter.run(IDS, enable_io_processing=False)
        parameter = sparse.get_parameter("layers.0.ffn.experts.down_proj")
        hidden = interpreter.kept[second.hidden.name]
        (gradient,) = torch.autograd.grad(hidden.sum(), parameter, allow_unused=True)
        assert (gradient is None) == bool(detach)


@pytest.mark.skipif(not has_bf16_products(torch.device("cpu"), torch.float32), reason="no products of bf16 here")
@torch.no_grad()
def test_products_are_rounded_where_that_is_faster() -> None:
    """Protects: the precision of a training: products in bf16, all else in fp32, and fp64 stays fp64."""
    sparse, dense = converted()
    kept = [ffn.mixed.name for ffn in routed_ffns(sparse, dense)]
    for model, differs in ((sparse, True), (copy.deepcopy(sparse).double(), False)):
        exact, rounded = (TracingInterpreter(model, kept, rounds=rounds) for rounds in (False, True))
        outputs = [interpreter.run(IDS, enable_io_processing=False)[0] for interpreter in (exact, rounded)]
        assert outputs[0].dtype == outputs[1].dtype
        assert rounded.kept[kept[0]].dtype == exact.kept[kept[0]].dtype
        assert torch.equal(outputs[0], outputs[1]) != differs
        assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.05
