"""Options of a conversion: one frozen dataclass, validated where it is made."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Union, cast

if TYPE_CHECKING:
    from sparsify.passes.match_ffn import FFNMatch

# A preset, one glob pattern, several of them, a number of FFNs, a fraction of them, or a predicate on FFNMatch.
Select = Union[str, "tuple[str, ...]", "list[str]", int, float, "Callable[[FFNMatch], bool]"]


@dataclass(frozen=True)
class LayerOptions:
    """What differs from the config in some FFNs. None leaves the number of the config, or of an earlier pattern."""

    num_experts: int | None = None
    top_k: int | None = None
    num_shared_experts: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work in any config.

        Raises:
            ValueError: says what was given and what is allowed.
        """
        for name, value in vars(self).items():
            if value is not None:
                _at_least(name, value, 0 if name == "num_shared_experts" else 1)
        if self.num_experts is not None and self.top_k is not None:
            check_counts(self.num_experts, self.top_k, self.num_shared_experts)


# Glob pattern on names -> fields of LayerOptions. A config keeps them as pairs with LayerOptions, to be hashable.
Overrides = Union["Mapping[str, Mapping[str, int]]", "tuple[tuple[str, LayerOptions | Mapping[str, int]], ...]"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How to divide the neurons of an FFN among experts.

    Attributes:
        num_experts: equal parts that the neurons of an FFN are divided into, shared experts included.
        top_k: parts that run for a token, shared experts included; `top_k / num_experts` of the FFN is computed.
        num_shared_experts: parts that run for every token. None: one where `1 < top_k < num_experts`, else none. As
            many as `top_k`: static pruning, no part is routed.
        budget: share of the multiply-adds of the converted FFNs that may remain, routers included. `top_k` and
            `num_shared_experts` of each are then chosen by measured error, pruning and leaving it dense among the
            choices; needs calibration data. None: `top_k` everywhere.
        select: which FFNs to convert. "auto": those that map the hidden size to itself and are wide enough to pay;
            "all": every legal one; glob patterns on names, each of which must match; a predicate on `FFNMatch`.
            The others choose among what "auto" takes, n FFNs in graph order:
            an int N: the last N; a float in (0, 1]: that fraction of the n, rounded up, counted from the end;
            "every-other": the 2nd, 4th, ..., so the last one only where n is even (GShard, GLaM);
            "every-fourth": the 4th, 8th, ... (ST-MoE); "last-half": 0.5;
            "later": sparse at first, all at the end: the 4th, 8th, ... of the first half and the whole last half.
            Late layers gain most from experts (DeepSpeed-MoE, arXiv 2201.05596, which compares the halves).
        overrides: FFNs with numbers of their own: glob patterns on names to `num_experts`, `top_k` and
            `num_shared_experts`, as in `{"*.11.*": {"top_k": 8}}`. Where several match, the later one wins.
        target_tokens: tokens of a call, such as `(1, 512)`. The presets then leave an FFN dense whose experts are not
            faster at each of these sizes, as measured on the device of the model; `select="all"`, names and predicates
            convert it all the same. The report holds prediction and measurement. Empty measures nothing, so that the
            same model gives the same result on every machine.
        router_hidden_size: width of the router's hidden layer.
        refit: fit the experts to the routing (needs calibration): down_proj in closed form, then `distill_steps`.
            Without it `set_top_k(num_experts)` gives the dense model back.
        distill_steps: steps in which experts and router of an FFN are trained together towards the hidden state of the
            dense model, on the calibration tokens; fewer where those are few, and none where held-out tokens say that
            it does not help. 0 stops after the closed form.
        ridge: strength of the pull to the old weights in the refit, relative to the mean square of a neuron.
        max_calibration_tokens: no more calibration batches are read once this many tokens were seen.
        seed: of the clustering and the training of the routers.
    """

    num_experts: int = 16
    top_k: int = 4
    num_shared_experts: int | None = None
    budget: float | None = None
    select: Select = "auto"
    overrides: Overrides = ()
    target_tokens: tuple[int, ...] | list[int] | int = ()
    router_hidden_size: int = 64
    refit: bool = True
    distill_steps: int = 300
    ridge: float = 1e-3
    max_calibration_tokens: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work, and freeze what a caller could still change.

        Raises:
            ValueError: says what was given and what is allowed.
        """
        check_counts(self.num_experts, self.top_k, self.num_shared_experts)
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"budget must be a share of the multiply-adds between 0 and 1, got {self.budget!r}")
        _check_select(self.select)
        if isinstance(self.select, list):
            object.__setattr__(self, "select", tuple(self.select))
        object.__setattr__(self, "overrides", _freeze_overrides(self.overrides))
        object.__setattr__(self, "target_tokens", _read_tokens(self.target_tokens))
        _at_least("router_hidden_size", self.router_hidden_size, 1)
        _at_least("distill_steps", self.distill_steps, 0)
        _at_least("max_calibration_tokens", self.max_calibration_tokens, 1)
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")

    @property
    def shared(self) -> int:
        """`num_shared_experts` with None resolved."""
        if self.num_shared_experts is not None:
            return self.num_shared_experts
        return 1 if 1 < self.top_k < self.num_experts else 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """`target_tokens` as a tuple."""
        return cast("tuple[int, ...]", self.target_tokens)

    @property
    def layer_options(self) -> tuple[tuple[str, LayerOptions], ...]:
        """`overrides` as pairs of pattern and options, in their order."""
        return cast("tuple[tuple[str, LayerOptions], ...]", self.overrides)

    def for_layer(self, name: str) -> SparsifyConfig:
        """The config of one FFN: its overrides applied, none left.

        Raises:
            ValueError: the numbers do not fit together.
        """
        changes: dict[str, Any] = {}
        for pattern, options in self.layer_options:
            if fnmatch.fnmatchcase(name, pattern):
                changes |= {field: value for field, value in vars(options).items() if value is not None}
        return replace(self, overrides=(), **changes)


