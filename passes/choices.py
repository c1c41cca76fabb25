"""The ways in which an FFN may be converted, as plain data: what each costs, and how far it moves the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sparsify.config import SparsifyConfig
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.plan import LayerPlan


@dataclass(frozen=True)
class Choice:
    """One way to convert an FFN.

    Attributes:
        top_k: parts that run.
        num_shared: of them, those that always run; all of them where the FFN is pruned.
        num_experts: E; 0 leaves the FFN dense.
        macs: multiply-adds for a token at all sites, router included.
        error: that it adds to the outputs of the model, squared and relative.
        seconds: of one call of each of `target_tokens`, at all sites; empty where none is given.
    """

    top_k: int
    num_shared: int
    num_experts: int
    macs: float
    error: float
    seconds: tuple[float, ...] = ()

    @property
    def way(self) -> Literal["dense", "pruned", "routed"]:
        """How the FFN is converted."""
        if self.num_experts == 0:
            return "dense"
        return "pruned" if self.num_shared == self.top_k else "routed"

    def configure(self, config: SparsifyConfig) -> SparsifyConfig:
        """`config` with the numbers of this choice, which must not be "dense"."""
        return replace(
            config, num_experts=self.num_experts, top_k=self.top_k, num_shared_experts=self.num_shared, budget=None
        )


@dataclass(frozen=True)
class FFNChoices:
    """All ways to convert one FFN.

    Attributes:
        match: the FFN.
        layer: what was planned for it without a budget.
        config: that of the conversion.
        dense: leaving it as it is.
        sparse: all others, the cheapest of each way first.
    """

    match: FFNMatch
    layer: LayerPlan
    config: SparsifyConfig
    dense: Choice
    sparse: tuple[Choice, ...]

    @property
    def all(self) -> Sequence[Choice]:
        """Dense first."""
        return (self.dense, *self.sparse)
