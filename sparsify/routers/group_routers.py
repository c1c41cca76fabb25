"""Routers whose tokens compete within a group, a sequence where the model has one. G groups of S tokens, T = G S."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, WeightRule, wide

_INIT_STD = 0.02


class GroupRouter(Router):
    """`forward` is given `[G, .., D]`: the tokens of each of G entries are a group, and `[T, D]` is one group.

    A subclass defines `route_groups`.
    """

    reads_groups: ClassVar[bool] = True

    @property
    def rule(self) -> WeightRule:
        """A token may have no expert, so nothing is known, whatever `weights` says."""
        return "free"

    @property
    def causal(self) -> bool:
        """Later tokens of the group take places."""
        return False

    @property
    def batch_invariant(self) -> bool:
        """The other tokens of the group take places."""
        return False

    @abc.abstractmethod
    def route_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[G, S, D]` -> routing_weights, expert_ids, `[T, K]` each."""

    def margins(self, x: Tensor) -> Tensor:
        """`[T]`: how far the scores of a token are from a place that is won or lost, relative; infinite if none is."""
        return x.new_full((x[..., 0].numel(),), torch.inf)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `route_groups`."""
        return self.route_groups(as_groups(x))


def as_groups(x: Tensor) -> Tensor:
    """`[T, D]` or `[G, .., D]` to `[G, S, D]`."""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(1, -2)


def small_weight(*shape: int) -> nn.Parameter:
    """Small random numbers."""
    return nn.Parameter(torch.randn(*shape) * _INIT_STD)


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of every row are.

    Args:
        scores: `[R, S]`.
        count: at most S.

    Returns:
        `[R, S]` bool.
    """
    places = torch.topk(scores, count, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, places, 1.0) > 0


def distance(scores: Tensor, count: int) -> Tensor:
    """How far each of `[R, S]` is from changing sides among the `count` largest of its row, relative to the largest."""
    if count >= scores.shape[1]:
        return torch.full_like(scores, torch.inf)
    ranked = torch.topk(scores, count + 1, dim=-1).values
    last, following = ranked[:, -2:-1], ranked[:, -1:]
    return torch.where(scores > following, scores - following, last - scores) / scores.abs().amax(-1, keepdim=True)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` in fp32."""
    return nn.functional.linear(wide(x), wide(weight).to(wide(x).dtype))
