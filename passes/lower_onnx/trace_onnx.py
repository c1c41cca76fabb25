"""Flat graph -> `onnx_ir.Model`, by `torch.onnx.export`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Generator

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer

from sparsify.errors import ExportError
from sparsify.passes.lower_onnx.flat_graph import FlatGraph, axis_names
from sparsify.passes.lower_onnx.spell_adaptive_pool import spell_adaptive_pool
from sparsify.passes.lower_onnx.spell_attention import spell_attention
from sparsify.passes.lower_onnx.spell_rsub import spell_rsub
from sparsify.passes.lower_onnx.spell_size_ratios import spell_size_ratios

_LONGEST_CAUSE = 400
_STATIC = re.compile(r"inferred a static shape of \d+ for dimension inputs\[(\d+)\]\.shape\[(\d+)\]")


def trace_onnx(flat: FlatGraph, opset: int) -> ir.Model:
    """Export the graph; tensors of the model are referred to, not copied.

    Args:
        flat: the graph, its example inputs and dynamic dimensions. Ops that the exporter lacks are spelled out in it.
        opset: the version of the standard ONNX operators.

    Raises:
        ExportError: `torch.onnx.export` refused the graph; the message holds its reason.
    """
    for spell in (spell_rsub, spell_attention, spell_size_ratios, spell_adaptive_pool):
        spell(flat.graph)
    shapes = tuple(axes or None for axes in axis_names(flat).values())
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                flat.module(),
                tuple(flat.inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(flat.inputs),
                output_names=list(flat.output_names),
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            static = _static_dims(flat, _cause(error))
            if static:
                return trace_onnx(_with_fixed(flat, static), opset)
            raise ExportError(
                f"torch.onnx.export failed: {_cause(error)}. Usually an op of the dense model cannot be "
                f"expressed in opset {opset}; try another opset, or rewrite that op"
            ) from error
    assert program is not None
    written = program.model.opset_imports.get("")
    if written != opset:
        newest = f"; torch {torch.__version__} may know no opset as new as {opset}" if opset > 18 else ""
        raise ExportError(
            f"torch.onnx.export wrote opset {written} instead of {opset}{newest}; ask for opset 20, or another from 18"
        )
    return _simplified(program.model)


def _static_dims(flat: FlatGraph, cause: str) -> set[tuple[str, int]]:
    """Dimensions that the exporter found to be fixed, though the capture had no reason to think so."""
    names = list(flat.inputs)
    found = {(names[int(position)], int(dim)) for position, dim in _STATIC.findall(cause)}
    return {(name, dim) for name, dim in found if dim in flat.size_names[name]}


def _with_fixed(flat: FlatGraph, static: set[tuple[str, int]]) -> FlatGraph:
    sizes = {
        name: {dim: size for dim, size in dims.items() if (name, dim) not in static}
        for name, dims in flat.size_names.items()
    }
    return dataclasses.replace(flat, size_names=sizes)


def _simplified(model: ir.Model) -> ir.Model:
    """Constants folded, twins merged. The exporter's own optimizer also tries hundreds of rewrite rules on every node.

    They cost most of the export of a deep model and onnxruntime, which has rules of its own, runs as fast without.
    """
    common.InlinePass()(model)
    if not any(node.op_type == "SplitToSequence" for node in model.graph):  # the folder cannot take its outputs apart
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """Transposed weights stay as they are: each would be stored once more, at every site that shares it."""
    return False if node.op_type == "Transpose" else None


def _cause(error: BaseException) -> str:
    """The start of the innermost error: the exporter wraps it in reports of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST_CAUSE].strip('. ')}"


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The exporter reports its progress and every shared axis name; what matters it raises."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
