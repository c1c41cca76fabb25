"""Routing as a policy, trained by reward: RL-R (arXiv 2202.01169) and Routing Networks (arXiv 1711.01239).

T tokens, E num_experts. In training an action is drawn from the softmax of linear logits, at inference the most likely
one is taken. Its weight is 1, so the gradient of the task does not reach the router; `SparseModel.give_reward` does:

    loss = -mean over t of log pi(a_t) (reward_t - baseline),      baseline: a moving average of the rewards before
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, WeightRule, require_one, wide

_INIT_STD = 0.02
_MEMORY = 0.9  # of the moving average


class PolicyRouter(Router):
    """Actions, their log-probabilities, and the loss that a reward makes of them."""

    default_top_k = 1
    baseline: Tensor
    rewarded: Tensor

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, actions: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.weight = nn.Parameter(torch.randn(actions, hidden_size) * _INIT_STD)
        self.register_buffer("baseline", torch.tensor(0.0))
        self.register_buffer("rewarded", torch.tensor(False))
        self.log_chances: Tensor | None = None  # [T] of the last call in training mode

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    @property
    def rule(self) -> WeightRule:
        """A single weight of 1."""
        return "one"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draw, or take the most likely action; those from E on run no expert."""
        tokens = wide(x)
        logits = nn.functional.linear(tokens, wide(self.weight).to(tokens.dtype))
        if self.training:
            actions = torch.multinomial(torch.softmax(logits, dim=-1), 1) if len(x) else logits.new_zeros(0, 1).long()
            self.log_chances = torch.log_softmax(logits, dim=-1).gather(1, actions).squeeze(1)
            self.act(logits, actions.squeeze(1))
        else:
            actions = logits.argmax(-1, keepdim=True)
        return torch.ones_like(actions, dtype=x.dtype), torch.where(actions < self.num_experts, actions, -1)

    def __getstate__(self) -> dict[str, Any]:
        """As of any router, without the call that waits for its reward."""
        return {**super().__getstate__(), "log_chances": None}

    def act(self, logits: Tensor, actions: Tensor) -> None:
        """Note what the loss needs beside the reward; nothing here. `logits` `[T, A]`, `actions` `[T]`."""

    def give_reward(self, reward: Tensor) -> None:
        """Turn the last call in training mode into `losses["policy"]`.

        Args:
            reward: one number, or one for each of B sequences, or one for each of T tokens; larger is better.

        Raises:
            RuntimeError: there was no call in training mode since the last reward.
            ValueError: T is no multiple of the number of rewards.
        """
        if self.log_chances is None:
            raise RuntimeError("a reward belongs to a call in training mode: run the model in train() first")
        log_chances, self.log_chances = self.log_chances, None
        reward = reward.detach().to(log_chances).reshape(-1)
        if not len(log_chances):
            return
        if not len(reward) or len(log_chances) % len(reward):
            raise ValueError(
                f"{len(reward)} rewards do not fit {len(log_chances)} tokens; give one number, one for every sequence, "
                "or one for every token"
            )
        advantage = reward - self.baseline.to(reward)
        per_token = advantage.repeat_interleave(len(log_chances) // len(reward))
        self.losses["policy"] = -(log_chances * per_token).mean()
        self.coefficients["policy"] = 1.0
        mean = reward.mean().to(self.baseline.dtype)
        self.baseline.copy_(torch.where(self.rewarded, _MEMORY * self.baseline + (1 - _MEMORY) * mean, mean))
        self.rewarded.fill_(True)


class RLRouter(PolicyRouter):
    """RL-R: the reward is minus the cross-entropy of the task."""

    system = System(
        name="rl-r",
        paper="Unified Scaling Laws for Routed Language Models (RL-R, arXiv 2202.01169)",
        mechanism="one expert, drawn from a policy that REINFORCE trains on a reward; weight 1",
        export_form="top-k",
        needs=("reward",),
    )

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k, num_experts)


class RoutingNetworkRouter(PolicyRouter):
    """Routing Networks: an action may pass the token on unchanged, and tokens are rewarded for choosing alike."""

    system = System(
        name="routing-network",
        paper="Routing Networks: Adaptive Selection of Non-linear Functions for Multi-Task Learning (arXiv 1711.01239)",
        mechanism="one expert, or none, drawn from a policy that REINFORCE trains on reward and agreement",
        export_form="top-k",
        needs=("reward",),
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        pass_through: bool = False,
        collaboration: float = 0.0,
    ) -> None:
        """Make the policy.

        Args:
            top_k: 1.
            pass_through: add an action that runs no expert, so that depth differs from token to token.
            collaboration: reward for an action, times the mean probability that the tokens of the call give it.
        """
        super().__init__(hidden_size, num_experts, top_k, num_experts + pass_through)
        self.pass_through = pass_through
        self.collaboration = collaboration
        self.agreement: Tensor | None = None  # [T]

    @property
    def rule(self) -> WeightRule:
        """A single weight of 1, unless a token may pass."""
        return "free" if self.pass_through else "one"

    def act(self, logits: Tensor, actions: Tensor) -> None:
        """The mean probability of every action taken."""
        self.agreement = torch.softmax(logits.detach(), dim=-1).mean(0)[actions]

    def give_reward(self, reward: Tensor) -> None:
        """As `PolicyRouter.give_reward`, with the reward for collaboration on top."""
        if self.agreement is not None and self.collaboration:
            tokens = len(self.agreement)
            spread = reward.detach().to(self.agreement).reshape(-1)
            if len(spread) and tokens % len(spread) == 0:
                reward = spread.repeat_interleave(tokens // len(spread)) + self.collaboration * self.agreement
        super().give_reward(reward)
