"""The seconds of every way to convert an FFN: some are measured, and the cost model says how the others compare.

Of each way, routed and pruned, the fewest parts, half of them and the most are measured. Between these the prediction
of the cost model is multiplied by measured / predicted, linear in the number of parts; where it knows neither device
nor dtype, the seconds themselves are. Without weights (on the meta device) the predictions count.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace

from sparsify.errors import BudgetError
from sparsify.passes.choices import Choice, FFNChoices
from sparsify.passes.layer_times import LayerTime, predict_layer, time_layer
from sparsify.passes.select_ffns import selects_what_pays


def time_choices(ffn: FFNChoices) -> FFNChoices:
    """Add the seconds of every choice at each of `target_tokens`.

    Returns:
        The same choices; without those that are not faster than dense, where `select` leaves the choice to what pays.

    Raises:
        BudgetError: nothing is known of the time: there are no weights, and the cost model knows not the dtype.
    """
    columns = [_at(ffn, tokens) for tokens in ffn.config.tokens]
    dense, *sparse = [replace(c, seconds=s) for c, s in zip(ffn.all, zip(*columns, strict=True), strict=True)]
    if selects_what_pays(ffn.config.select):
        sparse = [c for c in sparse if all(s < d for s, d in zip(c.seconds, dense.seconds, strict=True))]
    return replace(ffn, dense=dense, sparse=tuple(sparse))


def measured_times(ffn: FFNChoices, choice: Choice) -> tuple[LayerTime, ...]:
    """One site at each of `target_tokens`, dense and by `choice`, measured where there are weights."""
    return tuple(time_layer(ffn.match, choice.configure(ffn.config), tokens) for tokens in ffn.config.tokens)


def _at(ffn: FFNChoices, tokens: int) -> list[float]:
    """Seconds of dense and of every other choice."""
    sites, found, dense = len(ffn.match.sites), dict[Choice, float](), list[float]()
    for way in ("routed", "pruned"):
        own = [choice for choice in ffn.sparse if choice.way == way]
        if not own:
            continue
        places = sorted({0, len(own) // 2, len(own) - 1})
        timed = [time_layer(ffn.match, own[i].configure(ffn.config), tokens) for i in places]
        predictions = [predict_layer(ffn.match, choice.configure(ffn.config), tokens) for choice in own]
        dense += [_known(ffn, time.dense, time.predicted_dense) for time in timed]
        guesses = [prediction.predicted_experts or 1.0 for prediction in predictions]
        known = [_known(ffn, time.experts, time.predicted_experts) for time in timed]
        ratios = [seconds / guesses[i] for seconds, i in zip(known, places, strict=True)]
        found |= {c: guesses[i] * _interpolate(i, places, ratios) * sites for i, c in enumerate(own)}
    return [min(dense) * sites, *(found[choice] for choice in ffn.sparse)]


def _known(ffn: FFNChoices, measured: float | None, predicted: float | None) -> float:
    seconds = predicted if measured is None else measured
    if seconds is None:
        raise BudgetError(
            f"how long {ffn.match.name} takes is not known: it has no weights to measure ({ffn.match.device}), and the "
            f"cost model does not know {ffn.match.dtype}; load the weights, or give budget= as a share, such as 0.5"
        )
    return seconds


def _interpolate(x: int, xs: Sequence[int], ys: Sequence[float]) -> float:
    """Between the points around x, which lies within `xs`, rising."""
    right = max(1, bisect.bisect_left(xs, x)) if len(xs) > 1 else 0
    if right == 0:
        return ys[0]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return (1 - share) * ys[right - 1] + share * ys[right]
