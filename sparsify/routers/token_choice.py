"""The common path of routers where every token chooses its experts by scores; a family overrides the steps it changes.

    logits -> scores -> expert_ids -> routing_weights (-> losses, in training) -> what is over capacity is dropped

T tokens, D hidden_size, E num_experts, K top_k.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.routers.base import Router, WeightRule
from sparsify.routers.capacity import CapacityRule, Overflow, capacity, check_capacity, within_capacity
from sparsify.routers.losses import balance_loss


class TokenChoiceRouter(Router):
    """Softmax of logits, its K largest, their softmax values as weights.

    A family puts further losses into `losses` in `add_losses`, and adds noise in `training_logits`.
    """

    normalised: ClassVar[bool] = False  # weights are divided by their sum, before anything is dropped

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        overflow: Overflow = "token",
        capacity_rule: CapacityRule = "switch",
    ) -> None:
        """Dropless unless a factor is given.

        Args:
            capacity_factor: of training; None drops nothing.
            eval_capacity_factor: of inference and export. With one, the route of a token depends on its batch.
            overflow: who keeps a slot where an expert has too few, see `capacity.Overflow`.
            capacity_rule: see `capacity.capacity`.
        """
        super().__init__(hidden_size, num_experts, top_k)
        for factor in (capacity_factor, eval_capacity_factor):
            check_capacity(factor, overflow, capacity_rule)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.overflow: Overflow = overflow
        self.capacity_rule: CapacityRule = capacity_rule

    @property
    def rule(self) -> WeightRule:
        """As the family normalises, unless `weights` says more."""
        return "sum" if self.weights == "native" and self.normalised else super().rule

    @property
    def causal(self) -> bool:
        """Dropless at inference. With a capacity there, more tokens after it make the slots of a token more.

        A capacity of training counts for nothing here; filled token by token, it does not look ahead either.
        """
        return self.eval_capacity_factor is None

    @property
    def batch_invariant(self) -> bool:
        """Dropless at inference."""
        return self.eval_capacity_factor is None

    @abc.abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, E]`, fp32."""

    def training_logits(self, x: Tensor) -> Tensor:
        """`logits` with the noise of the family."""
        return self.logits(x)

    def scores(self, logits: Tensor) -> Tensor:
        """`[T, E]` to `[T, E]`, none below 0."""
        return torch.softmax(logits, dim=-1)

    def select(self, scores: Tensor) -> Tensor:
        """`[T, E]` to expert_ids `[T, K]`, -1 for a slot not used."""
        return torch.topk(scores, self.top_k, dim=-1).indices

    def weigh(self, scores: Tensor, expert_ids: Tensor) -> Tensor:
        """The weights of the chosen experts, `[T, K]`."""
        chosen = chosen_scores(scores, expert_ids)
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-20) if self.normalised else chosen

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Put the losses of the family into `losses`: those that `coefficients` names. Called in training mode.

        Args:
            logits: `[T, E]`, with noise.
            scores: `[T, E]`.
            expert_ids: `[T, K]`, before anything is dropped.
            weights: `[T, K]`.
        """
        if "balance" in self.coefficients:
            self.losses["balance"] = balance_loss(scores, expert_ids)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the module."""
        logits = self.training_logits(x) if self.training else self.logits(x)
        scores = self.scores(logits)
        expert_ids = self.select(scores)
        weights = self.weigh(scores, expert_ids)
        if self.training:
            self.add_losses(logits, scores, expert_ids, weights)
        return self._drop(weights, expert_ids, scores)

    def _drop(self, weights: Tensor, expert_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return weights, expert_ids
        overflow = "token" if self.overflow == "random" and not self.training else self.overflow
        tokens, top_k = scores.shape[0], expert_ids.shape[1]
        slots = capacity(tokens, self.num_experts, top_k, factor, self.capacity_rule, scores.device)
        kept = within_capacity(expert_ids, weights.detach(), scores.detach(), slots, overflow)
        return weights * kept, torch.where(kept, expert_ids, -1)


def chosen_scores(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """Scores `[T, E]` of the chosen experts `[T, K]`; 0 where the id is -1."""
    return scores.gather(1, expert_ids.clamp(min=0)) * (expert_ids >= 0)
