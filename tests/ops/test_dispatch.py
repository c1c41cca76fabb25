"""`sparsify::dispatch` by itself."""

from __future__ import annotations

import pytest
import torch

from sparsify import ops


def test_rows_are_sorted_by_expert_and_stable_in_the_token() -> None:
    """Protects: the layout that expert_linear and every kernel rely on."""
    x = torch.arange(4.0).unsqueeze(1)
    rows, order, offsets = ops.dispatch(x, torch.tensor([[2, 0], [0, -1], [2, 1], [0, 2]]), 4)
    assert order.tolist() == [1, 2, 6, 5, 0, 4, 7, 3]
    assert rows.flatten().tolist() == [0, 1, 3, 2, 0, 2, 3, 1]
    assert offsets.tolist() == [0, 3, 4, 7, 7]


@pytest.mark.parametrize("wrong", [3, -2])
def test_refuses_an_expert_that_does_not_exist(wrong: int) -> None:
    """Protects: a bad id is an error, not a read past the end."""
    with pytest.raises(IndexError, match=r"expert_ids must lie in \[-1, 3\)"):
        ops.dispatch(torch.randn(2, 4), torch.tensor([[0], [wrong]]), 3)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int) -> None:
    """Protects: schema, fake kernel and autograd registration."""
    ids = torch.randint(-1, 3, (num_tokens, 2))
    torch.library.opcheck(torch.ops.sparsify.dispatch.default, (torch.randn(num_tokens, 4, requires_grad=True), ids, 3))
