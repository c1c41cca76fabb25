"""`ExpertChoiceRouter` against loops in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.expert_choice_router import ExpertChoiceRouter


def plain(router: ExpertChoiceRouter, group: torch.Tensor) -> list[dict[int, float]]:
    """For every token of one group: expert -> weight."""
    scores = torch.softmax(group.double() @ router.weight.detach().double().t(), -1)
    size, experts = scores.shape
    chosen: list[dict[int, float]] = [{} for _ in range(size)]
    for expert in range(experts):
        capacity = math.ceil(size * router.top_k / experts)
        for token in sorted(range(size), key=lambda t: -float(scores[t, expert]))[:capacity]:
            chosen[token][expert] = float(scores[token, expert])
    return chosen


@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (3, 7), (2, 16)])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 4), (5, 2), (1, 1)])
def test_experts_take_their_best_tokens(shape: tuple[int, int], experts: int, top_k: int) -> None:
    """Protects: the top C tokens of each expert, per sequence, with the probabilities as weights."""
    router = ExpertChoiceRouter(6, experts, top_k).eval()
    router.weight.data.normal_()
    x = torch.randn(*shape, 6)
    weights, ids = router(x)
    assert ids.shape == (shape[0] * shape[1], experts)
    expected = [token for group in x for token in plain(router, group)]
    for row, (w, e) in enumerate(zip(weights, ids, strict=True)):
        found = {int(expert): float(weight) for expert, weight in zip(e, w, strict=True) if expert >= 0}
        assert found == pytest.approx(expected[row], rel=1e-5)


def test_loads_are_equal_and_counts_vary() -> None:
    """Protects: claim 12: T = 64, E = 8, c = 2: every expert has 16 tokens; tokens have from 0 to 8, 2 on average."""
    torch.manual_seed(0)
    router = ExpertChoiceRouter(6, 8, 2)
    router.weight.data.normal_()
    _, ids = router(torch.randn(64, 6))
    assert [(ids == e).sum().item() for e in range(8)] == [16] * 8
    counts = (ids >= 0).sum(-1)
    assert counts.float().mean() == 2
    assert len(counts.unique()) > 1


def test_looks_at_later_tokens_and_says_so() -> None:
    """Protects: the flag: another last token moves an earlier one, though never one of another sequence."""
    torch.manual_seed(0)
    router = ExpertChoiceRouter(6, 4, 1)
    router.weight.data.normal_()
    x = torch.randn(2, 16, 6)
    before = router(x)[1].view(2, 16, 4)
    moved = 0
    for _ in range(20):
        x[0, -1] = torch.randn(6)
        after = router(x)[1].view(2, 16, 4)
        moved += not torch.equal(after[0, :-1], before[0, :-1])
        assert torch.equal(after[1], before[1])
    assert moved > 0
    assert not router.causal
    assert not router.batch_invariant


def test_margins_find_the_ties() -> None:
    """Protects: a token that ties for a place has margin 0, so an export does not fail for it."""
    router = ExpertChoiceRouter(6, 2, 1)
    router.weight.data.normal_()
    x = torch.randn(2, 2, 6)
    x[0, 1] = x[0, 0]
    margins = router.margins(x)
    assert margins[:2].tolist() == [0, 0]
    scores = torch.softmax(x[1].double() @ router.weight.detach().double().t(), -1)
    expected = ((scores[0] - scores[1]).abs() / scores.amax(0)).amin()
    torch.testing.assert_close(margins[2:].double(), expected.expand(2), rtol=1e-4, atol=1e-6)


def test_refuses_groups_that_are_too_small() -> None:
    """Protects: less than one slot for an expert is refused with what to change."""
    with pytest.raises(ValueError, match=r"less than one; use fewer experts, a larger top_k"):
        ExpertChoiceRouter(6, 8, 2).check_group(3)
    ExpertChoiceRouter(6, 8, 2).check_group(4)
