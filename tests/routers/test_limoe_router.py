"""`LIMoERouter` against loops in fp64: entropies by modality, and where both are zero."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import export_onnx, sparsify
from sparsify.errors import SelectionError
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.routers.limoe_router import LIMoERouter


def entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def test_losses_by_modality() -> None:
    """Protects: local and global entropy as means over modalities, importance and z over all tokens."""
    torch.manual_seed(0)
    router = LIMoERouter(7, 5, 1, num_modalities=2, soft_minimum=4).double()
    router.weight.data *= 30
    x, modalities = torch.randn(13, 7, dtype=torch.float64), torch.arange(13) % 3 % 2
    router(x, modalities)
    local, spread, lse = [], [], []
    for kind in (0, 1):
        rows = []
        for token in x[modalities == kind]:
            exponentials = [math.exp(float(row @ token)) for row in router.weight.detach()]
            rows.append([v / sum(exponentials) for v in exponentials])
            lse.append(math.log(sum(exponentials)))
        local.append(sum(map(entropy, rows)) / len(rows))
        mean = [sum(row[e] for row in rows) / len(rows) for e in range(5)]
        spread.append(max(0.0, math.log(4) - entropy(mean)))
    assert router.losses["local"].item() == pytest.approx(sum(local) / 2, rel=1e-10)
    assert router.losses["global"].item() == pytest.approx(sum(spread) / 2, rel=1e-10, abs=1e-12)
    assert router.losses["z"].item() == pytest.approx(sum(v * v for v in lse) / 13, rel=1e-10)


def test_both_losses_vanish_together() -> None:
    """Protects: sure tokens on S experts or more cost nothing; on fewer the global loss is above 0, not below."""
    router = LIMoERouter(8, 8, 1, soft_minimum=4)
    router.weight.data = 100 * torch.eye(8)
    for busy, expected in ((8, 0.0), (4, 0.0), (2, math.log(2)), (1, math.log(4))):
        router(torch.eye(8)[torch.arange(16) % busy])
        assert router.losses["local"].item() == pytest.approx(0, abs=1e-6)
        assert router.losses["global"].item() == pytest.approx(expected, abs=1e-5)


def test_gradients() -> None:
    """Protects: the gradient of both losses by modality, one of which has no tokens."""
    modalities = torch.tensor([0, 2, 2, 0, 2])
    x = torch.randn(5, 4, dtype=torch.float64)
    router = LIMoERouter(4, 3, 1, num_modalities=3, capacity_factor=None).double()

    def run(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.func.functional_call(router, {"weight": weight}, (x, modalities))
        return tuple(router.losses.values())

    assert torch.autograd.gradcheck(run, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_modalities_are_asked_for() -> None:
    """Protects: no missing modality is taken for another one, and none is needed at inference."""
    router, x = LIMoERouter(7, 5, 1, num_modalities=2), torch.randn(13, 7)
    router(x, torch.zeros(13).long())
    with pytest.raises(ValueError, match="needs the one of each token"):
        router(x)
    with pytest.raises(ValueError, match="knows the ids 0 to 1, got 2; give num_modalities"):
        router(x, torch.full((13,), 2))
    router.eval()
    assert torch.equal(router(x)[1], router(x, torch.ones(13).long())[1])


def test_labels_reach_the_losses(tmp_path: Path) -> None:
    """Protects: a modality for each sequence, given to the model, balances its tokens apart; the file takes it too."""
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 32, (4, 8)), torch.tensor([0, 1, 1, 0])
    dense = GPT(GPTConfig(32, 16, 16, 32, 2, 1)).eval()
    options: dict[str, Any] = {"start": "upcycle", "num_experts": 4, "top_k": 1, "select": "all"}
    given: dict[str, Any] = {"router": "limoe", "router_options": {"num_modalities": 2}}
    sparse = sparsify(dense, (ids,), {"expert_labels": labels}, **given, **options).train()
    (router,) = sparse.routers.values()
    read: list[torch.Tensor] = []
    router.register_forward_hook(lambda _module, inputs, _route: read.extend(inputs))
    sparse(ids, expert_labels=labels)
    assert torch.equal(read[1], labels.repeat_interleave(8))
    found = [router.losses[name].item() for name in ("local", "global")]
    weight = router.get_parameter("weight").detach().double()
    p = torch.softmax(read[0].detach().double() @ weight.t(), -1).view(4, 8, 4)
    parts = [[row for i in range(4) if labels[i] == m for row in p[i].tolist()] for m in (0, 1)]
    local = [sum(map(entropy, rows)) / len(rows) for rows in parts]
    spread = [math.log(4) - entropy([sum(column) / len(rows) for column in zip(*rows, strict=True)]) for rows in parts]
    assert found == pytest.approx([sum(local) / 2, sum(spread) / 2], rel=1e-4, abs=1e-6)
    report = export_onnx(sparse.eval(), tmp_path / "model.onnx")
    assert report.parity is not None
    with pytest.raises(SelectionError, match="reads the input 'expert_labels'"):
        sparsify(dense, (ids,), **given, **options)
