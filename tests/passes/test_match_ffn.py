"""`match_ffn`: FFNs are found by their data flow, near misses are refused with the true reason and node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
import transformers
from torch import Tensor, nn

from sparsify.models.bert import Bert, BertConfig
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.models.vit import ViT, ViTConfig
from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import FFNMatch, Rejection, match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass

IDS = torch.randint(0, 256, (2, 5))


def find(model: nn.Module, *args: Tensor) -> tuple[list[FFNMatch], list[Rejection]]:
    """Capture, normalise, match."""
    return match_ffn(NormalizeLinearPass()(capture(model, args)).graph_module)


MODELS = {
    "bert": (lambda: Bert(BertConfig()), "plain", "gelu"),
    "gpt": (lambda: GPT(GPTConfig()), "plain", "gelu_tanh"),
    "llama": (lambda: Llama(LlamaConfig()), "gated", "silu"),
    "llama, fused gate and up": (lambda: Llama(LlamaConfig(fused_gate_up=True)), "gated", "silu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_finds_every_ffn_of_a_model(name: str) -> None:
    """Protects: addmm, linear, chunked projections; and that attention is never mistaken for an FFN."""
    build, kind, activation = MODELS[name]
    matches, rejections = find(build(), IDS)
    assert [(m.kind, m.activation, m.hidden_size, m.intermediate_size) for m in matches] == [
        (kind, activation, 64, 256)
    ] * 2
    assert not rejections


def test_finds_the_ffns_of_a_vision_model() -> None:
    """Protects: another modality, without a line for it."""
    matches, rejections = find(ViT(ViTConfig()), torch.randn(2, 3, 32, 32))
    assert [match.kind for match in matches] == ["plain"] * 2
    assert not rejections


def test_the_gate_of_a_fused_projection() -> None:
    """Protects: the rows of a fused weight that belong to gate and to up."""
    (match, _), _ = find(Llama(LlamaConfig(fused_gate_up=True)), IDS)
    found = [(projection.role, projection.rows) for projection in match.projections]
    assert found == [("gate_proj", range(256)), ("up_proj", range(256, 512))]


class FFN(nn.Module):
    """Projections from 8 to 16 and back, with whatever `between` computes."""

    def __init__(self, between: Callable[[FFN, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.up, self.gate, self.other = (nn.Linear(8, 16) for _ in range(3))
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.rand(16))
        self.by_token = nn.Parameter(torch.rand(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


ACCEPTED = {
    "dropout and cast": lambda m, x: m.down(functional.dropout(torch.relu(m.up(x)).double().float(), 0.1, m.training)),
    "learned scale": lambda m, x: m.down(torch.relu(m.up(x)) * m.scale),
    "in place": lambda m, x: m.down(functional.relu(m.up(x), inplace=True)),
    "tokens regrouped": lambda m, x: m.down(torch.relu(m.up(x.reshape(-1, 8))).view(2, 5, 16)),
    "three projections": lambda m, x: m.down(torch.relu(m.up(x)) * m.gate(x) + m.other(x)),
    "size read off the hidden": lambda m, x: m.down(torch.relu(m.up(x))).view(m.up(x).shape[0], -1, 8),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    """Protects: everything neuron-wise in between is allowed."""
    matches, rejections = find(FFN(ACCEPTED[name]), torch.randn(2, 5, 8))
    assert len(matches) == 1
    assert not rejections


def twice(model: FFN, x: Tensor) -> Tensor:
    hidden = torch.relu(model.up(x))
    return model.down(hidden) + hidden.mean()


def outer_product(model: FFN, x: Tensor) -> Tensor:
    gate = torch.sigmoid(model.gate(x))
    return model.down(gate.unsqueeze(1) * model.up(x).unsqueeze(2))


REFUSED: dict[str, tuple[Callable[[FFN, Tensor], Tensor], str, str]] = {
    "norm": (lambda m, x: m.down(m.norm(torch.relu(m.up(x)))), "`layer_norm` stands between", "layer_norm"),
    "softmax": (lambda m, x: m.down(torch.relu(m.up(x)).softmax(-1)), "`softmax` stands between", "softmax"),
    "second reader": (twice, "`mean` also reads the intermediate values", "mean"),
    "two inputs": (
        lambda m, x: m.down(torch.relu(m.gate(x)) * m.up(x * 2)),
        "its projections read different inputs",
        "linear_1",
    ),
    "a foreign value": (lambda m, x: m.down(torch.relu(m.up(x)) * m.by_token), "differs by token", "by_token"),
    "tokens multiplied": (outer_product, "broadcasts over tokens", "mul"),
    "computed weight": (
        lambda m, x: m.down(torch.relu(functional.linear(x, m.up.weight + m.gate.weight))),
        "its weight is computed from several parameters",
        "linear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    """Protects: no wrong rewrite; the reason and the node to blame."""
    between, reason, node = REFUSED[name]
    matches, rejections = find(FFN(between), torch.randn(2, 5, 8))
    assert not matches
    assert len(rejections) == 1
    assert reason in rejections[0].reason
    assert rejections[0].node == node


def test_layers_that_overlap_or_share_weights() -> None:
    """Protects: a linear layer or a weight is never taken twice."""
    chain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    matches, rejections = find(chain, torch.randn(2, 8))
    assert [match.name for match in matches] == ["ffn0"]
    assert "belongs to the FFN ffn0" in rejections[0].reason
    ffn = FFN(ACCEPTED["learned scale"])
    matches, rejections = find(nn.Sequential(ffn, ffn), torch.randn(2, 5, 8))
    assert [len(match.sites) for match in matches] == [2]
    assert not rejections


def test_experts_that_are_there_already() -> None:
    """Protects: an MoE layer that multiplies its experts in one grouped op is listed, and not converted."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=99,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        use_cache=False,
    )
    matches, rejections = find(transformers.Qwen3MoeModel(config).eval(), torch.randint(0, 99, (2, 5)))
    assert not matches
    assert ["as experts of a Mixture-of-Experts layer have" in rejection.reason for rejection in rejections] == [True]


