"""Capacity: how many slots an expert has for a call, and who loses one when more want it.

    C = ceil(factor K T / E)        rule "switch"; the others are those of well-known implementations

A dropped slot has id -1 and weight 0: the token goes on by the residual connection, or by its other experts. C grows
with T, so with a capacity at inference the route of a token depends on the others of a call.
T tokens, E num_experts, K top_k.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

# "token": all choices of a token before those of the next one; "choice": all first choices before second ones (GShard);
# "priority": as "choice", tokens by falling largest score (batch prioritised routing, arXiv 2106.05974); "random":
# tokens in random order, drawn at every call in training, else as "token" (arXiv 2109.10465); "probability": every
# expert keeps the slots of the largest scores.
Overflow = Literal["token", "choice", "priority", "random", "probability"]
CapacityRule = Literal["switch", "mesh", "lingvo", "deepspeed", "v-moe", "st-moe-pytorch"]

_LARGEST_DENOMINATOR = 10_000  # of a factor: T times its numerator stays an int64


def check_capacity(factor: float | None, overflow: str, rule: str) -> None:
    """Refuse options that no call could work with.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    if factor is not None and not (0 < factor < float("inf") and _fraction(factor)):
        raise ValueError(
            f"a capacity factor of {factor} leaves no expert a slot; give a number above 0, 1.0 for just as many slots "
            "as there are assignments, or None to drop nothing"
        )
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow must be one of {', '.join(get_args(Overflow))}, got {overflow!r}")
    if rule not in get_args(CapacityRule):
        raise ValueError(f"capacity_rule must be one of {', '.join(get_args(CapacityRule))}, got {rule!r}")


def capacity(
    num_tokens: int | torch.SymInt,
    num_experts: int,
    top_k: int,
    factor: float,
    rule: CapacityRule = "switch",
    device: torch.device | None = None,
) -> Tensor:
    """Slots of every expert.

    Args:
        num_tokens: T of the call; symbolic in a trace.
        num_experts: E.
        top_k: K. "mesh", "lingvo" and "st-moe-pytorch" do not count it: at K = 2 their factor of 2 is one slot for
            every assignment.
        factor: CF. It is read as the decimal number that it prints as, so 1.1 * 10 is 11.
        rule: how T is turned into slots.
        device: of the result.

    Returns:
        int64 scalar.

    Raises:
        ValueError: the rule rounds down to no slot at all (where T is a number).
    """
    tokens = torch.full((), num_tokens, dtype=torch.int64, device=device)
    share = _fraction(factor) / num_experts
    counted = share * top_k
    if rule == "switch":
        return _up(tokens, counted)
    if rule == "v-moe":
        return _multiple_of_4(_up(tokens, counted))
    if rule == "deepspeed":
        return _up(tokens, counted).clamp(min=4)
    slots = tokens * share.numerator // share.denominator
    if rule == "st-moe-pytorch":
        return torch.minimum(slots, tokens).clamp(min=4)
    if isinstance(num_tokens, int) and 0 < num_tokens * share < 1:
        raise ValueError(
            f"capacity_rule={rule!r} rounds {factor} * {num_tokens} tokens / {num_experts} experts down to no slot; "
            "use capacity_rule='switch', which rounds up, a larger factor, or more tokens a call"
        )
    return torch.minimum(slots, tokens) if rule == "mesh" else _multiple_of_4(slots)


def within_capacity(expert_ids: Tensor, weights: Tensor, scores: Tensor, slots: Tensor, overflow: Overflow) -> Tensor:
    """Which choices get a slot.

    Args:
        expert_ids: `[T, K]`, each expert once a token; -1 is a slot not used, which takes no place.
        weights: `[T, K]`, the score of each choice.
        scores: `[T, E]`.
        slots: C.
        overflow: who is served first.

    Returns:
        `[T, K]` bool, False where the id is -1.
    """
    num_experts = scores.shape[1]
    if overflow == "token":
        place = _places(expert_ids.reshape(-1), num_experts)
    else:
        order = _order(expert_ids, weights, scores, overflow)
        place = _places(expert_ids.reshape(-1).index_select(0, order), num_experts)
        place = torch.zeros_like(place).scatter(0, order, place)
    return (place.view_as(expert_ids) < slots) & (expert_ids >= 0)


def _order(expert_ids: Tensor, weights: Tensor, scores: Tensor, overflow: Overflow) -> Tensor:
    """The pairs `t * K + k`, `[T*K]`, first served first."""
    pairs = torch.arange(expert_ids.numel(), device=expert_ids.device).view_as(expert_ids)  # [T, K]
    if overflow == "probability":
        return _falling(weights.reshape(-1))
    if overflow == "random":
        return pairs.index_select(0, torch.randperm(pairs.shape[0], device=pairs.device)).reshape(-1)
    if overflow == "priority":
        pairs = pairs.index_select(0, _falling(scores.amax(-1)))
    return pairs.t().reshape(-1)


def _falling(values: Tensor) -> Tensor:
    """Places by falling value `[N]`, the earlier one first among equals, as ONNX sorts without being told."""
    if torch.compiler.is_exporting():  # torch.onnx has no translation for the overload with `stable`
        return torch.sort(values, descending=True).indices
    return torch.sort(values, stable=True, descending=True).indices


def _places(ids: Tensor, num_experts: int) -> Tensor:
    """How many before it chose the same expert: `[N]` -> `[N]`; -1 for an id of -1."""
    chosen = (ids.unsqueeze(-1) == torch.arange(num_experts, device=ids.device)).to(torch.int32)  # [N, E]
    return ((chosen.cumsum(0, dtype=torch.int32) * chosen).sum(-1) - 1).to(torch.int64)


def _fraction(factor: float) -> Fraction:
    return Fraction(str(factor)).limit_denominator(_LARGEST_DENOMINATOR)


def _up(tokens: Tensor, share: Fraction) -> Tensor:
    """`ceil(tokens * share)`, in whole numbers."""
    return (tokens * share.numerator + share.denominator - 1) // share.denominator


def _multiple_of_4(slots: Tensor) -> Tensor:
    return (slots + 3) // 4 * 4
