"""Routers that merge experts: W = sum_e p_e W_e, then one FFN for all tokens of a segment.

SMEAR (arXiv 2306.03745): a segment is a sequence, and p the softmax of the logits of its mean. Lory (arXiv 2405.03133):
sequences are cut into segments, and p of each comes from the mean of the segment before, so no token sees a later one.

G sequences of S tokens, n segments of L tokens in each, N = G n, D hidden_size, E num_experts.
"""

from __future__ import annotations

import abc
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, WeightRule, require_one, wide
from sparsify.routers.group_routers import as_groups
from sparsify.routers.linear_router import LinearRouter


class MergingRouter(LinearRouter):
    """All experts, as one: `top_k` is 1, the merged one. A subclass defines `segment` and `segment_weights`."""

    reads_groups: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    default_top_k = 1

    def check_top_k(self, top_k: int) -> None:
        """One merged expert runs."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    @property
    def num_slots(self) -> int:
        """Every expert has a share in what runs."""
        return self.num_experts

    @property
    def rule(self) -> WeightRule:
        """A softmax, whatever `weights` says."""
        return "sum"

    @property
    def batch_invariant(self) -> bool:
        """The means are those of other tokens too."""
        return False

    @abc.abstractmethod
    def segment(self, tokens: int) -> int:
        """L, for sequences of `tokens` tokens."""

    @abc.abstractmethod
    def segment_weights(self, means: Tensor) -> Tensor:
        """The shares of the experts in every segment, from the means of the segments: `[G, n, D]` to `[G, n, E]`."""

    def merge_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cut and weigh.

        Args:
            x: `[G, S, D]`.

        Returns:
            segments: `[G, n, L, D]`, zeros where the last one is not full.
            weights: `[G, n, E]`, fp32.
        """
        tokens = x.shape[1]
        length = self.segment(tokens)
        count = (tokens + length - 1) // length
        padding = count * length - tokens
        segments = nn.functional.pad(x, (0, 0, 0, padding)).view(x.shape[0], count, length, x.shape[2])
        sizes = nn.functional.pad(wide(x).new_ones(tokens), (0, padding)).view(count, length).sum(-1, keepdim=True)
        return segments, self.segment_weights(wide(segments).sum(2) / sizes.clamp(min=1))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the first two of `forward`."""
        weights, expert_ids, *_ = self.forward(x)
        return weights, expert_ids

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Cut sequences into segments, and weigh the experts of each.

        Args:
            x: `[G, .., D]`; `[S, D]` is one sequence.
            ids: not read.

        Returns:
            routing_weights: `[T, E]`, the shares of the experts in what runs for each token.
            expert_ids: `[T, E]` int64, all experts.
            segments: `[N, L, D]`, what the merged experts read in the place of tokens.
            merge_weights: `[N, E]`, by which they are merged.
            places: `[T]` int64, where each token is among the rows of the segments.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        x = as_groups(x)
        segments, weights = self.merge_weights(x)
        groups, count, length, _ = segments.shape
        weights = weights.to(x.dtype).flatten(0, 1)
        rows = torch.arange(groups * count * length, device=x.device).view(groups, count * length)
        places = rows[:, : x.shape[1]].flatten()
        routing_weights = weights.index_select(0, places // length)
        expert_ids = torch.arange(self.num_experts, device=x.device).expand(routing_weights.shape)
        return routing_weights, expert_ids, segments.flatten(0, 1), weights, places


class SmearRouter(MergingRouter):
    """One merged expert for a whole sequence, padding included: a sequence has one mean."""

    system = System(
        name="smear",
        paper="Soft Merging of Experts with Adaptive Routing (SMEAR, arXiv 2306.03745)",
        mechanism="one expert, the weights of all averaged by the softmax of the logits of the sequence's mean",
        export_form="mixing",
    )

    @property
    def causal(self) -> bool:
        """Later tokens are in the mean."""
        return False

    def segment(self, tokens: int) -> int:
        """All of them."""
        return tokens

    def segment_weights(self, means: Tensor) -> Tensor:
        """From its own mean."""
        return torch.softmax(self.logits(means), dim=-1)


class LoryRouter(MergingRouter):
    """One merged expert for a segment, by the mean of the segment before it.

    The paper's code was not read: "own" is how we understand what its first segment gets (unverified).
    """

    system = System(
        name="lory",
        paper="Lory: Fully Differentiable Mixture-of-Experts for Autoregressive Language Model Pre-training "
        "(arXiv 2405.03133)",
        mechanism="as smear, for a segment of a sequence, by the mean of the segment before it",
        export_form="mixing",
    )

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        segment_size: int = 256,
        first_segment: Literal["mean", "own"] = "mean",
    ) -> None:
        """Draw the weights.

        Args:
            top_k: 1.
            segment_size: L.
            first_segment: which has none before it. "mean": all experts in equal parts. "own": by its own mean, without
                a gradient; its tokens then see later ones of the segment.
        """
        super().__init__(hidden_size, num_experts, top_k)
        if segment_size < 1:
            raise ValueError(f"segment_size is a number of tokens, at least 1, got {segment_size}")
        if first_segment not in ("mean", "own"):
            raise ValueError(f"first_segment must be 'mean' or 'own', got {first_segment!r}")
        self.segment_size = segment_size
        self.first_segment: Literal["mean", "own"] = first_segment

    @property
    def causal(self) -> bool:
        """Unless the first segment goes by its own mean."""
        return self.first_segment == "mean"

    def segment(self, tokens: int) -> int:
        """The same for sequences of any length."""
        return self.segment_size

    def segment_weights(self, means: Tensor) -> Tensor:
        """Shifted by one segment; a mean of zero has logits of zero, which are equal parts."""
        before = nn.functional.pad(means, (0, 0, 1, 0))[:, :-1]  # [G, n, D]
        weights = torch.softmax(self.logits(before), dim=-1)
        if self.first_segment == "mean":
            return weights
        own = torch.softmax(self.logits(means[:, :1]), dim=-1).detach()
        return torch.cat([own, weights[:, 1:]], dim=1)
