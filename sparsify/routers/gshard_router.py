"""GShard's top-2 with policies for the second expert (arXiv 2006.16668), as tensorflow/mesh spells them out."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparsify.routers.base import System, WeightRule
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import balance_loss
from sparsify.routers.token_choice import TokenChoiceRouter, chosen_scores

# What becomes of the second expert: it runs; never; where its weight exceeds `threshold`; with the probability
# weight / threshold; or it is drawn from the softmax without the first. The last two are for training, and "all" else.
Second = Literal["all", "none", "threshold", "random", "sampling"]
_AT_INFERENCE: dict[Second, Second] = {"random": "all", "sampling": "all"}
_EPSILON = 1e-9


class GShardRouter(LinearRouter, TokenChoiceRouter):
    """Weights are the two probabilities divided by their sum, before or after the second expert was let go.

    The paper fills capacity by all first choices before second ones: `overflow="choice"`. The default, token by token,
    keeps a causal model causal in training. The balance loss counts first choices.
    """

    system = System(
        name="gshard",
        paper="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding (arXiv 2006.16668)",
        mechanism="the two largest, weights that sum to 1, the second at random in training; capacity and balance loss",
        export_form="top-k",
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        second: Second = "random",
        threshold: float = 0.5,
        normalise: Literal["before", "after"] = "after",
        balance_coefficient: float = 1e-2,
        capacity_factor: float | None = 1.25,
        **options: Any,
    ) -> None:
        """Top-2.

        Args:
            top_k: 2.
            second: the policy of the second expert, see `Second`.
            threshold: of its policies (0.5 in GShard, 0.2 in Mesh).
            normalise: "after" the policy, so that weights always sum to 1; "before", as Mesh does, leaves a weight
                below 1 alone where the second expert does not run.
            balance_coefficient: of the balance loss.
            capacity_factor: of training.
            **options: of `TokenChoiceRouter`.
        """
        super().__init__(hidden_size, num_experts, top_k, capacity_factor=capacity_factor, **options)
        if second not in get_args(Second):
            raise ValueError(f"second must be one of {', '.join(get_args(Second))}, got {second!r}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is compared with a weight, so above 0 and at most 1, got {threshold}")
        if normalise not in ("before", "after"):
            raise ValueError(f"normalise must be 'before' or 'after', got {normalise!r}")
        self.second: Second = second
        self.threshold = threshold
        self.normalise: Literal["before", "after"] = normalise
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"balance": balance_coefficient}

    def check_top_k(self, top_k: int) -> None:
        """First and second."""
        super().check_top_k(top_k)
        if top_k != 2:
            raise ValueError(
                f"the router {self.system.name!r} has policies for a second expert, got top_k={top_k}; give top_k=2, "
                "or choose 'switch' for 1 and 'top-k' for more"
            )

    @property
    def rule(self) -> WeightRule:
        """They sum to 1 where both run, or where they are divided afterwards."""
        both = _AT_INFERENCE.get(self.second, self.second) == "all"
        return "sum" if self.weights == "native" and (both or self.normalise == "after") else super().rule

    def select(self, scores: Tensor) -> Tensor:
        """First and second, the second subject to the policy."""
        policy = self.second if self.training else _AT_INFERENCE.get(self.second, self.second)
        expert_ids = torch.topk(scores, 2, dim=-1).indices
        if policy == "sampling":
            expert_ids = _sample_second(scores, expert_ids[:, :1])
        if policy in ("all", "sampling"):
            return expert_ids
        chosen = chosen_scores(scores, expert_ids).detach()
        weight = chosen[:, 1:] / (chosen.sum(-1, keepdim=True) + _EPSILON)  # [T, 1]
        bar = {"none": torch.full_like(weight, torch.inf), "threshold": torch.full_like(weight, self.threshold)}
        runs = weight > (self.threshold * torch.rand_like(weight) if policy == "random" else bar[policy])
        return torch.cat([expert_ids[:, :1], torch.where(runs, expert_ids[:, 1:], -1)], dim=1)

    def weigh(self, scores: Tensor, expert_ids: Tensor) -> Tensor:
        """Divided by the sum of both, or of those that run."""
        chosen = chosen_scores(scores, expert_ids)
        own = self.normalise == "after" or self.second == "sampling"  # of the latter both run
        both = chosen if own else torch.topk(scores, 2, dim=-1).values
        return chosen / (both.sum(-1, keepdim=True) + _EPSILON)

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Balance of the first choices."""
        self.losses["balance"] = balance_loss(scores, expert_ids[:, :1])


def _sample_second(scores: Tensor, first: Tensor) -> Tensor:
    """Draw the second expert from the other scores by the largest of log score + Gumbel noise."""
    tiny = torch.finfo(scores.dtype).tiny
    gumbel = -torch.empty_like(scores).exponential_().clamp(min=tiny).log()
    noisy = (scores.clamp(min=tiny).log() + gumbel).scatter(1, first, -torch.inf)
    return torch.cat([first, noisy.argmax(-1, keepdim=True)], dim=1)
