"""`walk_back`: every spelling of an FFN is followed to its projections and exact once divided; near misses are refused.

Protects with `match_ffn` what lies under it: `neuron_axes`, `neuron_wise`, `linear_layer`, `constants`, `ffn_faults`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.passes.capture import capture
from sparsify.passes.insert_moe import InsertMoEPass
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import read_ffn
from sparsify.passes.split.experts import divide
from sparsify.routers import MLPRouter

D, NEURONS = 8, 16
TOKENS, PIXELS = torch.randn(2, 5, D), torch.randn(2, D, 3, 4)


class Model(nn.Module):
    """Layers to spell FFNs with."""

    def __init__(self, spelling: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.up, self.gate, self.down = nn.Linear(D, NEURONS), nn.Linear(D, NEURONS), nn.Linear(NEURONS, D)
        self.fused, self.square, self.over_tokens = nn.Linear(D, 2 * NEURONS), nn.Linear(D, D), nn.Linear(5, 5)
        self.wide, self.narrow = nn.Linear(5, 7), nn.Linear(7, 5)
        self.up_1d, self.down_1d = nn.Conv1d(D, NEURONS, 1), nn.Conv1d(NEURONS, D, 1)
        self.up_2d, self.down_2d, self.batch_norm = (
            nn.Conv2d(D, NEURONS, 1),
            nn.Conv2d(NEURONS, D, 1),
            nn.BatchNorm2d(16),
        )
        self.depthwise = nn.Conv1d(NEURONS, NEURONS, 3, padding=1, groups=NEURONS)
        self.grouped = nn.Conv1d(D, NEURONS, 1, groups=2)
        self.in_out, self.out_in = nn.Parameter(torch.randn(D, NEURONS)), nn.Parameter(torch.randn(NEURONS, D))
        self.scale, self.by_channel = nn.Parameter(torch.rand(NEURONS)), nn.Parameter(torch.rand(NEURONS, 1))
        self.bank_up, self.bank_down = (
            nn.Parameter(torch.randn(2, D, NEURONS)),
            nn.Parameter(torch.randn(2, NEURONS, D)),
        )
        self.prelu, self.norm = nn.PReLU(NEURONS), nn.LayerNorm(NEURONS)
        self.small, self.large = nn.Linear(D, 2, bias=False), nn.Linear(2, NEURONS, bias=False)
        self.register_buffer("int8", torch.randint(-9, 9, (NEURONS, D), dtype=torch.int8))
        nn.init.uniform_(self.batch_norm.get_buffer("running_mean"))
        nn.init.uniform_(self.batch_norm.get_buffer("running_var"), 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


def last(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def gated(m: Model, gate: Tensor, up: Tensor) -> Tensor:
    return m.down(F.silu(gate) * up)


FOUND: dict[str, tuple[Callable[[Model, Tensor], Tensor], Tensor]] = {
    "einsum": (
        lambda m, x: torch.einsum("bsf,fd->bsd", F.gelu(torch.einsum("bsd,df->bsf", x, m.in_out) + m.scale), m.out_in),
        TOKENS,
    ),
    "conv1d": (lambda m, x: last(m.down_1d(F.gelu(m.up_1d(last(x))))), TOKENS),
    "conv2d and batch norm": (lambda m, x: x + m.down_2d(F.relu(m.batch_norm(m.up_2d(x)))), PIXELS),
    "scale by channel": (lambda m, x: m.down_1d(F.gelu(m.up_1d(last(x))) * m.by_channel), TOKENS),
    "bmm": (
        lambda m, x: torch.bmm(
            F.silu(torch.bmm(x, m.in_out.unsqueeze(0).expand(x.shape[0], -1, -1))), m.out_in.expand(x.shape[0], -1, -1)
        ),
        TOKENS,
    ),
    "prelu": (lambda m, x: m.down_1d(m.prelu(m.up_1d(last(x)))), TOKENS),
    "glu": (lambda m, x: m.down(F.glu(m.fused(x))), TOKENS),
    "interleaved": (lambda m, x: gated(m, m.fused(x)[..., ::2], m.fused(x)[..., 1::2]), TOKENS),
    "view and unbind": (lambda m, x: gated(m, *m.fused(x).unflatten(-1, (NEURONS, 2)).unbind(-1)), TOKENS),
    "activation before the chunk": (lambda m, x: torch.mul(*m.fused(x).sigmoid().chunk(2, -1)) @ m.out_in, TOKENS),
    "chunked weight": (lambda m, x: gated(m, *(F.linear(x, w) for w in m.fused.weight.chunk(2))), TOKENS),
    "token mixing": (lambda m, x: x + last(m.narrow(F.gelu(m.wide(last(x))))), TOKENS),
    "two views of the input": (lambda m, x: gated(m, m.gate(x.reshape(-1, D)), m.up(x.reshape(-1, D))), TOKENS),
    "convolution, then linear": (lambda m, x: m.down(F.gelu(m.up_2d(x).permute(0, 2, 3, 1))), PIXELS),
    "gate by convolution": (lambda m, x: gated(m, last(m.up_1d(last(x))), m.up(x)), TOKENS),
    "computed scale": (lambda m, x: m.down(F.softplus(m.up(x) * m.scale.exp() + 1)), TOKENS),
    "tokens swapped and swapped back": (
        lambda m, x: m.down(F.relu(m.up(x)).transpose(0, 1).contiguous().transpose(0, 1)),
        TOKENS,
    ),
    "pixels flattened": (lambda m, x: m.down_1d(F.relu(m.up_2d(x)).flatten(2)), PIXELS),
    "twice": (lambda m, x: m.down(F.gelu(m.up(m.down(F.gelu(m.up(x)))))), TOKENS),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_and_exact(name: str) -> None:
    """Protects: the spelling is one match, and its experts, cut at random and all on, are the dense layer."""
    spelling, x = FOUND[name]
    model = Model(spelling).eval()
    graph_module = NormalizeLinearPass()(capture(model, (x,))).graph_module
    (match,), rejections = match_ffn(graph_module)
    assert not rejections
    assert len(match.sites) == (2 if name == "twice" else 1)
    dense = read_ffn(graph_module, match)
    neurons = torch.randperm(match.intermediate_size)
    neurons = torch.cat([neurons, neurons.new_full((-len(neurons) % 4,), -1)]).view(4, -1)
    router = MLPRouter(match.hidden_size, 4, 4, 4)
    InsertMoEPass(match, divide(dense, neurons, 0), router, dense.dtypes, dense.requires_grad)(graph_module)
    for tokens in (x, torch.cat([x, 2 * x])):
        torch.testing.assert_close(graph_module(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_equal_sizes_that_are_written_differently() -> None:
    """Protects: where the model makes two dimensions equal, torch writes s and s**2 // s for the same size."""

    def square(m: Model, x: Tensor) -> Tensor:
        x = x + m.square(x.transpose(0, 1))
        return gated(m, last(m.up_1d(last(x))), m.up(x))

    graph_module = capture(Model(square).eval(), (torch.randn(5, 5, D),))
    graph_module = NormalizeLinearPass()(graph_module).graph_module
    (product,) = (node for node in graph_module.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
    sizes = {str(node.meta["val"].shape[1]) for node in product.all_input_nodes}
    assert len(sizes) == 2, f"torch now writes {sizes}: this test needs another model"
    matches, _ = match_ffn(graph_module)
    assert len(matches) == 1


def spatial_gate(m: Model, x: Tensor) -> Tensor:
    u, v = F.gelu(m.fused(x)).chunk(2, -1)
    return m.down(u * last(m.over_tokens(last(v))))


def overwritten(m: Model, x: Tensor) -> Tensor:
    x = x * 2
    hidden = F.relu(m.up(x))
    x.add_(1)
    return m.down(hidden)


REFUSED: dict[str, tuple[Callable[[Model, Tensor], Tensor], str]] = {
    "depthwise convolution": (lambda m, x: m.down(last(m.depthwise(last(m.up(x))).relu())), "`conv1d` stands between"),
    "norm of a product": (lambda m, x: m.down(m.norm(F.silu(m.gate(x)) * m.up(x))), "`layer_norm` stands between"),
    "spatial gating": (spatial_gate, "mixes tokens"),
    "experts": (lambda m, x: torch.bmm(F.relu(torch.bmm(x, m.bank_up)), m.bank_down), "one matrix per group or expert"),
    "grouped convolution": (lambda m, x: m.down_1d(F.relu(m.grouped(last(x)))), "one matrix per group or expert"),
    "random dropout": (lambda m, x: m.down(F.dropout(F.relu(m.up(x)), 0.5, True)), "`dropout` stands between"),
    "quantised": (lambda m, x: m.down(F.relu(F.linear(x, m.get_buffer("int8").float() * 0.1))), "is quantised"),
    "adapter": (lambda m, x: m.down(F.relu(m.up(x) + m.large(m.small(x)))), "low-rank adapter"),
    "one value per token": (
        lambda m, x: m.down(F.relu(m.up(x)) * m.square(x)[..., :1].sigmoid()),
        "one value per token",
    ),
    "neurons rolled": (lambda m, x: m.down(F.relu(m.up(x)).roll(1, -1)), "`roll` stands between"),
    "input overwritten": (overwritten, "overwrites the input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    """Protects: near misses are not converted, and say why."""
    spelling, reason = REFUSED[name]
    matches, rejections = match_ffn(NormalizeLinearPass()(capture(Model(spelling).eval(), (TOKENS,))).graph_module)
    assert not matches
    assert reason in rejections[0].reason


@pytest.mark.parametrize(
    "spelling",
    [lambda m, x: m.down(m.up(x)), lambda m, x: m.down(F.relu(m.up(x)).transpose(0, 1))],
    ids=["no activation", "tokens in another order"],
)
def test_resembles_nothing(spelling: Callable[[Model, Tensor], Tensor]) -> None:
    """Protects: what is no FFN is neither converted nor listed as one that failed."""
    found = match_ffn(NormalizeLinearPass()(capture(Model(spelling).eval(), (TOKENS,))).graph_module)
    assert found == ([], [])
