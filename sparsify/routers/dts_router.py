"""Dense to sparse: all experts at first, fewer step by step (EvoMoE, arXiv 2112.14397; Dua et al., 2110.08246)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.routers.base import System, WeightRule
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.token_choice import TokenChoiceRouter, chosen_scores


class DTSRouter(LinearRouter, TokenChoiceRouter):
    """Softmax at a falling temperature, with Gumbel noise in training, over a falling number of experts.

    `SparseModel.after_step` advances the schedule: from E experts and `first_temperature` to `top_k` experts and
    `last_temperature` after `anneal_steps`. Weights are probabilities: all sum to 1 at step 0, which is exact, and
    less later. What runs at inference, and is exported, is what the current step has.
    """

    system = System(
        name="dts",
        paper="EvoMoE: Dense-To-Sparse Gate (arXiv 2112.14397); Tricks for Training Sparse Translation Models "
        "(arXiv 2110.08246)",
        mechanism="all experts by softmax at first; experts are taken away and the temperature falls, down to top-k",
        export_form="top-k",
        needs=("after_step",),
    )
    default_top_k = 1
    temperature: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        anneal_steps: int = 1000,
        first_temperature: float = 2.0,
        last_temperature: float = 0.3,
        threshold: float = 0.0,
        balance_coefficient: float = 1e-2,
        step: int = 0,
        **options: Any,
    ) -> None:
        """Start dense.

        Args:
            top_k: experts of a token at the end.
            anneal_steps: until then.
            first_temperature: of the softmax at step 0; it falls geometrically.
            last_temperature: at the end.
            threshold: experts of a smaller weight do not run, but for the largest one; 0 lets all run.
            balance_coefficient: of the balance loss.
            step: steps taken; a saved model goes on from there.
            **options: of `TokenChoiceRouter`.
        """
        super().__init__(hidden_size, num_experts, top_k, **options)
        if anneal_steps < 1:
            raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}; 'switch' is sparse from the start")
        if not first_temperature >= last_temperature > 0:
            raise ValueError(
                f"temperatures must fall and stay above 0, got {first_temperature} first and {last_temperature} last"
            )
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is compared with a probability, so from 0 to below 1, got {threshold}")
        self.anneal_steps = anneal_steps
        self.first_temperature = first_temperature
        self.last_temperature = last_temperature
        self.threshold = threshold
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"balance": balance_coefficient}
        self.step = step
        self.register_buffer("temperature", torch.tensor(self._temperature()), persistent=False)

    @property
    def num_slots(self) -> int:
        """E at first, `top_k` at the end."""
        left = self.num_experts - self.top_k
        return self.top_k + -(-left * max(self.anneal_steps - self.step, 0) // self.anneal_steps)

    @property
    def rule(self) -> WeightRule:
        """All probabilities sum to 1, some of them do not."""
        everyone = self.num_slots == self.num_experts and not self.threshold
        return "sum" if self.weights == "native" and everyone else super().rule

    def training_logits(self, x: Tensor) -> Tensor:
        """With Gumbel noise."""
        logits = self.logits(x)
        return logits - torch.empty_like(logits).exponential_().clamp(min=torch.finfo(logits.dtype).tiny).log()

    def scores(self, logits: Tensor) -> Tensor:
        """At the current temperature."""
        return torch.softmax(logits / self.temperature.to(logits.dtype), dim=-1)

    def select(self, scores: Tensor) -> Tensor:
        """So many as the step has, if above the threshold."""
        weights, expert_ids = torch.topk(scores, self.num_slots, dim=-1)
        if not self.threshold:
            return expert_ids
        return torch.cat([expert_ids[:, :1], torch.where(weights >= self.threshold, expert_ids, -1)[:, 1:]], dim=1)

    def weigh(self, scores: Tensor, expert_ids: Tensor) -> Tensor:
        """Probabilities."""
        return chosen_scores(scores, expert_ids)

    def after_step(self) -> None:
        """Advance."""
        self._set_step(self.step + 1)

    def get_extra_state(self) -> Tensor:
        """The step, so that a state dict resumes the schedule."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""
        self._set_step(int(state))

    def _set_step(self, step: int) -> None:
        self.step = step
        self.temperature.fill_(self._temperature())

    def _temperature(self) -> float:
        done = min(self.step / self.anneal_steps, 1.0)
        return self.first_temperature * (self.last_temperature / self.first_temperature) ** done
