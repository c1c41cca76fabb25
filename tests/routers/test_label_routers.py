"""DEMix, Task-MoE and MMoE against loops in fp64, and what is left of them for one label."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsify.routers.id_routers import LabelRouter
from sparsify.routers.label_routers import DEMixRouter, MMoERouter, TaskMoERouter


def softmax(values: list[float]) -> list[float]:
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


def plain(router: LabelRouter, token: Tensor, label: int) -> dict[int, float]:
    """Expert -> weight."""
    if isinstance(router, DEMixRouter):
        return {label: 1.0}
    if isinstance(router, TaskMoERouter):
        logits = router.weight[label].double().tolist()
        best = sorted(range(router.num_experts), key=lambda e: -logits[e])[: router.top_k]
        return dict(zip(best, softmax([logits[e] for e in best]), strict=True))
    assert isinstance(router, MMoERouter)
    gate = router.weight.view(router.num_labels, router.num_experts, -1)[label].double()
    return dict(enumerate(softmax((gate @ token.double()).tolist())))


def routers() -> list[LabelRouter]:
    made: list[LabelRouter] = [DEMixRouter(7, 3, 1), TaskMoERouter(7, 5, 2, num_labels=3)]
    made += [TaskMoERouter(7, 5, 5, num_labels=3), MMoERouter(7, 4, 4, num_labels=3), DEMixRouter(7, 1, 1)]
    for router in made:
        for parameter in router.parameters():
            parameter.data.normal_()
    return made


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_routes_by_label(num_tokens: int) -> None:
    """Protects: which experts a label has, and their weights, which sum to 1."""
    for router in routers():
        x, labels = torch.randn(num_tokens, 7), torch.arange(num_tokens) % router.num_ids
        weights, ids = router(x, labels)
        for token in range(num_tokens):
            found = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
            assert found == pytest.approx(plain(router, x[token], int(labels[token])), rel=1e-5)


def test_specialised_routes_are_those_of_the_label() -> None:
    """Protects: claim 18: the router of one label, without labels, gives what the general one gives."""
    for router in routers():
        for label in range(router.num_ids):
            x = torch.randn(5, 7)
            weights, ids = router(x, torch.full((5,), label))
            alone, kept = router.specialised(label)
            found, places = alone(x)
            general = torch.zeros(5, router.num_experts).scatter(1, ids, weights)
            special = torch.zeros(5, router.num_experts).scatter(1, torch.tensor(kept)[places], found)
            torch.testing.assert_close(special, general)


def test_gradients_reach_the_weights_of_the_label_alone() -> None:
    """Protects: other labels are not trained by a batch without them."""
    for router in (TaskMoERouter(7, 5, 2, num_labels=3), MMoERouter(7, 4, 4, num_labels=3)):
        weights, _ = router(torch.randn(6, 7), torch.ones(6, dtype=torch.long))
        weights.square().sum().backward()
        assert router.weight.grad is not None
        by_label = router.weight.grad.view(3, -1).abs().amax(1)
        assert by_label.tolist()[0] == by_label.tolist()[2] == 0
        assert by_label[1] > 0


def test_refusals() -> None:
    """Protects: a label outside the table, and experts that the rule cannot choose."""
    x = torch.randn(2, 7)
    with pytest.raises(ValueError, match="knows the ids 0 to 2, got 3; give num_experts as large"):
        DEMixRouter(7, 3, 1)(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="knows the ids 0 to 1, got 2; give num_labels in router_options"):
        TaskMoERouter(7, 3, 1)(x, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="mixes all experts: give top_k=4, got 2"):
        MMoERouter(7, 4, 2)
    with pytest.raises(ValueError, match="give top_k=1"):
        DEMixRouter(7, 3, 2)
