"""Matches + config -> ConversionPlan: which FFNs become experts and how many, and why the others stay dense.

A plan is plain data: print it, write it to JSON, edit it, and give it back to `sparsify(plan=...)`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsify.config import SparsifyConfig, check_counts, read_widths
from sparsify.errors import SelectionError
from sparsify.passes.layer_times import LayerTime, time_layer
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.select_ffns import require_match, select_ffns, selects_what_pays

# Below this many neurons an expert's matrix products are too small to be worth their dispatch.
_MIN_EXPERT_SIZE = 32


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one FFN, and why.

    Attributes:
        name: of the FFN.
        reason: why it is converted or not.
        num_experts: shared experts included. 0 leaves the FFN dense.
        top_k: experts that run for a token, shared ones included.
        num_shared_experts: experts that run for every token.
        expert_widths: neurons of each expert, shared ones first; empty where they are equal parts.
        times: dense and as experts, at each of `target_tokens`.
    """

    name: str
    reason: str
    num_experts: int = 0
    top_k: int = 0
    num_shared_experts: int = 0
    expert_widths: tuple[int, ...] = ()
    times: tuple[LayerTime, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit together.

        Raises:
            ValueError: names the FFN, what was given and what is allowed.
        """
        if self.num_experts == 0:
            return
        try:
            check_counts(self.num_experts, self.top_k, self.num_shared_experts)
            if self.expert_widths:
                read_widths(self.expert_widths, self.num_experts)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def converts(self) -> bool:
        """The FFN becomes experts."""
        return self.num_experts > 0

    def configure(self, config: SparsifyConfig) -> SparsifyConfig:
        """`config` with the numbers of this FFN."""
        return replace(
            config,
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_shared_experts=self.num_shared_experts,
            expert_widths=self.expert_widths or None,
            overrides=(),
        )

    def __str__(self) -> str:
        if not self.converts:
            return f"{self.name}: dense, {self.reason}"
        shared = f", {self.num_shared_experts} shared" if self.num_shared_experts else ""
        return f"{self.name}: {self.top_k} of {self.num_experts} experts{shared}, {self.reason}"


@dataclass(frozen=True)
class ConversionPlan:
    """One `LayerPlan` per FFN, in graph order."""

    layers: tuple[LayerPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for `json.dump`."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ConversionPlan:
        """Read what `to_json` wrote, edited or not.

        Raises:
            ValueError: a field is missing, unknown or not valid.
        """
        try:
            return cls(tuple(_read_layer(layer) for layer in document["layers"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no plan as ConversionPlan.to_json() gives it: {error!r}") from error

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def _read_layer(document: Mapping[str, Any]) -> LayerPlan:
    layer = LayerPlan(**document)
    times = tuple(LayerTime(**time) for time in document.get("times", ()))
    return replace(layer, times=times, expert_widths=tuple(document.get("expert_widths", ())))


def make_plan(matches: Sequence[FFNMatch], config: SparsifyConfig) -> ConversionPlan:
    """Decide for every FFN.

    Raises:
        SelectionError: `select` takes nothing, a pattern of `select` or `overrides` matches no FFN, overrides do not
            fit together, or an FFN selected by pattern, predicate or "all" has too few neurons for the experts.
    """
    configs = _layer_configs(matches, config)
    pairs = list(zip(matches, configs, strict=True))
    times = [_layer_times(match, own) for match, own in pairs]
    objections = [_objection(*pair) or _slower(measured) for pair, measured in zip(pairs, times, strict=True)]
    chosen = select_ffns(matches, config.select, [objection is None for objection in objections])
    planned = (
        _plan_layer(match, own, objection, match.name in chosen)
        for (match, own), objection in zip(pairs, objections, strict=True)
    )
    return ConversionPlan(tuple(replace(layer, times=own) for layer, own in zip(planned, times, strict=True)))


def fit_plan(plan: ConversionPlan, matches: Sequence[FFNMatch], config: SparsifyConfig) -> ConversionPlan:
    """Check that a plan that was given fits a model.

    Args:
        plan: in any order.
        matches: every FFN of the model.
        config: the options that a plan does not hold.

    Returns:
        The plan in the order of `matches`; the reasons say that it was given.

    Raises:
        SelectionError: the names are not those of the FFNs, or an FFN has too few neurons for its experts.
    """
    counts = Counter(layer.name for layer in plan.layers)
    names = [match.name for match in matches]
    faults = {
        "does not name": [name for name in names if name not in counts],
        "names, though the model has no such FFN,": [name for name in counts if name not in names],
        "names more than once": [name for name, count in counts.items() if count > 1],
    }
    found = [f"{fault} {', '.join(wrong)}" for fault, wrong in faults.items() if wrong]
    if found:
        raise SelectionError(
            f"the plan does not fit the model: it {'; it '.join(found)}. Make it with inspect(...).plan(...) and edit "
            "the numbers; num_experts = 0 leaves an FFN dense"
        )
    layers = {layer.name: layer for layer in plan.layers}
    return ConversionPlan(tuple(_fit_layer(layers[match.name], match, config) for match in matches))


def _fit_layer(layer: LayerPlan, match: FFNMatch, config: SparsifyConfig) -> LayerPlan:
    if layer.converts:
        return replace(_convert(match, layer.configure(config), "converted by plan="), times=layer.times)
    # An FFN that was switched off still carries the reason for which it was to be converted.
    reason = "" if layer.top_k or not layer.reason else f": {layer.reason}"
    return LayerPlan(match.name, f"left dense by plan={reason}")


def _layer_configs(matches: Sequence[FFNMatch], config: SparsifyConfig) -> list[SparsifyConfig]:
    for pattern, _ in config.layer_options if matches else ():
        require_match(matches, pattern, "overrides")
    return [_layer_config(match, config) for match in matches]


def _layer_config(match: FFNMatch, config: SparsifyConfig) -> SparsifyConfig:
    try:
        return config.for_layer(match.name)
    except ValueError as error:
        raise SelectionError(f"the overrides of {match.name} do not fit together: {error}") from error


def _plan_layer(match: FFNMatch, config: SparsifyConfig, objection: str | None, chosen: bool) -> LayerPlan:
    if objection and selects_what_pays(config.select):
        return LayerPlan(match.name, objection)
    if not chosen:
        return LayerPlan(match.name, f"{_say(config)} leaves it dense")
    reason = "maps the hidden size to itself" if config.select == "auto" else f"selected by {_say(config)}"
    return _convert(match, config, reason)


def _objection(match: FFNMatch, config: SparsifyConfig) -> str | None:
    """Why "auto" leaves an FFN dense."""
    if match.out_features != match.hidden_size:
        return (
            f"not the FFN of a block: maps {match.hidden_size} to {match.out_features} features; "
            "convert it by name or with select='all'"
        )
    if config.start != "split":
        return None if _fits(match, config) else _indivisible(match, config)
    if config.expert_widths is not None:
        return _narrow(match, config) if _fits(match, config) else _misfit(match, config)
    size = -(-match.intermediate_size // config.num_experts)
    if size < _MIN_EXPERT_SIZE or not _fits(match, config):
        return (
            f"too small to pay: {config.num_experts} experts of {size} neurons (at least {_MIN_EXPERT_SIZE}); "
            "use fewer experts, its name or select='all'"
        )
    return None


def _layer_times(match: FFNMatch, config: SparsifyConfig) -> tuple[LayerTime, ...]:
    if config.start != "split" or config.budget is not None or not _fits(match, config):
        return ()  # a budget chooses the numbers first
    return tuple(time_layer(match, config, tokens) for tokens in config.tokens)


def _slower(times: Sequence[LayerTime]) -> str | None:
    """Why "auto" leaves an FFN dense that was measured."""
    losing = [str(time) for time in times if not time.pays]
    return f"experts would not be faster at {'; '.join(losing)}; use its name or select='all'" if losing else None


def _fits(match: FFNMatch, config: SparsifyConfig) -> bool:
    """Every routed expert gets at least one neuron after the shared experts took theirs; copies fall into shards."""
    if config.start != "split":
        return match.intermediate_size % config.granularity == 0
    if config.expert_widths is not None:
        return sum(config.expert_widths) == match.intermediate_size
    return _fits_count(match.intermediate_size, config.num_experts, config.shared)


def _fits_count(neurons: int, num_experts: int, num_shared: int) -> bool:
    size = -(-neurons // num_experts)
    return neurons - num_shared * size >= num_experts - num_shared


def _narrow(match: FFNMatch, config: SparsifyConfig) -> str | None:
    """Why experts of these widths would not pay, where their unit is small."""
    routed = config.widths_of(match.intermediate_size)[config.shared :]
    unit = math.gcd(*routed) if routed else _MIN_EXPERT_SIZE
    if unit >= _MIN_EXPERT_SIZE:
        return None
    return (
        f"too small to pay: experts of {_listed(routed)} neurons are made of units of {unit} (at least "
        f"{_MIN_EXPERT_SIZE}); use multiples of a larger number, its name or select='all'"
    )


def _misfit(match: FFNMatch, config: SparsifyConfig) -> str:
    widths = config.widths_of(match.intermediate_size)
    return (
        f"has {match.intermediate_size} neurons, but expert_widths={list(widths)} add up to {sum(widths)}; change the "
        f"widths, or give it its own in overrides={{{match.name!r}: {{'expert_widths': [...]}}}}"
    )


def _listed(widths: Sequence[int]) -> str:
    """Runs of equal widths in short: `768, 4 x 192`."""
    runs = [(width, len(list(group))) for width, group in itertools.groupby(widths)]
    return ", ".join(f"{count} x {width}" if count > 2 else ", ".join([str(width)] * count) for width, count in runs)


def _indivisible(match: FFNMatch, config: SparsifyConfig) -> str:
    return f"its {match.intermediate_size} neurons do not fall into granularity={config.granularity} equal shards"


def _most_experts(match: FFNMatch, config: SparsifyConfig) -> int:
    counts = range(match.intermediate_size, 0, -1)
    return next(count for count in counts if _fits_count(match.intermediate_size, count, min(config.shared, count - 1)))


def _convert(match: FFNMatch, config: SparsifyConfig, reason: str) -> LayerPlan:
    if config.start != "split":
        return _copy(match, config, reason)
    if config.expert_widths is not None:
        return _by_width(match, config, reason)
    if not _fits(match, config):
        raise SelectionError(
            f"{match.name} has {match.intermediate_size} neurons, too few for num_experts={config.num_experts} with "
            f"{config.shared} shared; at most {_most_experts(match, config)} work here"
        )
    size = -(-match.intermediate_size // config.num_experts)
    padding = config.num_experts * size - match.intermediate_size
    reason += f"; experts of {size} neurons" + (f", {padding} of them padding" if padding else "")
    return LayerPlan(match.name, reason, config.num_experts, config.top_k, config.shared)


def _by_width(match: FFNMatch, config: SparsifyConfig, reason: str) -> LayerPlan:
    if not _fits(match, config):
        raise SelectionError(f"{match.name} {_misfit(match, config)}")
    widths = config.widths_of(match.intermediate_size)
    reason += f"; experts of {_listed(widths)} neurons"
    return LayerPlan(match.name, reason, config.num_experts, config.top_k, config.shared, widths)


def _copy(match: FFNMatch, config: SparsifyConfig, reason: str) -> LayerPlan:
    if not _fits(match, config):
        raise SelectionError(f"{match.name}: {_indivisible(match, config)}")
    size = match.intermediate_size // config.granularity
    beside = " beside the whole FFN" if config.start == "shared" else ""
    reason += f"; copies of {size} neurons{beside}, more parameters and no less compute than dense"
    return LayerPlan(match.name, reason, config.num_experts, config.top_k, 0)


def _say(config: SparsifyConfig) -> str:
    return "a predicate" if callable(config.select) else f"select={config.select!r}"
