"""Which FFNs of a captured model stand on a causal stream of tokens, found by changing one token and looking.

A sequence dimension of an input is causal for the tokens of an FFN if a change at its last position leaves the tokens
at all earlier positions as they were, while a change at its first position reaches later ones. Tokens that never mix
(an MLP on a batch) have no order to break, and those of an encoder look both ways: neither is causal.

B sequences, S positions, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparsify.config import SparsifyConfig
from sparsify.errors import CausalityError
from sparsify.passes.calibrate import Call
from sparsify.passes.find_ffns import FFNPart
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.plan import ConversionPlan
from sparsify.routers import make_router

_UNCHANGED = 1e-5  # relative to the largest value: rounding moves with the shapes of matrix products


@dataclass(frozen=True)
class _Flow:
    """How a change at one position of an input reaches the tokens of an FFN."""

    reacts: bool
    backward: bool
    forward: bool


@torch.no_grad()
def causal_ffns(graph_module: GraphModule, matches: Sequence[FFNMatch], example: Call) -> tuple[str, ...]:
    """The FFNs before which no token knows of later ones, though later ones know of it, in the order of `matches`.

    The first FFN of a model can stand before any attention: it counts where a deeper one on the same input is causal.

    Args:
        graph_module: the captured model.
        matches: its FFNs.
        example: inputs; a sequence needs at least two positions, and tokens that are not all alike.
    """
    found: set[str] = set()
    values = pytree.tree_leaves((example.args, example.kwargs))
    before = _tokens(graph_module, matches, values)
    for place, leading, axis in _sequences(values):
        flows = _flows(graph_module, matches, values, before, place, leading, axis)
        touched = {name: flow for name, flow in flows.items() if flow.reacts}
        if any(flow.forward for flow in touched.values()) and not any(flow.backward for flow in touched.values()):
            found |= touched.keys()
    return tuple(match.name for match in matches if match.name in found)


def refuse_non_causal(parts: Sequence[FFNPart], plan: ConversionPlan, config: SparsifyConfig) -> None:
    """Do nothing if the router is causal, if `config` allows any, or if no planned FFN stands on causal tokens.

    Raises:
        CausalityError: with what to change.
    """
    planned = {layer.name for layer in plan.layers if layer.converts}
    if config.allow_non_causal or config.shared == config.top_k or not planned:
        return
    routed = (config.num_experts - config.shared, config.top_k - config.shared)
    if make_router(config.router_name, 8, *routed, config.options, seed=0).causal:
        return
    causal = [name for part in parts for name in causal_ffns(part.graph_module, part.matches, part.example)]
    refused = [name for name in causal if name in planned]
    if refused:
        raise CausalityError(
            f"the model is causal (found by changing tokens of the example inputs), but router={config.router_name!r} "
            f"chooses by looking at later tokens too, in {', '.join(refused)}: generation, which does not have them, "
            "would give other results than training. Choose a causal router (`sparsify routers`), or set "
            "allow_non_causal=True if only whole sequences will be scored"
        )


def _sequences(values: Sequence[object]) -> Iterator[tuple[int, torch.Size, int]]:
    """Where a sequence may lie: the place of an input, its leading sizes and the axis of the positions among them."""
    for place, value in enumerate(values):
        if not isinstance(value, Tensor) or value.dtype == torch.bool:  # a mask says which tokens count, and is none
            continue
        for rank in range(1, min(value.dim(), 2) + 1):
            yield from ((place, value.shape[:rank], axis) for axis in range(rank) if value.shape[axis] >= 2)


def _flows(
    graph_module: GraphModule,
    matches: Sequence[FFNMatch],
    values: Sequence[Any],
    before: Mapping[str, Tensor],
    place: int,
    leading: torch.Size,
    axis: int,
) -> dict[str, _Flow]:
    """By FFN, those whose tokens do not lie along `leading` left out; empty where there is nothing to change to."""
    changes: list[dict[str, Tensor]] = []
    for position in (-1, 0):
        altered = _altered(values[place], axis, position)
        if altered is None:
            return {}
        after = _tokens(graph_module, matches, [*values[:place], altered, *values[place + 1 :]])
        changes.append({name: _changed(before[name], after[name], leading, axis) for name in before})
    found: dict[str, _Flow] = {}
    for name, last in changes[0].items():
        first = changes[1][name]
        if last.numel():
            found[name] = _Flow(bool(last.any() or first.any()), bool(last[:-1].any()), bool(first[1:].any()))
    return found


def _altered(value: Tensor, axis: int, position: int) -> Tensor | None:
    """Another valid value at one position: of ids, one that is there elsewhere. None where all of them are equal."""
    altered = value.clone()
    part = altered.select(axis, position)
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(part.shape, generator=generator).to(part)
        part.copy_(value.mean() + (value.std(correction=0) + 1e-3) * noise)
        return altered
    known = value.unique()
    part.copy_(known[(torch.searchsorted(known, part.contiguous()) + 1) % len(known)])
    return altered if len(known) > 1 else None


def _changed(before: Tensor, after: Tensor, leading: torch.Size, axis: int) -> Tensor:
    """`[S]` bool: at which positions tokens `[B * S, D]` differ; empty where they do not lie along `leading`."""
    if before.shape != after.shape or len(before) != leading.numel():
        return torch.empty(0, dtype=torch.bool)
    size = before.abs().max().clamp(min=1e-30)
    difference = (after - before).abs().amax(-1).view(leading).movedim(axis, 0)  # [S, B] or [S]
    return difference.reshape(len(difference), -1).amax(-1) > _UNCHANGED * size


def _tokens(graph_module: GraphModule, matches: Sequence[FFNMatch], values: Sequence[Any]) -> dict[str, Tensor]:
    """What every FFN reads at its first site, `[T, D]`."""
    watch = _Watch(graph_module, {match.sites[0].x for match in matches})
    watch.run(*values, enable_io_processing=False)
    found = {match.name: watch.seen[match.sites[0].x].movedim(match.sites[0].x_axis, -1) for match in matches}
    return {name: tokens.reshape(-1, tokens.shape[-1]).float() for name, tokens in found.items()}


class _Watch(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph_module: GraphModule, nodes: Collection[str]) -> None:
        super().__init__(graph_module)
        self.seen: dict[str, Tensor] = {}
        self._nodes = nodes

    def run_node(self, n: Node) -> Any:
        """As the base class does."""
        value = super().run_node(n)
        if n.name in self._nodes:
            self.seen[n.name] = value
        return value
