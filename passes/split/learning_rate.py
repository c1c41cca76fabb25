"""The learning rate of every training here: rising over a twentieth of the steps, then falling by a square root."""

from __future__ import annotations

_WARM_UP = 0.05


def share_of_rate(step: int, steps: int) -> float:
    """Of the highest learning rate, at `step` of `steps`, counted from 0: above 0 and at most 1."""
    done = (step + 1) / (steps + 1)
    return min(done / _WARM_UP, ((1 - done) / (1 - _WARM_UP)) ** 0.5)
