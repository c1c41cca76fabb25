"""Run a captured model at other shapes and keep what an ONNX file is compared with.

T tokens, E num_experts, K top_k.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from sparsify.passes.find_layers import DISPATCH, Layer, chosen_ids, router_of
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, axis_names, free_sizes, resize_inputs, with_outputs
from sparsify.routers import GroupRouter, LinearRouter, TokenChoiceRouter, UnitRouter


@dataclass(frozen=True)
class Reference:
    """The PyTorch model at one shape.

    Attributes:
        sizes: the dynamic sizes, by axis name.
        inputs: by name.
        outputs: in the order of the graph.
        expert_ids: per layer, `[T, K]` int64.
        gaps: per layer, `[T]`: by how much the K-th logit exceeds the next, relative to the largest; infinite where no
            router tells.
    """

    sizes: dict[str, int]
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    expert_ids: tuple[Tensor, ...]
    gaps: tuple[Tensor, ...]


def references(flat: FlatGraph, layers: Sequence[Layer]) -> Iterator[Reference]:
    """The model at the example inputs, then at other sizes; sizes that PyTorch itself refuses are left out.

    Args:
        flat: the model.
        layers: those of `flat`.
    """
    module = with_outputs(flat, functools.partial(_tokens_and_ids, flat.root))
    for position, sizes in enumerate(_size_rounds(free_sizes(flat))):
        inputs = resize_inputs(flat, sizes)
        try:
            with torch.no_grad():
                values: tuple[Tensor, ...] = module(*inputs.values())
        except Exception:
            if position == 0:
                raise
            continue
        yield _reference(flat, layers, sizes, inputs, values)


def _tokens_and_ids(root: fx.GraphModule, graph: fx.Graph) -> list[Node]:
    """Per layer what the router reads, and the expert ids."""
    found = graph.find_nodes(op="call_function", target=DISPATCH)
    pairs = [(dispatch, chosen_ids(root, dispatch)) for dispatch in found]
    return [node for dispatch, ids in pairs for node in (_read_by_router(dispatch, ids), ids)]


def _read_by_router(dispatch: Node, ids: Node) -> Any:
    """What the router reads: the tokens, in groups where it reads groups; those of the dispatch without a router."""
    source: Any = ids.args[0] if ids.target is operator.getitem else ids
    return source.args[0] if source.op == "call_module" else dispatch.args[0]


def _reference(
    flat: FlatGraph,
    layers: Sequence[Layer],
    sizes: dict[str, int],
    inputs: dict[str, Tensor],
    values: tuple[Tensor, ...],
) -> Reference:
    count = len(flat.output_names)
    tokens, expert_ids = values[count::2], values[count + 1 :: 2]
    with torch.no_grad():
        gaps = [_gaps(flat, layer, x) for layer, x in zip(layers, tokens, strict=True)]
    names = {size: name for key, dims in axis_names(flat).items() for size, name in _pairs(flat.size_names[key], dims)}
    return Reference(
        {names[size]: value for size, value in sizes.items()}, inputs, values[:count], expert_ids, tuple(gaps)
    )


def _pairs(sizes: dict[int, str], names: dict[int, str]) -> list[tuple[str, str]]:
    return [(sizes[dim], names[dim]) for dim in sizes]


def _gaps(flat: FlatGraph, layer: Layer, x: Tensor) -> Tensor:
    router = router_of(flat.root, layer.dispatch)
    if isinstance(router, GroupRouter):
        return router.margins(x).float()
    if not isinstance(router, LinearRouter | TokenChoiceRouter | UnitRouter) or router.top_k == router.num_experts:
        return x.new_full((x.shape[0],), torch.inf, dtype=torch.float32)
    logits = router.logits(x).float()  # [T, E]
    ranked = logits.topk(router.top_k + 1, dim=-1).values
    return (ranked[:, -2] - ranked[:, -1]) / logits.abs().amax(-1)


def _size_rounds(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """The example sizes, then nine rounds in which every size has another value than its neighbour."""
    yield sizes
    if not sizes:
        return
    for group in range(3):
        for turn in range(3):
            yield {name: _values(size)[group][(turn + i) % 3] for i, (name, size) in enumerate(sizes.items())}


def _values(size: int) -> tuple[tuple[int, int, int], ...]:
    """1, a prime, larger; then spares, for models that refuse some of these (an image smaller than its patches)."""
    larger = size + max(1, size // 4)
    return (1, 7 if size != 7 else 13, larger), (2, 17, larger + 2), (size + 1, 2 * size, 3 * size)
