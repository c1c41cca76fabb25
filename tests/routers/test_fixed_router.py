"""`FixedRouter`: all experts, the same weights for every token."""

from __future__ import annotations

import pytest
import torch

from sparsify.routers.fixed_router import FixedRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("experts", [1, 4])
def test_the_softmax_of_its_numbers(num_tokens: int, experts: int) -> None:
    """Protects: weights that sum to 1, equal at first, whatever the token."""
    router, x = FixedRouter(7, experts, experts), torch.randn(num_tokens, 7)
    weights, ids = router(x)
    assert ids.tolist() == [list(range(experts))] * num_tokens
    torch.testing.assert_close(weights, torch.full((num_tokens, experts), 1 / experts))
    router.weight.data.normal_()
    expected = router.weight.double().exp() / router.weight.double().exp().sum()
    torch.testing.assert_close(router(x)[0].double(), expected.expand(num_tokens, -1), rtol=1e-5, atol=1e-6)


def test_refuses_to_choose() -> None:
    """Protects: it has no way to."""
    with pytest.raises(ValueError, match="runs all experts: give top_k=4, got 2"):
        FixedRouter(7, 4, 2)