class NamedLikeOps(nn.Module):
    """Inputs and weights that are called like ops."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Parameter(torch.randn(16, 8))
        self.grouped_mm = nn.Parameter(torch.randn(8, 16))

    def forward(self, cat: Tensor, index: Tensor, mul: Tensor) -> Tensor:
        hidden = torch.relu(functional.linear(cat, self.relu))
        return functional.linear(hidden, self.grouped_mm) + functional.linear(torch.relu(index) + mul, self.grouped_mm)


def test_names_of_ops_mean_nothing() -> None:
    """Protects: only calls are ops, whatever inputs and weights are called."""
    matches, _ = find(NamedLikeOps(), torch.randn(2, 8), torch.randn(2, 16), torch.randn(2, 16))
    assert [match.activation for match in matches] == ["relu"]


class TiedTwice(nn.Module):
    """Down is the transpose of up; the second call spells both with views that change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(torch.relu(functional.linear(x, self.weight)), self.weight.t())
        again = self.weight.flatten(1).view(16, 8)[:]
        return functional.linear(torch.relu(functional.linear(y, again)), again.reshape(16, 8).t())


def test_weights_shared_through_other_views() -> None:
    """Protects: one bank of experts, however the sites spell the same weight (found by the fuzzer)."""
    matches, _ = find(TiedTwice(), torch.randn(2, 5, 8))
    assert [len(match.sites) for match in matches] == [2]


def test_matching_does_not_mutate() -> None:
    """Protects: `inspect` can be called on anything at any time."""
    graph_module = NormalizeLinearPass()(capture(GPT(GPTConfig()), (IDS,))).graph_module
    before = str(graph_module.graph)
    assert match_ffn(graph_module) == match_ffn(graph_module)
    assert str(graph_module.graph) == before
