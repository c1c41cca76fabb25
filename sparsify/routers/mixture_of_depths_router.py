"""Mixture-of-Depths (arXiv 2404.02258): the FFN runs for the C tokens of a sequence that score highest.

    y = r f(x) for the C = ceil(capacity S) tokens with the largest r = w . x, else 0;  the residual passes them all

Which tokens these are depends on later ones. A second head learns to tell it from the token alone; inference asks it,
and is causal. S tokens of a sequence. The paper lets tokens skip a whole block, attention included; here it is the FFN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, where_used, wide
from sparsify.routers.group_routers import GroupRouter, as_groups, distance, largest, linear, small_weight

_PARTS = 2**20  # shares are counted in whole parts: S is a symbol while the model is traced, which cannot be rounded


class MixtureOfDepthsRouter(GroupRouter):
    """One expert, the FFN itself, that a token gets or does not get.

    The predictor reads the token without passing a gradient on, and starts with "run", so that the converted model
    starts with all tokens on.
    """

    system = System(
        name="mixture-of-depths",
        paper="Mixture-of-Depths: Dynamically allocating compute in transformers (arXiv 2404.02258)",
        mechanism="training: the FFN runs for the best tokens of a sequence; inference: for those a predictor names",
        export_form="mask",
    )
    default_num_experts = 1
    default_top_k = 1

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        capacity: float = 0.125,
        predictor: bool = True,
        predictor_coefficient: float = 0.01,
    ) -> None:
        """Make the score and the predictor.

        Args:
            num_experts: 1.
            top_k: 1.
            capacity: share of the tokens of a sequence that the FFN runs for in training.
            predictor: let it decide at inference; else the best tokens of the sequence, which is not causal.
            predictor_coefficient: of its binary cross-entropy.
        """
        if num_experts != 1:
            raise ValueError(
                f"the router 'mixture-of-depths' lets tokens skip one FFN; give num_experts=1, top_k=1 and "
                f"start='upcycle', got {num_experts} experts"
            )
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity is a share of the tokens, above 0 and at most 1, got {capacity}")
        super().__init__(hidden_size, num_experts, top_k)
        self.capacity = capacity
        self.predictor = predictor
        self.predictor_coefficient = predictor_coefficient
        self.weight = small_weight(1, hidden_size)
        self.predictor_weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.coefficients = {"predictor": predictor_coefficient}

    @property
    def start_sum(self) -> float | None:
        """The predictor starts with all tokens on, each with its own score."""
        return 1.0 if self.predictor and self.weights != "native" else None

    @property
    def causal(self) -> bool:
        """The predictor reads one token."""
        return self.predictor

    @property
    def batch_invariant(self) -> bool:
        """The predictor reads one token."""
        return self.predictor

    def margins(self, x: Tensor) -> Tensor:
        """Of the score, or of the predictor from 0; before it was trained it is 0 everywhere, in any runtime."""
        x = as_groups(x)
        if not self.predictor:
            return distance(linear(x, self.weight).squeeze(-1), self._count(x)).flatten()
        predicted = self._predicted(x).flatten().abs()
        return torch.where(predicted > 0, predicted / predicted.amax(), torch.inf) if len(predicted) else predicted

    def _count(self, x: Tensor) -> int:
        return -(-x.shape[1] * round(self.capacity * _PARTS) // _PARTS)

    def route_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One slot, unused where the token skips the FFN."""
        scores = linear(x, self.weight).squeeze(-1)  # [G, S]
        if self.predictor and not self.training:
            used = self._predicted(x) >= 0
        else:
            used = largest(scores, self._count(x))
        if self.predictor and self.training and used.numel():
            self.losses["predictor"] = nn.functional.binary_cross_entropy_with_logits(
                self._predicted(wide(x).detach()), used.to(scores.dtype)
            )
        return where_used(scores.reshape(-1, 1), used.reshape(-1, 1))

    def _predicted(self, x: Tensor) -> Tensor:
        return linear(x, self.predictor_weight).squeeze(-1)
