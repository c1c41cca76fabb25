"""`share_of_rate`: up, then down, and never zero, however few the steps."""

from __future__ import annotations

import pytest

from sparsify.passes.split.learning_rate import share_of_rate


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 300])
def test_rises_and_falls(steps: int) -> None:
    """Protects: no step is wasted, no number of steps divides by zero."""
    shares = [share_of_rate(step, steps) for step in range(steps)]
    top = shares.index(max(shares))
    assert all(0 < share <= 1 for share in shares)
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert top <= steps // 10
