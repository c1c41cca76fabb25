"""Readable names: `/encoder/layer.3/ffn/experts.5/Gemm`, so that a viewer shows the modules, and the parts of a layer.

A converted layer has the parts router, dispatch, experts and combine. Elsewhere the exporter noted the modules.
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from sparsify.passes.lower_onnx.expert_region import SCOPE, ExpertRegion, mark_nodes
from sparsify.passes.lower_onnx.values import input_of

_MODULES = "pkg.torch.onnx.name_scopes"


def mark_router(region: ExpertRegion) -> None:
    """Note what it is on every node that is computed from the tokens of a layer and leads to its expert ids."""
    from_tokens = {input_of(region.dispatch, 0)}
    after_tokens: list[ir.Node] = []
    for node in region.graph:
        if node is region.dispatch:
            break
        if any(value in from_tokens for value in node.inputs):
            after_tokens.append(node)
            from_tokens.update(node.outputs)
    wanted = {input_of(region.dispatch, 1), input_of(region.combine, 1), region.expert_ids, region.routing_weights}
    for node in reversed(after_tokens):
        if any(value in wanted for value in node.outputs):
            wanted.update(value for value in node.inputs if value is not None)
            mark_nodes([node], region.scope("router"))


def name_nodes(graph: ir.Graph) -> None:
    """Name every node after its module or part, and its operator; a number tells equal ones apart."""
    counts: dict[str, int] = {}
    for node in graph:
        name = f"{_path(node)}/{node.op_type}"
        count = counts[name] = counts.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name


def node_path(scope: str) -> str:
    """`encoder.layer.3.ffn` -> `/encoder/layer.3/ffn`."""
    return re.sub(r"(?:^|\.)(?=[^.\d])", "/", scope) if scope else ""


def _path(node: ir.Node) -> str:
    scope = node.metadata_props.get(SCOPE)
    if scope is None:
        scopes = ast.literal_eval(node.metadata_props.get(_MODULES, "['', '']"))  # modules from the root, then the op
        scope = str(scopes[-2]) if len(scopes) > 1 else ""
    return node_path(scope)
