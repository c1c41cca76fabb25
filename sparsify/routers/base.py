"""What every router is: a module that maps tokens to the experts that run for them, and how much each counts.

T tokens, D hidden_size, E num_experts, K slots of a token.
"""

from __future__ import annotations

import abc
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

# What a router reads of every token beside its features: its id or a label, an integer each; or an embedding.
Reads = Literal["ids", "labels", "embedding"]

# What is known of the weights of a token: each used slot has 1; they sum to 1; nothing.
WeightRule = Literal["one", "sum", "free"]


@dataclass(frozen=True)
class System:
    """What the catalogue says of a router.

    Attributes:
        name: what `sparsify(model, router=name)` takes.
        paper: title and arXiv number.
        mechanism: in one line.
        export_form: what runs at inference: "top-k", "table", "mask", "top-tokens" or "mixing".
        needs: what it reads beside the tokens, such as "ids", or asks of the training loop, such as "reward".
    """

    name: str
    paper: str
    mechanism: str
    export_form: Literal["top-k", "table", "mask", "top-tokens", "mixing"]
    needs: tuple[str, ...] = ()


class Router(nn.Module, abc.ABC):
    """Choose among `num_experts` experts for every token.

    Every constructor begins with `hidden_size` D, `num_experts` E and `top_k` K, and has defaults for the rest.

    A subclass defines `system` and `route`, and keeps every argument of its constructor in an attribute of the same
    name, from which a saved model is built again. What training needs beside the loss of the task it leaves in `losses`
    while it routes in training mode, with a factor for each in `coefficients`.

    Routing arithmetic is done in fp32 (see `wide`), whatever the dtype of the tokens and of the weights.
    """

    system: ClassVar[System]
    default_num_experts: ClassVar[int] = 4
    default_top_k: ClassVar[int] = 2
    reads_groups: ClassVar[bool] = False  # tokens of a group compete: `forward` is given `[G, .., D]`
    mixes: ClassVar[bool] = False  # experts run on mixtures of tokens: see `SoftMoERouter.forward`
    merges: ClassVar[bool] = False  # experts are merged into one: see `MergingRouter.forward`

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.weights: Literal["native", "one", "sum"] = "native"  # see `straighten`
        self.losses: dict[str, Tensor] = {}
        self.coefficients: dict[str, float | Tensor] = {}
        self.check_top_k(top_k)

    def check_top_k(self, top_k: int) -> None:
        """Refuse a number of experts that the router cannot choose.

        Raises:
            ValueError: says what is allowed.
        """
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and the {self.num_experts} routed experts, got {top_k}")

    def check_group(self, tokens: int) -> None:
        """Refuse groups of `tokens` tokens that the router cannot route; all can be, unless it reads groups.

        Raises:
            ValueError: says what to change.
        """

    @property
    def reads(self) -> Reads | None:
        """What `forward` wants as `ids`; None for nothing."""
        return None

    @property
    def num_slots(self) -> int:
        """K: columns of what `forward` returns, `top_k` unless the number of experts differs from token to token."""
        return self.top_k

    @property
    def rule(self) -> WeightRule:
        """What is known of the weights at inference, nothing dropped."""
        return "free" if self.weights == "native" else self.weights

    @property
    def start_sum(self) -> float | None:
        """What the weights of every token sum to before any training; None where that is not known."""
        return {"one": float(self.num_slots), "sum": 1.0, "free": None}[self.rule]

    @property
    def causal(self) -> bool:
        """The route of a token does not depend on tokens after it."""
        return True

    @property
    def batch_invariant(self) -> bool:
        """The route of a token does not depend on any other token."""
        return True

    @abc.abstractmethod
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[T, D]` -> routing_weights `[T, K]`, floating; expert_ids `[T, K]` int64, -1 for a slot not used."""

    def route_by_id(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `route`, for a router that also `reads` something of every token, `ids` `[T]` or `[T, A]`."""
        return self.route(x)

    def fit_ids(self, ids: Tensor) -> None:
        """Adapt to the ids `[T]` of the calibration data, before the first call; here nothing."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Route tokens.

        Args:
            x: `[T, D]`; or `[G, .., D]`, G groups of T / G tokens, for a router that reads groups.
            ids: what the router `reads`: `[T]` int64, token ids or labels; or an embedding `[T, A]`.

        Returns:
            routing_weights: `[T, K]`, dtype of `x`.
            expert_ids: `[T, K]` int64 in `[-1, E)`; -1 is a slot that is not used.
        """
        if torch.is_autocast_enabled(x.device.type):  # rounded logits would choose other experts
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, ids)
        self.losses = {}
        routing_weights, expert_ids = self.route(x) if ids is None else self.route_by_id(x, ids)
        if self.weights != "native":
            routing_weights = straighten(routing_weights, expert_ids, self.weights, keep_gradient=self.training)
        return routing_weights.to(x.dtype), expert_ids

    def aux_loss(self) -> Tensor:
        """The losses of the last call in training mode, each times its coefficient: a scalar, 0 if there are none."""
        terms = [self.coefficients[name] * loss for name, loss in self.losses.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def after_step(self) -> None:
        """Adapt what no gradient moves, such as the bias of DeepSeek-V3, after a step of the optimiser; here nothing.

        `SparseModel.after_step` calls it on every router.
        """

    def options(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in _arguments(type(self))}

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: a loss belongs to one call, and torch refuses to copy what has a gradient to compute."""
        return {**self.__dict__, "losses": {}}

    def extra_repr(self) -> str:
        """What `print` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class UnitRouter(Router):
    """The `top_k` experts of the largest logits run, each with routing weight 1: what a split FFN needs.

    Its experts are disjoint parts of one sum. No gradient reaches the logits. A subclass defines `logits`.
    """

    @property
    def rule(self) -> WeightRule:
        """Every weight is 1."""
        return "one"

    @abc.abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Score the experts: `[T, D]` to `[T, E]`, fp32."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By falling logit."""
        expert_ids = torch.topk(self.logits(x), self.top_k, dim=-1).indices
        return torch.ones_like(expert_ids, dtype=x.dtype), expert_ids


def _arguments(router: type[Router]) -> list[str]:
    """Names of what the constructor takes; `**options` stands for the arguments of the next class."""
    names: list[str] = []
    for made in router.__mro__:
        if "__init__" not in vars(made):
            continue
        parameters = list(inspect.signature(made.__init__).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in names]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in fp32, or fp64 where it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def straighten(
    routing_weights: Tensor, expert_ids: Tensor, rule: Literal["one", "sum"], *, keep_gradient: bool
) -> Tensor:
    """Divide weights by their own value, or by their sum, without a gradient through the divisor.

    The experts then add up to the dense FFN at the start of training, and the router still gets the gradient of its own
    weights, scaled (Switch: `p / stop_gradient(p)`).

    Args:
        routing_weights: `[T, K]`, not 0 where a slot is used.
        expert_ids: `[T, K]`, -1 for a slot not used.
        rule: "one": each used slot has 1. "sum": the used slots of a token sum to 1.
        keep_gradient: else the ones of "one" are constants.

    Returns:
        `[T, K]`, 0 for a slot that is not used.
    """
    used = (expert_ids >= 0).to(routing_weights.dtype)
    if rule == "one" and not keep_gradient:
        return used
    routing_weights = routing_weights * used
    value = routing_weights.detach()
    divisor = value if rule == "one" else value.sum(-1, keepdim=True)
    return routing_weights / torch.where(divisor != 0, divisor, 1.0)


def where_used(weights: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Slots for a router whose number of experts differs from token to token: slot e belongs to expert e.

    Args:
        weights: `[T, E]`.
        used: `[T, E]` bool.

    Returns:
        routing_weights `[T, E]`, 0 where not used; expert_ids `[T, E]`, -1 where not used.
    """
    experts = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
    return weights * used, torch.where(used, experts, -1)


def require_one(name: str, top_k: int) -> None:
    """Refuse more than one expert a token.

    Raises:
        ValueError: `top_k` is not 1.
    """
    if top_k != 1:
        raise ValueError(f"the router {name!r} sends every token to one expert, got top_k={top_k}; give top_k=1")
