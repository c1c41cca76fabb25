"""Convert within a budget: measure the choices of every FFN, spend it on them, convert; search for an error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import nn
from torch.fx import GraphModule

from sparsify.budget import Budget
from sparsify.config import SparsifyConfig
from sparsify.convert_parts import Conversion
from sparsify.passes.allocate import allocate
from sparsify.passes.calibrate import Call, read_batches
from sparsify.passes.capture_parts import record_calls
from sparsify.passes.choices import FFNChoices
from sparsify.passes.find_ffns import FoundFFNs
from sparsify.passes.measure_choices import measure_choices
from sparsify.passes.output_change import relative_difference
from sparsify.passes.plan import ConversionPlan
from sparsify.passes.time_choices import time_choices
from sparsify.run_outputs import run_outputs
from sparsify.search_budget import cheapest_within, hold_out_batches

Example = tuple[tuple[Any, ...], dict[str, Any]]


class ConvertFound(Protocol):
    """As `convert_parts`."""

    def __call__(
        self,
        model: nn.Module,
        found: FoundFFNs,
        plan: ConversionPlan,
        config: SparsifyConfig,
        calibration: Sequence[Call] | None,
        example: Example,
        progress: Callable[[int, int], None],
        *,
        consume: bool,
    ) -> Conversion:
        """Convert the planned FFNs."""
        ...


def convert_within(
    convert: ConvertFound,
    model: nn.Module,
    found: FoundFFNs,
    plan: ConversionPlan,
    config: SparsifyConfig,
    calibration: Sequence[Call] | None,
    example: Example,
    progress: Callable[[int, int], None],
    *,
    consume: bool = False,
) -> Conversion:
    """Convert by `plan`, with the numbers of `config.budget` where it has one.

    Args:
        convert: does it.
        model: the dense model.
        found: its FFNs; the graphs are changed.
        plan: one entry per FFN.
        config: how to divide.
        calibration: batches for the whole model, or None.
        example: `(args, kwargs)` for the whole model.
        progress: called with the number of layers done and in all.
        consume: free dense weights as layers are converted; not for a budget of "error".

    Raises:
        BudgetError: no conversion keeps the budget.
        CalibrationError: as `convert` does; or no batch can be kept out of the fit to measure an error on.
    """
    budget = config.limit
    if budget is None or calibration is None:
        return convert(model, found, plan, config, calibration, example, progress, consume=consume)
    fit, held = (calibration, []) if budget.unit != "error" else hold_out_batches(calibration)
    ffns = _measured(model, found, plan, config, fit)
    if budget.unit != "error":
        allocation = allocate(ffns, plan, budget)
        done = convert(model, found, allocation.plan, config, fit, example, progress, consume=consume)
        return replace(done, note=allocation.note)

    def convert_to(share: float) -> Conversion:
        spent = allocate(ffns, plan, Budget("share", share)).plan
        return convert(model, _fresh(found), spent, config, fit, example, progress, consume=False)

    def measure(done: Conversion) -> float:
        return relative_difference(
            pair
            for batch in held
            for pair in zip(
                run_outputs(model, batch.args, batch.kwargs),
                run_outputs(done.sparse, batch.args, batch.kwargs),
                strict=True,
            )
        )

    total = sum(ffn.dense.macs for ffn in ffns)
    least = sum(min(choice.macs for choice in ffn.all) for ffn in ffns) / total
    trial, tried = cheapest_within(convert_to, measure, budget.most, least)
    note = f"budget={budget}: budget={trial.share:.3f} keeps it, with {trial.error:.3g}; {tried}"
    return replace(trial.found, note=f"{note}. Measured on {len(held)} batches that were kept out of the fit")


def _measured(
    model: nn.Module, found: FoundFFNs, plan: ConversionPlan, config: SparsifyConfig, batches: Sequence[Call]
) -> list[FFNChoices]:
    """The choices of all FFNs of all parts, as the dense model runs."""
    planned = {layer.name for layer in plan.layers if layer.converts}
    ffns: list[FFNChoices] = []
    for part in found.parts:
        if not any(match.name in planned for match in part.matches):
            continue
        calls = batches
        if not found.is_whole:
            recorded = record_calls(model, part.name, part.example, batches)
            calls = read_batches(recorded, config.max_calibration_tokens)
        ffns += measure_choices(part.graph_module, part.matches, plan, config, calls)
    return [time_choices(ffn) for ffn in ffns] if config.tokens else ffns


def _fresh(found: FoundFFNs) -> FoundFFNs:
    """With graphs of their own, to be changed; the weights are shared."""
    parts = [
        replace(part, graph_module=GraphModule(part.graph_module, copy.deepcopy(part.graph_module.graph)))
        for part in found.parts
    ]
    return replace(found, parts=tuple(parts))
