"""Convert the FFNs of a model that was traced in parts: each part on its own, its experts grafted into a copy.

A part is calibrated with what the copy calls it with, so that it sees what the parts before it became.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsify.config import SparsifyConfig
from sparsify.graft import graft
from sparsify.partial_model import PartialSparseModel, copy_modules
from sparsify.passes.calibrate import Call, read_batches
from sparsify.passes.capture_parts import PartOf, record_calls
from sparsify.passes.convert import ConvertedLayer, convert
from sparsify.passes.find_ffns import CANNOT_GO_BACK, FFNPart, FoundFFNs
from sparsify.passes.module_cover import ModuleCover
from sparsify.passes.plan import ConversionPlan, LayerPlan
from sparsify.sparse_model import SparseModel, SparseModelInfo


@dataclass(frozen=True)
class Conversion:
    """A converted model.

    Attributes:
        sparse: its report is still missing.
        plan: what was done in the end.
        results: of every converted FFN, by name.
        tokens: of calibration.
        note: what became of a budget, for the report.
    """

    sparse: SparseModel
    plan: ConversionPlan
    results: dict[str, ConvertedLayer]
    tokens: int
    note: str | None = None


def convert_parts(
    model: nn.Module,
    found: FoundFFNs,
    plan: ConversionPlan,
    config: SparsifyConfig,
    calibration: Sequence[Call] | None,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    progress: Callable[[int, int], None],
    *,
    consume: bool = False,
) -> Conversion:
    """Convert the planned FFNs of every part.

    Args:
        model: not changed, but for the weights that `consume` frees.
        found: its parts.
        plan: one entry per FFN.
        config: how to divide.
        calibration: batches for the whole model, or None.
        example: `(args, kwargs)` for the whole model.
        progress: called with the number of layers done and in all.
        consume: free the dense weights of a part once it is converted.

    Returns:
        The converted model. FFNs that no experts can stand in for in the running model are dense in its plan.

    Raises:
        CalibrationError: as `convert` does.
        GraftError: with experts a part computes something else than its graph.
    """
    original = copy_modules(model)
    total = sum(layer.converts for layer in plan.layers)
    layers = {layer.name: layer for layer in plan.layers}
    results: dict[str, ConvertedLayer] = {}
    covers: dict[str, ModuleCover] = {}
    tokens = 0
    for part in found.parts:
        part_plan = ConversionPlan(tuple(layers[match.name] for match in part.matches))
        if not any(layer.converts for layer in part_plan.layers):
            continue
        batches = None
        if calibration is not None:
            calls = record_calls(original, part.name, part.example, calibration)
            batches = read_batches(calls, config.max_calibration_tokens)
        done = len(results)
        converted, part_tokens = convert(
            part.graph_module,
            part.matches,
            part_plan,
            config,
            batches,
            part.example,
            lambda layer, _, done=done: progress(done + layer, total),
        )
        stuck = _graft_part(part, part_plan, original)
        results |= {name: result for name, result in converted.items() if name not in stuck}
        covers |= {name: part.covers[name] for name in converted if name not in stuck}
        layers |= {name: LayerPlan(name, f"{CANNOT_GO_BACK}: {reason}") for name, reason in stuck.items()}
        tokens = max(tokens, part_tokens)
        if consume:
            _free_replaced(model, original)
    shared = {name: layers[name].num_shared_experts for name in results}
    sparse = PartialSparseModel.around(original, SparseModelInfo(*example, shared, None, covers))
    return Conversion(sparse, ConversionPlan(tuple(layers.values())), results, tokens)


def _graft_part(part: FFNPart, plan: ConversionPlan, original: nn.Module) -> Mapping[str, str]:
    """Put the experts of a part into `original`; return which could not be, and why."""
    sparse = SparseModel(part.graph_module, part.graph_module.graph)
    converted = {layer.name: layer for layer in plan.layers if layer.converts}
    shared = {name: layer.num_shared_experts for name, layer in converted.items()}
    covers = {name: part.covers[name] for name in converted}
    sparse.info = SparseModelInfo(part.example.args, part.example.kwargs, shared, None, covers)
    holder = PartOf(part.name, original.get_submodule(part.name))
    skipped = graft(sparse, holder).skipped
    original.set_submodule(part.name, holder.get_submodule(part.name))  # another one where the part was an FFN
    return skipped


def _free_replaced(model: nn.Module, original: nn.Module) -> None:
    """Empty the parameters of `model` that the copy with experts does not hold any more."""
    kept = {id(parameter) for parameter in original.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.new_empty(0)
