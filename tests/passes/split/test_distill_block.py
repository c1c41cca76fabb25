"""`distill_block`: experts and router of one FFN learn together, and what comes out is what was trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.passes.split import distill_block as module
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.distill_block import _Block, distill_block  # pyright: ignore[reportPrivateUsage]
from sparsify.passes.split.experts import Experts, divide_unevenly
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.prune import prune
from sparsify.routers import MLPRouter, UnitRouter


def setup(
    dense: DenseFFN, num_shared: int, tokens: int = 2000, sizes: tuple[int, ...] | None = None
) -> tuple[Experts, UnitRouter, Tensor, Tensor]:
    """Four experts of six neurons by lot, or of `sizes` units of three; a random router, tokens and their outputs."""
    torch.manual_seed(0)
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(tokens, 7)
    shared, routed = neurons[:num_shared].flatten(), neurons[num_shared:]
    routed = routed if sizes is None else routed.reshape(-1, 3)
    experts = fold_mean(divide_unevenly(dense, shared, routed, sizes), dense.hidden(x).mean(0)[routed])
    router = MLPRouter(7, experts.num_routed, 1, 8).requires_grad_(False)
    return experts, router, x, dense(x)


def squared_error(experts: Experts, router: UnitRouter | None, x: Tensor, target: Tensor) -> float:
    ids = torch.zeros(len(x), 0, dtype=torch.int64) if router is None else router(x)[1]
    return float((experts(x, ids) - target).square().sum())


@pytest.mark.parametrize(("num_shared", "sizes"), [(0, None), (1, None), (0, (4, 1, 2, 1)), (1, (1, 3, 2))])
def test_the_error_falls(dense: DenseFFN, num_shared: int, sizes: tuple[int, ...] | None) -> None:
    """Protects: training, and that its result is put back in the right places (the experts run through the ops)."""
    experts, router, x, target = setup(dense, num_shared, sizes=sizes)
    before = squared_error(experts, router, x, target)
    trained, learned = distill_block(experts, router, x, target, torch.ones(2000), steps=60, seed=0)
    assert squared_error(trained, learned, x, target) < 0.9 * before
    assert squared_error(experts, router, x, target) == before  # the originals stay


def test_pruned_neurons_learn_what_went(dense: DenseFFN) -> None:
    """Protects: training where nothing is routed, and its result in the right places."""
    torch.manual_seed(0)
    x = torch.randn(2000, 7)
    experts, _ = prune(dense, x, 12)
    before = squared_error(experts, None, x, dense(x))
    trained, none = distill_block(experts, None, x, dense(x), torch.ones(2000), steps=60, seed=0)
    assert none is None
    assert squared_error(trained, None, x, dense(x)) < 0.7 * before


@pytest.mark.skipif(
    not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"), reason="no products of bf16 here"
)
def test_products_of_bf16_learn_as_much(dense: DenseFFN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the faster training of wide FFNs, whose weights must stay in fp32."""
    experts, router, x, target = setup(dense, 1)
    errors: list[float] = []
    for smallest in (2**60, 1):
        monkeypatch.setattr(module, "_SMALLEST_BF16", smallest)
        trained, learned = distill_block(experts, router, x, target, torch.ones(2000), steps=60, seed=0)
        assert trained.down.dtype == torch.float32
        errors.append(squared_error(trained, learned, x, target))
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("sizes", [None, (1, 3, 2)])
def test_gains_are_those_of_running_an_expert(dense: DenseFFN, sizes: tuple[int, ...] | None) -> None:
    """Protects: what a router learns from: by how much the squared error falls with an expert, whatever its width."""
    experts, router, x, target = setup(dense, 1, tokens=9, sizes=sizes)
    block = _Block(experts, router, x)
    ids = router(x)[1]
    chosen = torch.zeros(9, 3).scatter_(1, ids, 1.0)
    routed = experts.activation(*_flat_inputs(experts, x))
    gains = block._gains(routed, target - experts(x, ids), chosen)  # pyright: ignore[reportPrivateUsage]
    for e in range(3):
        without = torch.where(ids == e, -1, ids)  # one expert a token runs, or none
        added = torch.cat([without, torch.full_like(ids, e)], dim=1)
        before, after = ((experts(x, given) - target).square().sum(1) for given in (without, added))
        torch.testing.assert_close(gains[:, e], before - after, rtol=1e-3, atol=1e-4)


def _flat_inputs(experts: Experts, x: Tensor) -> list[Tensor]:
    """What the activation reads for all routed neurons: `[T, U * m]` each."""
    biases = [None if bias is None else bias.flatten() for bias in experts.projection_biases]
    weights = [weight.flatten(0, 1) for weight in experts.projections]
    projected = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return [*projected, *(v.flatten() if v.dim() == 2 else v for v in experts.vectors)]


@pytest.mark.parametrize("sizes", [None, (1, 3, 2)])
def test_no_step_changes_nothing(dense: DenseFFN, sizes: tuple[int, ...] | None) -> None:
    """Protects: the way from experts to flat tensors and back."""
    experts, router, x, target = setup(dense, 1, sizes=sizes)
    same, _ = distill_block(experts, router, x, target, torch.ones(2000), steps=0, seed=0)
    torch.testing.assert_close(same(x, router(x)[1]), experts(x, router(x)[1]))


def test_the_router_learns(dense: DenseFFN) -> None:
    """Protects: with the trained experts, the trained router chooses better than the one it started as."""
    experts, router, x, target = setup(dense, 0, tokens=8_000)
    trained, learned = distill_block(experts, router, x, target, torch.ones(8_000), steps=200, seed=0)
    assert squared_error(trained, learned, x, target) < 0.95 * squared_error(trained, router, x, target)
    assert learned is not None
    assert not any(parameter.requires_grad for parameter in learned.parameters())


def test_is_deterministic_and_spares_the_global_generator(dense: DenseFFN) -> None:
    """Protects: promise 6."""
    experts, router, x, target = setup(dense, 1)
    state = torch.get_rng_state()
    runs = [distill_block(experts, router, x, target, torch.ones(2000), steps=5, seed=3)[0] for _ in range(2)]
    assert torch.equal(runs[0].down, runs[1].down)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("tokens", "steps", "made"), [(1200, 12, (12, 500)), (1200, 2, (2, 512)), (300, 30, (9, 256)), (40, 3, (3, 40))]
)
def test_batches_grow_where_tokens_suffice(
    dense: DenseFFN, monkeypatch: pytest.MonkeyPatch, tokens: int, steps: int, made: tuple[int, int]
) -> None:
    """Protects: 256 to 512 tokens a step, for five passes where there are so many, and never more than eight passes."""
    experts, router, x, target = setup(dense, 0, tokens)
    sizes: list[int] = []
    original = torch.randint

    def record(high: int, size: tuple[int, ...], **options: object) -> Tensor:
        sizes.append(size[0])
        return original(high, size, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "randint", record)
    distill_block(experts, router, x, target, torch.ones(tokens), steps=steps, seed=0)
    assert (len(sizes), sizes[0]) == made
