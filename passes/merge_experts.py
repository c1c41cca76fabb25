"""SparseModel -> a dense model: the routed experts of every FFN become one FFN again, and the routers go.

    split     neurons side by side, as with all experts on:  [E, m, D] -> [E m, D]
    copies    the mean of the copies, shard by shard:        [R G, m, D] -> [R, G, m, D] -> [G m, D]

down_proj is scaled by what the routing weights of a token add up to (K where each is 1, or 1 where they sum to 1; what
the example inputs show where neither holds), over K experts of a split, over the G shards of a copy. So a split without
refit and copies that were not trained give the dense model back. Averaging trained copies is a distillation without
data (as branch-train-merge does, arXiv 2208.03306): measure what it costs.

E experts of m neurons, R copies, G shards of a copy, D hidden_size, N output features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from sparsify.passes.capture import evaluation_mode
from sparsify.passes.find_layers import Layer, find_layers
from sparsify.passes.fuse_moe import unfuse_moe
from sparsify.routers import Router

aten = torch.ops.aten


@dataclass(frozen=True)
class _Merge:
    """How the experts of one FFN are joined: `shards` of a copy, 0 for a split; `scale` goes into down_proj."""

    shards: int
    scale: float

    def join(self, weight: Tensor) -> Tensor:
        """`[E, m, ...]` to `[F, ...]`."""
        return self._parts(weight).flatten(0, 1)

    def join_down(self, down: Tensor) -> Tensor:
        """`[E, N, m]` to `[N, F]`."""
        return self._parts(down).transpose(0, 1).flatten(1) * self.scale

    def join_down_bias(self, bias: Tensor) -> Tensor:
        """`[E, N]` to `[N]`."""
        return self._parts(bias).sum(0) * self.scale

    def _parts(self, weight: Tensor) -> Tensor:
        """Copies become their mean."""
        return weight.unflatten(0, (-1, self.shards)).mean(0) if self.shards else weight


@torch.no_grad()
def merge_experts(
    sparse: fx.GraphModule,
    shards: Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    only: Collection[str] | None = None,
) -> fx.GraphModule:
    """Make the dense model.

    Args:
        sparse: left as it is; what is not an expert is shared with the result.
        shards: of a copy, for the FFNs that were copied and not divided.
        args: example inputs, to measure routing weights of no known sum.
        kwargs: example keyword inputs.
        only: the names of the FFNs to merge; None for all.

    Returns:
        A graph module with the inputs and outputs of `sparse`.

    Raises:
        ValueError: experts run on mixtures of tokens (Soft MoE), or are merged for each sequence (SMEAR, Lory).
    """
    routers = {name.removesuffix(".router"): m for name, m in sparse.named_modules() if isinstance(m, Router)}
    merged = set(routers) if only is None else set(only)
    special = {name for name, router in routers.items() if router.mixes or router.merges}
    mixed = [f"{name}.router" for name in routers if name in merged & special]
    if mixed:
        raise ValueError(
            f"the experts behind {', '.join(mixed)} run on mixtures of tokens, or are merged anew for every sequence, "
            "and no FFN of single tokens does what they do; a dense model is there for every other router"
        )
    dense = fx.GraphModule(sparse, copy.deepcopy(sparse.graph))
    unfuse_moe(dense, dense.graph)
    totals = _total_weights(sparse, args, kwargs)
    for layer in find_layers(dense, dense.graph):
        if layer.name not in merged:
            continue
        router = sparse.get_submodule(f"{layer.name}.router")
        assert isinstance(router, Router)
        count = shards.get(layer.name, 0)
        _merge_layer(dense, layer, _Merge(count, totals[layer.name] / (count or router.top_k)))
    dense.graph.eliminate_dead_code()
    _keep_common(dense, merged)
    dense.delete_all_unused_submodules()
    dense.graph.lint()
    dense.recompile()
    return dense


def _total_weights(sparse: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """By FFN, what the weights of a token sum to."""
    routers = {name.removesuffix(".router"): m for name, m in sparse.named_modules() if isinstance(m, Router)}
    totals = {name: float(router.top_k) if router.rule == "one" else 1.0 for name, router in routers.items()}
    seen: dict[str, list[Tensor]] = {name: [] for name, router in routers.items() if router.rule == "free"}
    handles = [routers[name].register_forward_hook(_note(found)) for name, found in seen.items()]
    try:
        if seen:
            with evaluation_mode(sparse):
                sparse(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return totals | {name: float(torch.cat(found).mean()) for name, found in seen.items() if found}


def _note(found: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _inputs: object, route: tuple[Tensor, Tensor]) -> None:
        routing_weights, expert_ids = route
        found.append(torch.where(expert_ids >= 0, routing_weights, 0).sum(-1).double())

    return hook


def _merge_layer(dense: fx.GraphModule, layer: Layer, merge: _Merge) -> None:
    graph, flat = dense.graph, layer.dispatch.args[0]
    move = _Move(dense, layer.name)
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(layer.dispatch) : nodes.index(layer.combine)]:
        with graph.inserting_before(node):
            if node in layer.projections:
                weights = move(node.args[1], merge.join), move(node.args[2], merge.join)
                node.replace_all_uses_with(graph.call_function(aten.linear.default, (flat, *weights)))
            elif node is layer.down:
                weights = move(node.args[1], merge.join_down), move(node.args[2], merge.join_down_bias)
                node.replace_all_uses_with(graph.call_function(aten.linear.default, (node.args[0], *weights)))
            elif _is_row_vector(node, layer.name):
                node.replace_all_uses_with(_required(move(node.args[0], merge.join)))
    layer.combine.replace_all_uses_with(layer.combine.all_input_nodes[0])


def _keep_common(dense: fx.GraphModule, merged: Collection[str]) -> None:
    """What the experts held in common (the bias, single numbers) goes along, so that nothing of them stays behind."""
    for node in dense.graph.find_nodes(op="get_attr"):
        name, found, parameter = str(node.target).rpartition(".experts.")
        if found and name in merged:
            path = f"{name}.dense"
            dense.get_submodule(path).register_parameter(parameter, dense.get_parameter(str(node.target)))
            node.target = f"{path}.{parameter}"


class _Move:
    """Writes joined weights to `<ffn>.dense.<name>` and returns the node that reads them."""

    def __init__(self, dense: fx.GraphModule, name: str) -> None:
        self._dense, self._path = dense, f"{name}.dense"
        dense.add_submodule(self._path, nn.Module())

    def __call__(self, source: Any, join: Callable[[Tensor], Tensor]) -> Node | None:
        """None for a bias that is not there."""
        if source is None:
            return None
        parameter, name = self._dense.get_parameter(source.target), str(source.target).rpartition(".")[2]
        joined = nn.Parameter(join(parameter.detach()).contiguous(), requires_grad=parameter.requires_grad)
        self._dense.get_submodule(self._path).register_parameter(name, joined)
        return self._dense.graph.get_attr(f"{self._path}.{name}")


def _is_row_vector(node: Node, name: str) -> bool:
    """Picks the per-neuron vector of each row's expert."""
    source = node.args[0] if node.target is aten.index_select.default else None
    return isinstance(source, Node) and str(source.target).startswith(f"{name}.experts.vector_")


def _required(node: Node | None) -> Node:
    assert node is not None
    return node
