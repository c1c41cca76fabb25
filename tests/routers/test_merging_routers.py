"""SMEAR and Lory against loops in fp64: segments, the shares of the experts in each, and who sees whom."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import sparsify
from sparsify.errors import CausalityError
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.routers.merging_routers import LoryRouter, MergingRouter, SmearRouter

D, E = 6, 3


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def plain(weight: Tensor, group: Tensor, length: int | None, own: bool) -> list[list[float]]:
    """The shares of the experts for every token of `[S, D]`: by its own mean without a length, else by that before."""
    size, shares = len(group), []
    for t in range(size):
        segment = 0 if length is None else t // length
        read = segment if length is None else segment - 1
        if read < 0 and not own:
            shares.append([1 / len(weight)] * len(weight))
            continue
        read, step = max(read, 0), length or size
        tokens = [group[i].double() for i in range(read * step, min((read + 1) * step, size))]
        mean = [sum(float(token[d]) for token in tokens) / len(tokens) for d in range(group.shape[1])]
        shares.append(softmax([sum(float(row[d]) * mean[d] for d in range(len(mean))) for row in weight.double()]))
    return shares


def routers() -> list[tuple[MergingRouter, int | None, bool]]:
    """Weights of size 1, as small ones make equal shares."""
    made: list[tuple[MergingRouter, int | None, bool]] = [
        (SmearRouter(D, E, 1), None, True),
        (LoryRouter(D, E, 1, segment_size=3), 3, False),
        (LoryRouter(D, E, 1, segment_size=3, first_segment="own"), 3, True),
        (LoryRouter(D, E, 1), 256, False),
    ]
    for router, _, _ in made:
        router.weight.data.normal_()
    return made


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 7), (2, 6)])
def test_shares_and_segments(shape: tuple[int, int]) -> None:
    """Protects: the shares of every token, and that `places` finds each token in the padded segments again."""
    for router, length, own in routers():
        x = torch.randn(*shape, D)
        weights, ids, segments, merge_weights, places = router(x)
        assert ids.tolist() == [list(range(E))] * len(weights)
        expected = [share for group in x for share in plain(router.weight.detach(), group, length, own)]
        torch.testing.assert_close(weights.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        assert torch.equal(segments.flatten(0, 1)[places], x.flatten(0, 1))
        by_token = merge_weights.repeat_interleave(segments.shape[1], 0)[places]
        assert torch.equal(by_token, weights)
        unread = torch.ones(segments.shape[:2].numel(), dtype=torch.bool).index_fill(0, places, False)
        assert segments.flatten(0, 1)[unread].eq(0).all()


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    """Protects: empty sequences, and none at all."""
    lory = LoryRouter(D, E, 1, segment_size=3)
    assert lory(torch.randn(*shape, D))[0].shape == (0, E)
    if shape[1]:
        assert SmearRouter(D, E, 1)(torch.randn(*shape, D))[0].shape == (0, E)


def test_lory_looks_back_alone() -> None:
    """Protects: claim 21: a changed token moves the shares of the segment after its own, and of no other."""
    router, x = LoryRouter(D, E, 1, segment_size=4), torch.randn(1, 16, D)
    router.weight.data.normal_()
    before = router(x)[0]
    for place in range(16):
        changed = x.clone()
        changed[0, place] += 1.0
        moved = (router(changed)[0] != before).any(-1)
        follows = torch.arange(16) // 4 == place // 4 + 1
        assert torch.equal(moved, follows)


def test_first_segment_by_its_own_mean() -> None:
    """Protects: without a gradient to the router, and declared non-causal, so that a causal model refuses it."""
    router = LoryRouter(D, E, 1, segment_size=8, first_segment="own")
    assert not router.causal
    router.weight.data.normal_()
    for size, learns in ((8, False), (9, True)):
        (gradient,) = torch.autograd.grad(router(torch.randn(1, size, D))[0][:, 0].sum(), router.weight)
        assert bool(gradient.any()) == learns
    dense, ids = GPT(GPTConfig(32, 16, 16, 32, 2, 1)).eval(), torch.arange(16).view(2, 8)
    options: dict[str, Any] = {"start": "upcycle", "num_experts": 2, "top_k": 1, "select": "all"}
    for name, given in (("smear", {}), ("lory", {"first_segment": "own"})):
        with pytest.raises(CausalityError, match="the model is causal"):
            sparsify(dense, (ids,), router=name, router_options=given, **options)
    assert sparsify(dense, (ids,), router="lory", **options).report.converted


@pytest.mark.parametrize("made", [SmearRouter, LoryRouter])
def test_gradients(made: type[MergingRouter]) -> None:
    """Protects: the gradient of the shares, for the router and for the tokens that the means are of."""
    options: dict[str, Any] = {"segment_size": 2} if made is LoryRouter else {}
    router = made(4, 3, 1, **options).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(router, {"weight": weight}, (x,))[3]

    assert torch.autograd.gradcheck(run, (x, weight))


def test_refuses() -> None:
    """Protects: options that mean nothing here say what to give instead."""
    with pytest.raises(ValueError, match="give top_k=1"):
        SmearRouter(D, E, 2)
    with pytest.raises(ValueError, match="segment_size is a number of tokens, at least 1, got 0"):
        LoryRouter(D, E, 1, segment_size=0)
    with pytest.raises(ValueError, match="first_segment must be 'mean' or 'own', got 'none'"):
        LoryRouter(D, E, 1, first_segment="none")  # pyright: ignore[reportArgumentType]
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), torch.randn(3, 4)
    with pytest.raises(ValueError, match="only copies of the whole FFN allow; use start='upcycle'"):
        sparsify(model, x, router="smear", num_experts=2, top_k=1)
