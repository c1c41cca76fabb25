"""Time one layer of an exported graph in onnxruntime, alone, with each of several lowerings.

The router runs too where it reads the tokens alone, but for those of `WHOLE`, which have none; experts are chosen
evenly at random, as random tokens have no favourites among them. One session lives at a time, as the threads of an idle
one take processor time; lowerings take turns. T tokens, K slots.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsify.passes.lower_onnx.expert_region import DOMAIN, ExpertRegion, find_regions, is_linear, nodes_of
from sparsify.passes.lower_onnx.lower_placeholders import lower_layer, lower_placeholders
from sparsify.passes.lower_onnx.lowerings import WHOLE, Lowering
from sparsify.passes.lower_onnx.runtime import open_session
from sparsify.passes.lower_onnx.values import dtype_of, input_of, stored

_ROUNDS = 3
_RUNS = 5
_SECONDS = 0.05  # of one lowering, in one round, at one number of tokens


def measure_lowerings(
    region: ExpertRegion, opset: int, lowerings: Sequence[Lowering], tokens: Sequence[int]
) -> list[tuple[float, ...] | None]:
    """Time a layer; its placeholders stay as they are.

    Args:
        region: the layer, with its weights.
        opset: the version of the standard operators.
        lowerings: to be timed.
        tokens: token counts.

    Returns:
        Per lowering the median seconds of a call at every number of tokens; None for a layer that reads values which
        the rest of the model computes.
    """
    if any(value.const_value is None for value in _read_values(region)):
        return [None] * len(lowerings)
    router = _router(region)
    files = [_layer_model(region, router, opset, lowering) for lowering in lowerings]
    feeds = [[_random_inputs(region, count, seed) for seed in range(4)] for count in tokens]
    models = list(zip(files, lowerings, strict=True))
    rounds = [[_time(file, feeds, own_ops=name == "fused_op") for file, name in models] for _ in range(_ROUNDS)]
    return [
        tuple(statistics.median(turn[i][j] for turn in rounds) for j in range(len(tokens))) for i in range(len(files))
    ]


def _read_values(region: ExpertRegion) -> list[ir.Value]:
    """What the nodes of the layer read and do not compute: weights and constants, if it can be run alone."""
    nodes = (*region.inner, region.down)
    computed = {output for node in (region.dispatch, *nodes) for output in node.outputs}
    return [value for node in nodes for value in node.inputs if value is not None and value not in computed]


def _router(region: ExpertRegion) -> list[ir.Node]:
    """Its nodes; none where they read more than the tokens of the layer and weights."""
    nodes = nodes_of(region, "router")
    known = {input_of(region.dispatch, 0), *(output for node in nodes for output in node.outputs)}
    read = [value for node in nodes for value in node.inputs if value is not None and value not in known]
    whole = input_of(region.dispatch, 1).producer() in nodes and all(value.const_value is not None for value in read)
    return nodes if whole else []


def _layer_model(region: ExpertRegion, router: Sequence[ir.Node], opset: int, lowering: Lowering) -> bytes:
    ids, weights = input_of(region.dispatch, 1), input_of(region.combine, 1)
    inputs = [input_of(region.dispatch, 0), ids, weights]
    names = ["x", "ids", "weights"]
    if region.units is not None:
        inputs += [region.expert_ids, region.routing_weights]
        names += ["chosen_ids", "chosen_weights"]
    copies = {
        value: ir.Value(name=name, type=value.type, shape=ir.Shape(["tokens", size]))
        for value, name, size in zip(inputs, names, _widths(region), strict=False)
    }
    graph_inputs = [copies[value] for value in inputs]
    read = [value for node in router for value in node.inputs if value is not None and value.const_value is not None]
    for value in (*_read_values(region), *read):
        tensor = value.const_value
        copies.setdefault(value, ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor))
    nodes = [_copy(node, copies) for node in (region.dispatch, *region.inner, region.down, region.combine)]
    outputs = [copies[region.combine.outputs[0]]]
    if lowering not in WHOLE:  # what the router chooses is an output, so that it runs
        nodes += [_copy(node, copies) for node in router]
        outputs += [copies[value] for value in (ids, weights) if value.producer() in router]
    stored = [value for value in copies.values() if value.const_value is not None]
    imports = {"": opset, DOMAIN: 1}
    graph = ir.Graph(graph_inputs, outputs, nodes=nodes, initializers=stored, opset_imports=imports, name="layer")
    model = ir.Model(graph, ir_version=10)
    lower_layer(find_regions(graph)[0], lowering)
    lower_placeholders(model)
    return ir.to_proto(model).SerializeToString()


def _copy(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    inputs = [None if value is None else copies[value] for value in node.inputs]
    outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in node.outputs]
    copies.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs, version=1)


def _widths(region: ExpertRegion) -> tuple[int, int, int, int, int]:
    """Columns of tokens, ids and weights, and of ids and weights of whole experts."""
    first = next(node for node in region.inner if is_linear(node))
    chosen = region.top_k // max(region.units or [1])
    return stored(input_of(first, 1)).shape[2], region.top_k, region.top_k, chosen, chosen


def _random_inputs(region: ExpertRegion, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Tokens, ids without repetition, and weights of one."""
    random = np.random.default_rng(seed)
    hidden_size = _widths(region)[0]
    dtypes = [dtype_of(value).numpy() for value in (input_of(region.dispatch, 0), input_of(region.combine, 1))]
    sizes = np.array(region.units or [1] * region.num_experts)
    chosen = random.random((tokens, len(sizes))).argsort(1)[:, : region.top_k // max(sizes)]
    places, first = np.arange(max(sizes)), (sizes.cumsum() - sizes)[chosen]
    ids = np.where(places < sizes[chosen][..., None], first[..., None] + places, -1).reshape(tokens, -1)
    return {
        "x": random.standard_normal((tokens, hidden_size)).astype(dtypes[0]),
        "ids": ids.astype(np.int64),
        "weights": (ids >= 0).astype(dtypes[1]),
        "chosen_ids": chosen.astype(np.int64),
        "chosen_weights": np.ones(chosen.shape, dtypes[1]),
    }


def _time(file: bytes, feeds: Sequence[Sequence[dict[str, np.ndarray]]], own_ops: bool) -> list[float]:
    """Median seconds at every number of tokens."""
    session, _ = open_session(file, Path(), cuda=False, spinning=True, own_ops=own_ops)
    known = {value.name for value in session.get_inputs()}
    return [_median(session, [{k: v for k, v in feed.items() if k in known} for feed in turns]) for turns in feeds]


def _median(session: Any, feeds: Sequence[dict[str, np.ndarray]]) -> float:
    session.run(None, feeds[0])
    seconds: list[float] = []
    while len(seconds) < _RUNS or sum(seconds) < _SECONDS:
        start = time.perf_counter()
        session.run(None, feeds[len(seconds) % len(feeds)])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
