"""`sort_pairs` against a scan."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels.pairs import sort_pairs


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (13, 3), (7, 0)])
def test_groups_by_expert(tokens: int, top_k: int) -> None:
    """Protects: every used pair once, by expert, in the order of the tokens; unused ones counted."""
    ids = torch.randint(-1, 4, (tokens, top_k))
    found = sort_pairs(ids, 5)
    flat = ids.flatten().tolist()
    expected = [[pair for pair, expert in enumerate(flat) if expert == e] for e in range(5)]
    assert [part.tolist() for part in found.pairs.split(found.counts)] == expected
    assert found.tokens.tolist() == [pair // top_k for part in expected for pair in part]
    assert found.unused == flat.count(-1)


def test_refuses_an_expert_that_does_not_exist() -> None:
    """Protects: a wrong id is an error, as in `dispatch`, not a token that silently gets nothing."""
    with pytest.raises(IndexError, match=r"\[-1, 3\), got 5"):
        sort_pairs(torch.tensor([[0, 5]]), 3)
