"""`convert`: layer after layer, on what is converted already, towards the hidden state of the dense model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify import SparsifyConfig
from sparsify.errors import VerificationError
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.passes import convert as module
from sparsify.passes.calibrate import CalibrationStream, as_call
from sparsify.passes.capture import capture
from sparsify.passes.convert import convert
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.plan import make_plan
from sparsify.passes.residual import residual_terms, sums_behind
from sparsify.passes.split.dense_ffn import read_ffn
from sparsify.passes.split.sample import Part, Sample

CONFIG = SparsifyConfig(num_experts=4, top_k=2, router_hidden_size=8)
IDS = torch.randint(0, 256, (4, 16))


def captured(model: nn.Module) -> GraphModule:
    return NormalizeLinearPass()(capture(model.eval(), (IDS[:2],))).graph_module


def run(graph_module: GraphModule, config: SparsifyConfig, calibration: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Convert everything that `config` selects; return the calls of `progress`."""
    matches, _ = match_ffn(graph_module)
    calls: list[tuple[int, int]] = []
    plan = make_plan(matches, config)
    batches = [as_call(batch) for batch in calibration]
    convert(graph_module, matches, plan, config, batches, as_call(IDS[:2]), lambda *call: calls.append(call))
    graph_module.recompile()
    return calls


@pytest.mark.parametrize("model", [Bert(BertConfig()), GPT(GPTConfig())], ids=["post-norm", "pre-norm"])
def test_the_target_leads_back_to_the_dense_model(model: nn.Module) -> None:
    """Protects: with the wanted output, the second block of the converted model ends where the dense one's does."""
    graph_module = captured(model)
    dense_module = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    first, second = match_ffn(graph_module)[0]
    run(graph_module, replace(CONFIG, select=first.name), [IDS])
    reference, stream = CalibrationStream(dense_module, [as_call(IDS)]), CalibrationStream(graph_module, [as_call(IDS)])
    down = next(node for node in graph_module.graph.nodes if node.name == second.sites[0].down)
    (residual,) = residual_terms(down)
    (sample,) = module._samples(reference, stream, graph_module, second, ())
    held = [node.name for node in reference._environments[0] if node.op == "call_function"]
    assert held == [sums_behind(down)[-1].name]  # the hidden state, not what it is a sum of
    streams = CalibrationStream(dense_module, [as_call(IDS)]), CalibrationStream(graph_module, [as_call(IDS)])
    with torch.no_grad():
        (dense_x, dense_r), (x, r) = (s.tokens_at([(second.sites[0].x, -1), (residual.name, -1)], "") for s in streams)
        wanted = dense_r + read_ffn(dense_module, second)(dense_x)
    assert float((x - dense_x).norm() / dense_x.norm()) > 1e-3  # the first layer did change something
    torch.testing.assert_close(sample.x, x)
    torch.testing.assert_close(r + sample.target, wanted, rtol=1e-5, atol=1e-5)


def test_tokens_on_disk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the same weights, bit by bit, wherever tokens are kept."""
    model = GPT(GPTConfig())
    batches = [torch.randint(0, 256, (rows, 32)) for rows in (8, 24, 16)]  # not in the order of their size
    results: list[dict[str, Tensor]] = []
    for on_disk in (False, True):
        monkeypatch.setattr(module, "_belong_on_disk", lambda *_, on_disk=on_disk: on_disk)
        graph_module = captured(copy.deepcopy(model))
        run(graph_module, replace(CONFIG, distill_steps=10), batches)
        results.append(graph_module.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_tokens_belong_on_disk_where_they_outweigh_the_model() -> None:
    """Protects: small models with much text; large ones keep their tokens in memory, which is faster."""
    graph_module = captured(GPT(GPTConfig()))
    matches, _ = match_ffn(graph_module)
    weights = sum(parameter.numel() for parameter in graph_module.parameters())
    features = read_ffn(graph_module, matches[0]).down.weight.shape[0]
    few, many = (as_call(IDS.new_zeros(1, weights // (4 * features) + more)) for more in (0, 1))
    assert not module._belong_on_disk([few], graph_module, matches)
    assert module._belong_on_disk([many], graph_module, matches) == (sys.platform == "linux")
    assert not module._belong_on_disk([many], graph_module.to("meta"), matches)


def test_a_converted_layer_is_one_op_while_later_ones_are_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the time of a conversion, in which all tokens run through what is converted already."""
    graph_module, seen, hold_out = captured(GPT(GPTConfig())), [], module.hold_out

    def spy(parts: Iterator[Part], *, on_disk: bool) -> tuple[Sample, Sample]:
        seen.append(len(graph_module.graph.find_nodes(op="call_function", target=torch.ops.sparsify.moe_ffn.default)))
        return hold_out(parts, on_disk=on_disk)

    monkeypatch.setattr(module, "hold_out", spy)
    run(graph_module, CONFIG, [IDS])
    assert seen == [0, 1]


class _Parallel(nn.Module):
    """Two FFNs that read the same hidden state and are added to it in either order, both after they were computed."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16)
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = [ffn(h) for ffn in self.ffns]
        return self.head(x + parts[self.first] + parts[1 - self.first])


@pytest.mark.parametrize("first", [0, 1])
def test_ffns_side_by_side(first: int) -> None:
    """Protects: the dense stream does not run past an FFN that is still to be converted."""
    x = torch.randn(40, 5, 16)
    graph_module = NormalizeLinearPass()(capture(_Parallel(first).eval(), (x[:2],))).graph_module
    assert run(graph_module, replace(CONFIG, select="all"), [x]) == [(0, 2), (1, 2), (2, 2)]


def test_progress_and_order() -> None:
    """Protects: layers are announced one by one."""
    assert run(captured(Bert(BertConfig())), CONFIG, [IDS]) == [(0, 2), (1, 2), (2, 2)]


def test_a_receipt_that_does_not_hold_stops_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: no layer is put in place before it is proven; the fault cannot be provoked with correct code."""
    graph_module = captured(Bert(BertConfig()))
    before = str(graph_module.graph)
    make = module.make_experts
    monkeypatch.setattr(module, "make_experts", lambda *a, **k: replace(make(*a, **k), receipt=1e-3))
    with pytest.raises(VerificationError, match=r"layers\.0\.ffn: with all experts on"):
        run(graph_module, CONFIG, [IDS])
    assert str(graph_module.graph) == before