def _read_tokens(given: object) -> tuple[int, ...]:
    tokens: tuple[Any, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    for number in tokens:
        _at_least("target_tokens", number, 1)
    return tokens


def check_counts(num_experts: int, top_k: int, num_shared_experts: int | None) -> None:
    """Refuse numbers of experts that do not fit together.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    _at_least("num_experts", num_experts, 1)
    _whole("top_k", top_k)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    if num_shared_experts is None:
        return
    _whole("num_shared_experts", num_shared_experts)
    if not 0 <= num_shared_experts <= top_k:
        raise ValueError(
            f"num_shared_experts must be between 0 and top_k ({top_k}), as the shared experts are among the top_k that "
            f"run for a token, got {num_shared_experts}"
        )


def _at_least(name: str, value: int, least: int) -> None:
    _whole(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def _check_select(select: object) -> None:
    if isinstance(select, str) or callable(select):
        return
    if isinstance(select, (tuple, list)) and select and all(isinstance(pattern, str) for pattern in select):
        return
    if isinstance(select, bool) or not isinstance(select, (int, float)):
        raise ValueError(
            "select must be a preset, a glob pattern, a tuple of patterns, a number of FFNs, a fraction of them or a "
            f"predicate on FFNMatch, got {select!r}"
        )
    if isinstance(select, int) and select < 1:
        raise ValueError(f"select as a number of FFNs must be at least 1, got {select}")
    if isinstance(select, float) and not 0 < select <= 1:
        raise ValueError(f"select as a fraction of the FFNs must be above 0 and at most 1, got {select}")


def _freeze_overrides(overrides: object) -> tuple[tuple[str, LayerOptions], ...]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        raise ValueError(f"overrides must map glob patterns on names to numbers of experts, got {overrides!r}")
    return tuple((str(pattern), _read_options(pattern, given)) for pattern, given in cast("Iterable[Any]", pairs))


def _read_options(pattern: object, given: object) -> LayerOptions:
    if isinstance(given, LayerOptions):
        return given
    allowed = ", ".join(field.name for field in fields(LayerOptions))
    if not isinstance(given, Mapping) or set(given) - {field.name for field in fields(LayerOptions)}:
        raise ValueError(f"overrides[{pattern!r}] must give numbers for some of {allowed}, got {given!r}")
    try:
        return LayerOptions(**given)
    except ValueError as error:
        raise ValueError(f"overrides[{pattern!r}]: {error}") from error
