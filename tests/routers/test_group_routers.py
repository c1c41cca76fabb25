"""What routers that read groups share."""

from __future__ import annotations

import torch

from sparsify.routers.group_routers import as_groups, distance, largest


def test_groups_are_the_entries_of_the_batch() -> None:
    """Protects: images are a group each, as sequences are; plain tokens are one."""
    assert as_groups(torch.randn(2, 3, 5, 4)).shape == (2, 15, 4)
    assert as_groups(torch.randn(2, 3, 4)).shape == (2, 3, 4)
    assert as_groups(torch.randn(3, 4)).shape == (1, 3, 4)


def test_largest_and_their_distance() -> None:
    """Protects: who has a place, and by how much it would be lost or won, relative to the largest score."""
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert largest(scores, 2).tolist() == [[False, True, True, False]]
    assert distance(scores, 2).tolist() == [[0.5, 0.5, 0.25, 0.25]]
    assert distance(scores, 4).isinf().all()
