"""Upcycling: copies, shards of copies and experts beside the whole FFN leave the dense model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparsifyConfig, sparsify
from sparsify.errors import SelectionError

DEFAULTS: dict[str, Any] = {"start": "upcycle", "num_experts": 4, "top_k": 2}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Block(nn.Module):
    """One FFN with biases of size 1, so that a bias that counts twice shows."""

    def __init__(self, activation: str, neurons: int = 24) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, neurons), ACTIVATIONS[activation](), nn.Linear(neurons, 8)
        nn.init.normal_(self.up.bias)
        nn.init.normal_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def upcycled(model: nn.Module, **options: Any) -> Any:
    config = SparsifyConfig(**{**DEFAULTS, **options})
    return sparsify(model, (torch.randn(3, 7, 8),), config=config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 4},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 6, "top_k": 4, "granularity": 2},
        {"start": "shared"},
        {"start": "shared", "granularity": 2},
    ],
)
def test_the_start_is_the_dense_model(activation: str, options: dict[str, Any]) -> None:
    """Protects: promise 1 for copies: exact to 1e-5 for every activation, with biases, at other sizes than traced."""
    torch.manual_seed(0)
    model, x = Block(activation), torch.randn(2, 11, 8)
    sparse = upcycled(model, **options)
    assert sparse.report.max_receipt <= 1e-5
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)


def test_copies_are_their_own() -> None:
    """Protects: training the experts, the whole FFN among them, never changes the model that was given."""
    model = Block("gelu")
    before = [parameter.clone() for parameter in model.parameters()]
    for start in ("upcycle", "shared"):
        for parameter in upcycled(model, start=start).parameters():
            parameter.data.fill_(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parameters_and_flops_grow_as_claimed() -> None:
    """Protects: claim 1: parameters are dense + (E - 1) N + D E, FLOPs are K FFNs and the router."""
    (ffn,) = upcycled(Block("relu"), num_experts=5, top_k=2).report.ffns
    weights = 2 * 8 * 24 + 24
    assert ffn.parameters_before == weights + 8
    assert ffn.parameters_after == 5 * weights + 8 + 8 * 5
    assert ffn.flops_after == 2 * ffn.flops_before + 2 * 8 * 5


def test_reinitialised_neurons_set_copies_apart() -> None:
    """Protects: Drop-Upcycling draws the given share of neurons anew, others in each expert, and keeps the receipt."""
    model = Block("relu")
    sparse = upcycled(model, reinitialise=0.5)
    (up,) = (weight for name, weight in sparse.named_parameters() if name.endswith("experts.up_proj"))
    kept = (up == model.up.weight).all(-1)  # [E, F]
    assert kept.sum(1).tolist() == [12] * 4
    assert not torch.equal(kept[0], kept[1])
    assert sparse.report.max_receipt <= 1e-5
    assert sparse.report.ffns[0].error > 0.1


def test_gradients_reach_experts_and_router() -> None:
    """Protects: a converted model trains."""
    sparse = upcycled(Block("gelu")).train()
    sparse(torch.randn(5, 4, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "copy"}, "start must be 'split', 'upcycle' or 'shared', got 'copy'"),
        ({"num_shared_experts": 1}, "takes parts of a split"),
        ({"granularity": 3}, r"num_experts must be a multiple of granularity \(3\)"),
        ({"start": "split", "granularity": 2}, "cuts copies"),
        ({"start": "shared", "reinitialise": 0.5}, "sets copies apart"),
        ({"reinitialise": 1.0}, "from 0 to below 1, got 1.0"),
        ({"router": "mlp"}, "passes no gradient on"),
        ({"router": "swich"}, "router must be one of"),
        ({"router_options": {"depth": 3}}, "router_options do not fit"),
    ],
)
def test_refuses_contradictions(options: dict[str, Any], message: str) -> None:
    """Protects: what cannot work is refused before any work."""
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**{**DEFAULTS, **options})


def test_refuses_shards_of_unequal_size() -> None:
    """Protects: shards divide the neurons evenly; else the FFN is named and told."""
    with pytest.raises(SelectionError, match="24 neurons do not fall into granularity=5 equal shards"):
        upcycled(Block("relu"), num_experts=5, top_k=5, granularity=5, select="all")
