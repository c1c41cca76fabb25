"""Options of a conversion: one frozen dataclass, validated where it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from sparsify.passes.match_ffn import FFNMatch

# "auto", "all", one glob pattern, several of them, or a predicate on FFNMatch.
Select = Union[str, "tuple[str, ...]", "Callable[[FFNMatch], bool]"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How to divide the neurons of an FFN among experts.

    Attributes:
        num_experts: equal parts that the neurons of an FFN are divided into, shared experts included.
        top_k: parts that run for a token, shared experts included; `top_k / num_experts` of the FFN is computed.
        num_shared_experts: parts that run for every token. None: one where `1 < top_k < num_experts`, else none.
        select: which FFNs to convert. "auto": those that map the hidden size to itself and are wide enough to pay;
            "all": every legal one; glob patterns on names; a predicate on `FFNMatch`.
        router_hidden_size: width of the router's hidden layer.
        refit: refit down_proj in closed form to the routing (needs calibration). Without it `set_top_k(num_experts)`
            gives the dense model back.
        ridge: strength of the pull to the old weights in the refit, relative to the mean square of a neuron.
        max_calibration_tokens: no more calibration batches are read once this many tokens were seen.
        seed: of the clustering and the training of the routers.
    """

    num_experts: int = 16
    top_k: int = 4
    num_shared_experts: int | None = None
    select: Select = "auto"
    router_hidden_size: int = 64
    refit: bool = True
    ridge: float = 1e-3
    max_calibration_tokens: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: says what was given and what is allowed.
        """
        _at_least("num_experts", self.num_experts, 1)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts ({self.num_experts}), got {self.top_k}")
        if self.num_shared_experts is not None and not 0 <= self.num_shared_experts < self.top_k:
            raise ValueError(
                f"num_shared_experts must be between 0 and top_k - 1 ({self.top_k - 1}), as the shared experts are "
                f"among the top_k that run for a token, got {self.num_shared_experts}"
            )
        _at_least("router_hidden_size", self.router_hidden_size, 1)
        _at_least("max_calibration_tokens", self.max_calibration_tokens, 1)
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")

    @property
    def shared(self) -> int:
        """`num_shared_experts` with None resolved."""
        if self.num_shared_experts is not None:
            return self.num_shared_experts
        return 1 if 1 < self.top_k < self.num_experts else 0


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
