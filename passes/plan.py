"""Matches + config -> ConversionPlan: which FFNs become experts and how many, and why the others stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.config import SparsifyConfig
from sparsify.errors import SelectionError
from sparsify.passes.match_ffn import FFNMatch

# Below this many neurons an expert's matrix products are too small to be worth their dispatch.
_MIN_EXPERT_SIZE = 32


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one FFN: `num_experts = 0` leaves it dense."""

    name: str
    reason: str
    num_experts: int = 0
    top_k: int = 0
    num_shared_experts: int = 0

    @property
    def converts(self) -> bool:
        """The FFN becomes experts."""
        return self.num_experts > 0


@dataclass(frozen=True)
class ConversionPlan:
    """One `LayerPlan` per match, in graph order."""

    layers: tuple[LayerPlan, ...]


def make_plan(matches: Sequence[FFNMatch], config: SparsifyConfig) -> ConversionPlan:
    """Decide for every FFN.

    Raises:
        SelectionError: a pattern or predicate selects nothing, or an FFN that was selected by pattern, predicate or
            "all" has too few neurons for the experts.
    """
    chosen = {match.name: _selects(config, match) for match in matches}
    if config.select not in ("auto", "all") and matches and not any(chosen.values()):
        names = ", ".join(match.name for match in matches)
        raise SelectionError(f"select={config.select!r} matches none of the {len(matches)} FFNs: {names}")
    return ConversionPlan(tuple(_plan_layer(match, config, chosen[match.name]) for match in matches))


def _plan_layer(match: FFNMatch, config: SparsifyConfig, chosen: bool) -> LayerPlan:
    if config.select == "auto":
        objection = _objection(match, config)
        return _dense(match, objection) if objection else _convert(match, config, "maps the hidden size to itself")
    if not chosen:
        return _dense(match, "not selected")
    if not _fits(match, config):
        raise SelectionError(
            f"{match.name} has {match.intermediate_size} neurons, too few for num_experts={config.num_experts} with "
            f"{config.shared} shared; at most {_most_experts(match, config)} work here"
        )
    return _convert(match, config, f"selected by {_say(config)}")


def _objection(match: FFNMatch, config: SparsifyConfig) -> str | None:
    """Why "auto" leaves an FFN dense."""
    if match.out_features != match.hidden_size:
        return (
            f"not the FFN of a block: maps {match.hidden_size} to {match.out_features} features; "
            "convert it by name or with select='all'"
        )
    size = -(-match.intermediate_size // config.num_experts)
    if size < _MIN_EXPERT_SIZE or not _fits(match, config):
        return (
            f"too small to pay: {config.num_experts} experts of {size} neurons (at least {_MIN_EXPERT_SIZE}); "
            "use fewer experts, its name or select='all'"
        )
    return None


def _fits(match: FFNMatch, config: SparsifyConfig) -> bool:
    """Every routed expert gets at least one neuron after the shared experts took theirs."""
    return _fits_count(match.intermediate_size, config.num_experts, config.shared)


def _fits_count(neurons: int, num_experts: int, num_shared: int) -> bool:
    size = -(-neurons // num_experts)
    return neurons - num_shared * size >= num_experts - num_shared


def _most_experts(match: FFNMatch, config: SparsifyConfig) -> int:
    counts = range(match.intermediate_size, 0, -1)
    return next(count for count in counts if _fits_count(match.intermediate_size, count, min(config.shared, count - 1)))


def _selects(config: SparsifyConfig, match: FFNMatch) -> bool:
    select = config.select
    if callable(select):
        return bool(select(match))
    if select in ("auto", "all"):
        return True
    patterns = (select,) if isinstance(select, str) else select
    return any(fnmatch.fnmatchcase(match.name, pattern) for pattern in patterns)


def _convert(match: FFNMatch, config: SparsifyConfig, reason: str) -> LayerPlan:
    size = -(-match.intermediate_size // config.num_experts)
    padding = config.num_experts * size - match.intermediate_size
    reason += f"; experts of {size} neurons" + (f", {padding} of them padding" if padding else "")
    return LayerPlan(match.name, reason, config.num_experts, config.top_k, config.shared)


def _dense(match: FFNMatch, reason: str) -> LayerPlan:
    return LayerPlan(match.name, reason)


def _say(config: SparsifyConfig) -> str:
    return "a predicate" if callable(config.select) else f"select={config.select!r}"
