"""SpeechMoE (arXiv 2105.03036, 2111.11831): top-1 by logits of the token and of an embedding that all layers share.

    p = softmax(W x + V c),    y = p_e E_e(x),  e = argmax p

The embedding c comes from a network of its own: of graphemes in the first paper, of domain and accent too in the
second. It is an input of the model here, and its gradient reaches that network. Formulas and coefficients of the losses
were not read in the papers (unverified). T tokens, A embedding_size, E num_experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.routers.base import Reads, System, require_one, wide
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.losses import mean_importance_loss, sparsity_loss
from sparsify.routers.token_choice import TokenChoiceRouter

_INIT_STD = 0.02


class SpeechMoERouter(LinearRouter, TokenChoiceRouter):
    """A loss for tokens that are sure of their expert, and one for experts that are used alike."""

    system = System(
        name="speech-moe",
        paper="SpeechMoE: Scaling to Large Acoustic Models with Dynamic Routing Mixture of Experts (arXiv 2105.03036); "
        "SpeechMoE2 (arXiv 2111.11831)",
        mechanism="the one largest probability, of logits that may read an embedding too; losses: sparsity of each "
        "token, equal mean importance",
        export_form="top-k",
    )
    default_top_k = 1

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        embedding_size: int = 0,
        sparsity_coefficient: float = 0.1,
        importance_coefficient: float = 0.1,
        **options: Any,
    ) -> None:
        """Top-1.

        Args:
            top_k: 1.
            embedding_size: A; with 0 the router reads tokens alone.
            sparsity_coefficient: of `sparsity_loss`.
            importance_coefficient: of `mean_importance_loss`.
            **options: of `TokenChoiceRouter`.
        """
        super().__init__(hidden_size, num_experts, top_k, **options)
        if embedding_size < 0:
            raise ValueError(f"embedding_size is a number of features, or 0 for no embedding, got {embedding_size}")
        self.embedding_size = embedding_size
        self.sparsity_coefficient = sparsity_coefficient
        self.importance_coefficient = importance_coefficient
        self.coefficients = {"sparsity": sparsity_coefficient, "importance": importance_coefficient}
        if embedding_size:
            self.embedding_weight = nn.Parameter(torch.randn(num_experts, embedding_size) * _INIT_STD)
        self._embedding: Tensor | None = None  # [T, A], of one call

    @property
    def reads(self) -> Reads | None:
        """The embedding of every token."""
        return "embedding" if self.embedding_size else None

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    def logits(self, x: Tensor) -> Tensor:
        """Of tokens, and of the embedding of this call."""
        logits = super().logits(x)
        if self._embedding is None:
            return logits
        embedding = wide(self._embedding).to(logits.dtype)
        return logits + nn.functional.linear(embedding, wide(self.embedding_weight).to(logits.dtype))

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`ids` `[T, A]` is the embedding."""
        self._embedding = ids
        try:
            return super().route(x)
        finally:
            self._embedding = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `TokenChoiceRouter`.

        Raises:
            ValueError: the router reads an embedding, and there is none.
        """
        if self.embedding_size:
            raise ValueError(
                f"the router 'speech-moe' reads an embedding of {self.embedding_size} features of every token: call "
                "router(x, embedding)"
            )
        return super().route(x)

    def add_losses(self, logits: Tensor, scores: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """See the module."""
        self.losses["sparsity"] = sparsity_loss(scores)
        self.losses["importance"] = mean_importance_loss(scores)
