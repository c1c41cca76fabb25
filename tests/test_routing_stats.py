"""`routing_stats` against counts by hand; `plot` writes a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, sparsify
from sparsify.models.bert import Bert, BertConfig
from sparsify.routers import Router
from sparsify.routing_stats import RoutingRecorder, record_routing

IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def sparse() -> SparseModel:
    """Two layers, six experts of which two run."""
    torch.manual_seed(0)
    model = Bert(BertConfig()).eval()
    options: dict[str, Any] = {"start": "upcycle", "num_experts": 6, "top_k": 2, "select": "all"}
    return sparsify(model, (), {"input_ids": IDS, "attention_mask": MASK}, **options)


def test_counts_every_token_that_is_no_padding(sparse: SparseModel) -> None:
    """Protects: loads, co-occurrence and ids are those of the routes, over all batches."""
    routes: list[Tensor] = []
    (name, router), *_ = sparse.routers.items()
    handle = router.register_forward_hook(lambda _m, _i, route: routes.append(route[1][MASK.flatten().bool()]))
    batch = {"input_ids": IDS, "attention_mask": MASK}
    stats = sparse.routing_stats([batch, batch])
    handle.remove()
    pairs = [row.tolist() for row in torch.cat(routes)]
    layer, ids = stats[name], IDS[MASK.bool()].tolist() * 2
    assert layer.tokens == 16
    assert layer.tokens_per_expert == tuple(sum(e in pair for pair in pairs) for e in range(6))
    assert layer.max_load == max(layer.tokens_per_expert) * 6 / 32
    assert layer.experts_per_token == 2
    assert layer.unrouted_tokens == 0
    for a in range(6):
        assert layer.together[a].tolist() == [sum(a in pair and b in pair for pair in pairs) for b in range(6)]
        for token, count in layer.top_ids(a):
            assert count == sum(a in pair for pair, i in zip(pairs, ids, strict=True) if i == token)
    assert len(stats.layers) == 2


def test_is_quiet_about_the_model(sparse: SparseModel) -> None:
    """Protects: mode and hooks are as before."""
    sparse.train()
    sparse.routing_stats([{"input_ids": IDS, "attention_mask": MASK}])
    assert sparse.training
    assert not [m for m in sparse.modules() if isinstance(m, Router) and m._forward_hooks]


def test_collapse_and_balance() -> None:
    """Protects: 1 and 0 at perfect balance, E and sqrt(E - 1) at collapse; slots that are not used do not count."""
    recorder = RoutingRecorder(dict.fromkeys(("even", "one", "none"), 4))
    recorder.add("even", torch.arange(8).view(4, 2) % 4)
    recorder.add("one", torch.tensor([[2, -1]] * 4))
    recorder.add("none", torch.full((4, 2), -1))
    even, one, none = recorder.stats().layers
    assert (even.max_load, even.load_variation, even.idle_experts, even.unrouted_share) == (1.0, 0.0, 0, 0.0)
    assert (one.max_load, one.load_variation, one.idle_experts) == (4.0, pytest.approx(3**0.5), 3)
    assert (none.max_load, none.unrouted_share, none.experts_per_token) == (0.0, 1.0, 0.0)
    with pytest.raises(LookupError, match="no input of the model gives an id"):
        even.top_ids(0)


def test_fewer_slots_from_call_to_call() -> None:
    """Protects: the K of an annealed router falls while routes are recorded."""
    recorder = RoutingRecorder({"ffn": 3})
    recorder.add("ffn", torch.tensor([[0, 1, 2]]))
    recorder.add("ffn", torch.tensor([[2, 1]]))
    (layer,) = recorder.stats().layers
    assert (layer.tokens_per_expert, layer.slots, layer.unrouted_tokens) == ((1, 2, 2), 3, 0)


def test_mixtures_are_counted_by_token() -> None:
    """Protects: six mixtures of twelve tokens are half an expert a token, and no token is left out."""
    recorder = RoutingRecorder({"soft": 3})
    recorder.add("soft", torch.arange(6).remainder(3).view(6, 1), tokens=12)
    (soft,) = recorder.stats().layers
    assert (soft.experts_per_token, soft.unrouted_tokens, soft.tokens) == (0.5, 0, 12)


def test_records_training_too() -> None:
    """Protects: the routes of training steps, where capacity and noise act, can be counted."""
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    x = torch.randn(6, 8)
    trained = sparsify(model, (x,), start="upcycle", num_experts=4, top_k=1, select="all").train()
    with record_routing(trained) as recorder:
        trained(x)
        trained(x[:4])
    (layer,) = recorder.stats().layers
    assert sum(layer.tokens_per_expert) == layer.tokens == 10
    assert layer.ids_per_expert is None


def test_plots(sparse: SparseModel, tmp_path: Path) -> None:
    """Protects: a picture of every layer, without a display."""
    stats = sparse.routing_stats([{"input_ids": IDS, "attention_mask": MASK}])
    stats.plot(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 5000
    assert all(layer.name in str(stats) for layer in stats.layers)
    assert stats.to_json()["layers"][0]["tokens"] == 8
