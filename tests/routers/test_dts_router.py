"""`DTSRouter`: dense at step 0, sparse at the end of the schedule, which is saved with the router."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsify import SparseModel, sparsify
from sparsify.routers.dts_router import DTSRouter


def make(**options: float) -> DTSRouter:
    torch.manual_seed(0)
    router = DTSRouter(7, 6, 1, **{"anneal_steps": 10, **options})  # pyright: ignore[reportArgumentType]
    router.weight.data *= 30
    return router


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 99])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_schedule(step: int, top_k: int) -> None:
    """Protects: experts from E to K in equal steps, temperature geometrically, softmax values as weights."""
    torch.manual_seed(0)
    router = DTSRouter(7, 6, top_k, anneal_steps=10, step=step).eval()
    router.weight.data *= 30
    done = min(step / 10, 1)
    count = top_k + math.ceil((6 - top_k) * (10 - 10 * done) / 10)
    temperature = 2.0 ** (1 - done) * 0.3**done
    x = torch.randn(13, 7)
    weights, ids = router(x)
    assert ids.shape == (13, count)
    for t in range(13):
        exponentials = [math.exp(float(row @ x[t]) / temperature) for row in router.weight.detach()]
        chosen = sorted(range(6), key=lambda e: -exponentials[e])[:count]
        assert ids[t].tolist() == chosen
        expected = [exponentials[e] / sum(exponentials) for e in chosen]
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_steps_advance_it() -> None:
    """Protects: the schedule ends at K, and is called exact only while all experts run."""
    router, slots, rules = make(), [], []
    for _ in range(12):
        slots.append(router.num_slots)
        rules.append(router.rule)
        router.after_step()
    assert slots == [6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert rules == ["sum"] * 2 + ["free"] * 10
    assert router.temperature.item() == pytest.approx(0.3)


def test_threshold() -> None:
    """Protects: experts below the threshold do not run, the largest one always does."""
    router, x = make(threshold=0.2).eval(), torch.randn(31, 7)
    weights, ids = router(x)
    assert (ids[:, 0] >= 0).all()
    assert (ids < 0).any()
    assert weights[:, 1:][ids[:, 1:] >= 0].min() >= 0.2
    assert router.rule == "free"


def test_gumbel_noise_in_training() -> None:
    """Protects: the most likely expert is drawn with the probability of the softmax at temperature 1."""
    router = make(step=10)
    x = torch.randn(1, 7).expand(4000, 7)
    found = torch.bincount(router(x)[1].flatten(), minlength=6) / 4000
    expected = router.logits(x[:1]).softmax(-1).flatten()
    spread = (expected * (1 - expected) / 4000).sqrt()
    assert ((found - expected).abs() <= 4 * spread + 1e-9).all()


def test_a_saved_model_goes_on(tmp_path: object) -> None:
    """Protects: exact at step 0 end to end; files and state dicts hold the step."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(13, 8)
    sparse = sparsify(
        model, (x,), start="upcycle", num_experts=4, top_k=1, router="dts", router_options={"anneal_steps": 3},
        select="all",
    ).eval()  # fmt: skip
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    fresh = sparse.state_dict()
    for _ in range(3):
        sparse.after_step()
    sparse.save(str(tmp_path))
    loaded = SparseModel.load(str(tmp_path))
    assert torch.equal(loaded(x), sparse(x))
    (router,) = loaded.routers.values()
    assert router.num_slots == 1
    loaded.load_state_dict(fresh)
    assert router.num_slots == 4
