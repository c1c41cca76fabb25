"""`SoftMoERouter` against loops in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.soft_moe_router import SoftMoERouter


def plain(router: SoftMoERouter, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dispatch and combine weights of one group, `[S, n]` each."""
    size, slots = len(group), router.num_experts * router.top_k
    logits = torch.zeros(size, slots, dtype=torch.float64)
    for t in range(size):
        for s in range(slots):
            x, phi = group[t].double(), router.phi.detach().double()[:, s]
            logits[t, s] = float(router.scale) * float(x @ phi / (x.norm() * phi.norm()))
    dispatch, combine = torch.zeros_like(logits), torch.zeros_like(logits)
    for t in range(size):
        for s in range(slots):
            dispatch[t, s] = math.exp(logits[t, s]) / sum(math.exp(v) for v in logits[:, s])
            combine[t, s] = math.exp(logits[t, s]) / sum(math.exp(v) for v in logits[t])
    return dispatch, combine


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5)])
@pytest.mark.parametrize(("experts", "slots"), [(4, 1), (3, 2), (1, 1)])
def test_mixtures(shape: tuple[int, int], experts: int, slots: int) -> None:
    """Protects: columns of D and rows of C sum to 1, per sequence, and slots are D^T x."""
    router, x = SoftMoERouter(6, experts, slots), torch.randn(*shape, 6)
    router.scale.data.fill_(3.0)
    weights, ids, found, combine = router(x)
    assert weights.eq(1).all()
    assert ids[:, 0].tolist() == [e for _ in range(shape[0]) for e in range(experts) for _ in range(slots)]
    for g in range(shape[0]):
        expected_dispatch, expected_combine = plain(router, x[g])
        rows = found.view(shape[0], experts * slots, 6)[g]
        torch.testing.assert_close(rows.double(), expected_dispatch.t() @ x[g].double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(combine[g].double(), expected_combine, rtol=1e-4, atol=1e-5)
    dispatch, combine = router.mixtures(x)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(shape[0], experts * slots))
    torch.testing.assert_close(combine.sum(2), torch.ones(*shape))


def test_no_tokens() -> None:
    """Protects: an empty sequence: slots are zero, and nobody reads them."""
    _, _, slots, combine = SoftMoERouter(6, 4, 1)(torch.randn(2, 0, 6))
    assert slots.shape == (8, 6)
    assert combine.shape == (2, 0, 4)


def test_gradients() -> None:
    """Protects: phi, scale and tokens all learn."""
    router = SoftMoERouter(4, 3, 1).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.functional_call(router, {"phi": phi, "scale": scale}, (x,))[2:]

    inputs = [x, *(p.detach().clone().requires_grad_() for p in (router.phi, router.scale))]
    assert torch.autograd.gradcheck(run, inputs)


def test_slots_stay() -> None:
    """Protects: `set_top_k` cannot ask for slots that have no weights; more slots than experts are fine."""
    with pytest.raises(ValueError, match="2 slots for each expert, got top_k=3"):
        SoftMoERouter(4, 3, 2).check_top_k(3)
    assert SoftMoERouter(4, 3, 5)(torch.randn(1, 2, 4))[2].shape == (15, 4)
