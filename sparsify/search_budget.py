"""Find the cheapest conversion whose outputs stay close enough to the dense model's: convert, measure, and again.

The error of the outputs falls as the share s of the multiply-adds grows, and is 0 where all are left. Between two
shares that were tried it is taken to be a straight line, whose crossing with the bound is tried next, a little to the
safe side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sparsify.errors import BudgetError, CalibrationError

_TRIALS = 6
_CLOSE = 0.9  # of the bound: no cheaper conversion is looked for
_AIM = 0.97  # of the bound
_FINEST = 0.02  # of the multiply-adds: a difference in share that is not worth another conversion
_FIRST = 0.5
_HELD_OUT = 10  # every tenth batch

Found = TypeVar("Found")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Trial(Generic[Found]):
    """A conversion to a share of the multiply-adds, and the error of its outputs."""

    share: float
    error: float
    found: Found


def cheapest_within(
    convert: Callable[[float], Found], measure: Callable[[Found], float], most: float, least_share: float
) -> tuple[Trial[Found], str]:
    """Search.

    Args:
        convert: to a share of the multiply-adds.
        measure: the error of the outputs.
        most: the largest error that is allowed.
        least_share: the smallest share that `convert` can keep, below 1.

    Returns:
        The trial of the smallest share whose error is at most `most`, and what was tried, for people.

    Raises:
        BudgetError: none was within the bound.
    """
    low, low_error = least_share, None  # the largest share that was too little
    high, high_error = 1.0, 0.0
    best: Trial[Found] | None = None
    tried: list[str] = []
    share = max(least_share, _FIRST)
    for _ in range(_TRIALS):
        found = convert(share)
        error = measure(found)
        tried.append(f"{error:.3g} at {share:.0%}")
        if error <= most:
            best, high, high_error = Trial(share, error, found), share, error
        else:
            low, low_error = share, error
        if best is not None and (best.error >= _CLOSE * most or high - low < _FINEST or high == least_share):
            break
        share = _next(low, low_error, high, high_error, most)
    summary = f"errors of the outputs by share of the multiply-adds: {', '.join(tried)}"
    if best is None:
        raise BudgetError(
            f"no conversion that was tried keeps the error of the outputs at {most:.3g} or below ({summary}). Raise "
            "the bound, give more calibration data, or leave FFNs out with select="
        )
    return best, summary


def _next(low: float, low_error: float | None, high: float, high_error: float, most: float) -> float:
    if low_error is None:  # nothing was too little yet: the error per share that is left out says where to look
        slope = high_error / (1 - high) if high < 1 else 0.0
        wanted = 1 - _AIM * most / slope if slope else low
        return min(max(wanted, low), high - (high - low) / 8) if wanted > low else low
    crossing = low + (low_error - _AIM * most) / (low_error - high_error) * (high - low)
    if high == 1.0:  # nothing was within yet, and close to dense the error often falls steeply
        return max(crossing, (low + high) / 2)
    margin = (high - low) / 8
    return min(max(crossing, low + margin), high - margin)


def hold_out_batches(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to, and batches to measure outputs on: every tenth one, at least the last.

    Raises:
        CalibrationError: there is only one.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "budget='error<=...' measures on a calibration batch that is kept out of the fit, so give at least 2; "
            f"there is {len(batches)}"
        )
    held = set(range(_HELD_OUT - 1, len(batches), _HELD_OUT)) or {len(batches) - 1}
    return [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in sorted(held)]
