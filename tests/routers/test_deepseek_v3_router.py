"""`DeepSeekV3Router` against loops in fp64: selection by biased scores, groups, weights without bias, bias updates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparsify import sparsify
from sparsify.routers.deepseek_v3_router import DeepSeekV3Router


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 4), (8, 3)])
def test_selection_and_weights(groups: int, top_groups: int) -> None:
    """Protects: TopK of s + b in the groups of the best two s + b; weights s / sum s times the scaling, without b."""
    torch.manual_seed(0)
    router = DeepSeekV3Router(7, 8, 2, num_groups=groups, top_groups=top_groups, routed_scaling=2.5).double().eval()
    router.weight.data *= 30
    router.bias.copy_(torch.linspace(-1.1, -2.5, 8))  # sums below 0: a mask of 0 would choose the wrong ones
    x = torch.randn(31, 7, dtype=torch.float64)
    weights, ids = router(x)
    moved = 0
    for t in range(31):
        s = [1 / (1 + math.exp(-float(row @ x[t]))) for row in router.weight.detach()]
        biased = [s[e] + router.bias[e].item() for e in range(8)]
        size = 8 // groups
        score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -score[g])[:top_groups]
        allowed = [e for e in range(8) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:2]
        assert ids[t].tolist() == chosen
        expected = [2.5 * s[e] / sum(s[c] for c in chosen) for e in chosen]
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-10)
        moved += chosen != sorted(range(8), key=lambda e: -s[e])[:2]
    assert moved > 0


def test_bias_falls_where_the_load_is_high() -> None:
    """Protects: `b += u sign(mean n - n)`, counted over the training calls since the last step."""
    torch.manual_seed(0)
    router = DeepSeekV3Router(7, 5, 2, bias_rate=0.01)
    counts = torch.zeros(5)
    for _ in range(2):
        counts += torch.bincount(router(torch.randn(13, 7))[1].flatten(), minlength=5)
    router.eval()(torch.randn(99, 7))
    assert torch.equal(router.bias, torch.zeros(5))
    router.after_step()
    assert torch.equal(router.bias, 0.01 * torch.sign(counts.mean() - counts))
    assert not router.bias.requires_grad
    router.after_step()
    assert torch.equal(router.bias, 0.01 * torch.sign(counts.mean() - counts))  # no tokens, no change


def test_biases_balance_the_load() -> None:
    """Protects: MaxVio falls from above 1 to sampling noise with one logit 1.5 too high (E 8, K 2, T 512)."""
    torch.manual_seed(0)
    router = DeepSeekV3Router(9, 8, 2, bias_rate=5e-3)
    router.weight.data[:, :8] = torch.eye(8)
    router.weight.data[:, 8] = 0
    router.weight.data[0, 8] = 1.5

    def violation() -> float:
        x = torch.cat([torch.randn(512, 8), torch.ones(512, 1)], dim=1)
        load = torch.bincount(router(x)[1].flatten(), minlength=8).float()
        return (load.max() / load.mean() - 1).item()

    first = violation()
    for _ in range(150):
        violation()
        router.after_step()
    assert first > 1
    assert sum(violation() for _ in range(10)) / 10 < 0.3


def test_balance_loss() -> None:
    """Protects: `E sum f P` with P the mean of scores that sum to 1, coefficient 1e-4."""
    torch.manual_seed(0)
    router, x = DeepSeekV3Router(7, 5, 2).double(), torch.randn(13, 7, dtype=torch.float64)
    _, ids = router(x)
    p = [0.0] * 5
    for token in x:
        s = [1 / (1 + math.exp(-float(row @ token))) for row in router.weight.detach()]
        p = [a + b / sum(s) / 13 for a, b in zip(p, s, strict=True)]
    f = [5 * sum(row.count(e) for row in ids.tolist()) / 26 for e in range(5)]
    assert router.losses["balance"].item() == pytest.approx(sum(map(math.prod, zip(f, p, strict=True))), rel=1e-6)
    assert router.coefficients == {"balance": 1e-4}


def test_buffers_stay_wide() -> None:
    """Protects: in a bf16 model the bias still takes steps of 1e-3, and counts above 256 are exact."""
    router = DeepSeekV3Router(7, 5, 2)
    router.bias.fill_(0.5001)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert (router.bias.dtype, router.load.dtype) == (torch.float32, torch.float32)
    assert router.bias[0].item() == pytest.approx(0.5001, abs=1e-6)
    router.load.copy_(torch.tensor([300.0, 301, 301, 301, 301]))
    router.after_step()
    assert router.bias[0].item() == pytest.approx(0.5011, abs=1e-6)
    assert copy.deepcopy(router).bias.dtype == torch.float32


def test_the_optimiser_calls_the_hook() -> None:
    """Protects: `optimizer.register_step_post_hook(sparse.after_step)` moves the biases, and they are saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    sparse = sparsify(
        model, (torch.randn(13, 8),), start="upcycle", num_experts=4, top_k=2, router="deepseek-v3", select="all"
    ).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(sparse.after_step)
    (sparse(torch.randn(13, 8)).square().mean() + sparse.aux_loss()).backward()
    optimizer.step()
    (bias,) = (value for name, value in sparse.state_dict().items() if name.endswith("router.bias"))
    assert bias.abs().max().item() == pytest.approx(1e-3)
