"""Distribute a budget over the FFNs: more parts run where skipping them hurts more.

Of the choices of every FFN (`measure_choices`) one is taken, so that the sum of the errors is least under a bound of
the sum of the costs: multiply-adds, or seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sparsify.budget import Budget
from sparsify.errors import BudgetError
from sparsify.passes.choices import Choice, FFNChoices
from sparsify.passes.plan import ConversionPlan, LayerPlan
from sparsify.passes.time_choices import measured_times

_BISECTIONS = 60
_CORRECTIONS = 4  # of the bound on seconds, where the sum that was measured is above the sum that was expected

Cost = Callable[[Choice], float]


@dataclass(frozen=True)
class Allocation:
    """A budget, spent.

    Attributes:
        plan: says for every FFN what it got, and why.
        spent: in the unit of the budget.
        least: what the cheapest choices would cost.
        dense: what the dense FFNs cost.
        note: the same for people.
    """

    plan: ConversionPlan
    spent: float
    least: float
    dense: float
    note: str


def allocate(ffns: Sequence[FFNChoices], plan: ConversionPlan, budget: Budget) -> Allocation:
    """Choose how many parts run in each FFN.

    Args:
        ffns: every FFN that `plan` converts, with seconds for a budget of milliseconds.
        plan: for the whole model.
        budget: share or milliseconds.

    Raises:
        BudgetError: even the cheapest choices cost more; the message says what can be reached.
    """
    cost = _cost(ffns, budget)
    least, dense = sum(min(map(cost, ffn.all)) for ffn in ffns), sum(cost(ffn.dense) for ffn in ffns)
    if budget.most < least:
        raise BudgetError(_unreachable(ffns, budget, least, dense))
    chosen = minimise([ffn.all for ffn in ffns], budget.most, cost)
    spent = sum(map(cost, chosen))
    if budget.unit == "ms":
        chosen, spent = _as_measured(ffns, budget, cost, chosen)
    layers = {ffn.match.name: _planned(ffn, choice, budget, cost) for ffn, choice in zip(ffns, chosen, strict=True)}
    note = (
        f"budget={budget} for {len(ffns)} FFNs: {budget.say(spent)} is spent; they take {budget.say(dense)} dense, and "
        f"{budget.say(least)} at least"
    )
    return Allocation(
        ConversionPlan(tuple(layers.get(layer.name, layer) for layer in plan.layers)), spent, least, dense, note
    )


def minimise(choices: Sequence[Sequence[Choice]], most: float, cost: Cost) -> list[Choice]:
    """One choice per FFN with the least sum of errors, at a cost of at most `most` (Lagrange: one price for all).

    Where even the cheapest choices cost more, they are taken.
    """
    cheapest = [min(own, key=lambda choice: (cost(choice), choice.error)) for own in choices]
    scale = sum(map(cost, cheapest)) or 1.0  # of all costs, so that one range of prices fits every unit
    low, high = -60.0, 60.0  # logarithm of the price
    best = cheapest
    for _ in range(_BISECTIONS):
        price = 2 ** ((low + high) / 2) / scale
        taken = [min(own, key=lambda choice: choice.error + price * cost(choice)) for own in choices]
        if sum(map(cost, taken)) <= most:
            best, high = taken, (low + high) / 2
        else:
            low = (low + high) / 2
    return _spend(best, choices, most, cost)


def _spend(taken: list[Choice], choices: Sequence[Sequence[Choice]], most: float, cost: Cost) -> list[Choice]:
    """Spend what is left, each time where it lowers the error most for its cost."""
    while True:
        left = most - sum(map(cost, taken))
        upgrades = [
            ((taken[i].error - choice.error) / (cost(choice) - cost(taken[i])), i, choice)
            for i, own in enumerate(choices)
            for choice in own
            if 0 < cost(choice) - cost(taken[i]) <= left and choice.error < taken[i].error
        ]
        if not upgrades:
            return taken
        _, index, choice = max(upgrades, key=lambda upgrade: upgrade[0])
        taken = [*taken[:index], choice, *taken[index + 1 :]]


def _cost(ffns: Sequence[FFNChoices], budget: Budget) -> Cost:
    """In the unit of the budget."""
    if budget.unit == "ms":
        return lambda choice: 1e3 * choice.seconds[0]
    total = sum(ffn.dense.macs for ffn in ffns)
    return lambda choice: choice.macs / total


def _as_measured(
    ffns: Sequence[FFNChoices], budget: Budget, cost: Cost, chosen: list[Choice]
) -> tuple[list[Choice], float]:
    """Measure what was chosen, and choose again under a lower bound as long as it takes longer than expected."""
    most = budget.most
    for _ in range(_CORRECTIONS):
        spent = sum(_measured_ms(ffn, choice) for ffn, choice in zip(ffns, chosen, strict=True))
        if spent <= budget.most:
            break
        most *= budget.most / spent
        chosen = minimise([ffn.all for ffn in ffns], most, cost)
    return chosen, sum(_measured_ms(ffn, choice) for ffn, choice in zip(ffns, chosen, strict=True))


def _measured_ms(ffn: FFNChoices, choice: Choice) -> float:
    if choice.way == "dense":
        return 1e3 * choice.seconds[0]
    (time,) = measured_times(ffn, choice)
    return 1e3 * choice.seconds[0] if time.experts is None else 1e3 * time.experts * len(ffn.match.sites)


def _planned(ffn: FFNChoices, choice: Choice, budget: Budget, cost: Cost) -> LayerPlan:
    if choice.way == "dense":
        return LayerPlan(ffn.layer.name, f"budget={budget} leaves it dense: {_why_dense(ffn)}")
    others = [c.error for c in ffn.sparse if c.way != choice.way and cost(c) <= cost(choice)]
    other = {"routed": "pruning", "pruned": "routing"}[choice.way]
    instead = f"; {other} at no higher cost would move them by {min(others):.2g}" if others else ""
    time = f" ({budget.say(cost(choice))})" if budget.unit == "ms" else ""
    reason = (
        f"{ffn.layer.reason}; budget={budget} gives it {choice.macs / ffn.dense.macs:.0%} of its multiply-adds{time}, "
        f"{choice.way}, which moves the outputs by {choice.error:.2g} before training{instead}"
    )
    times = measured_times(ffn, choice)
    return replace(ffn.layer, top_k=choice.top_k, num_shared_experts=choice.num_shared, reason=reason, times=times)


def _why_dense(ffn: FFNChoices) -> str:
    if not ffn.sparse:
        return f"no number of parts is faster at {', '.join(map(str, ffn.config.tokens))} tokens"
    least = min(ffn.sparse, key=lambda choice: choice.error)
    return f"skipping would move the outputs by at least {least.error:.2g}, more than elsewhere"


def _unreachable(ffns: Sequence[FFNChoices], budget: Budget, least: float, dense: float) -> str:
    advice = "give more num_experts, of which one must run" if budget.unit == "share" else "give fewer target_tokens"
    return (
        f"budget={budget} cannot be kept: the {len(ffns)} FFNs that are converted take {budget.say(dense)} dense and "
        f"{budget.say(least)} at least. Raise the budget to {budget.say(least)} or more, or {advice}"
    )
