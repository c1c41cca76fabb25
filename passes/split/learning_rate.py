"""The learning rate of every training here: rising over a tenth of the steps, then falling along a cosine."""

from __future__ import annotations

import math

_WARM_UP = 0.1


def share_of_rate(step: int, steps: int) -> float:
    """Of the highest learning rate, at `step` of `steps`, counted from 0: above 0 and at most 1."""
    done = (step + 1) / (steps + 1)
    if done <= _WARM_UP:
        return done / _WARM_UP
    return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2
