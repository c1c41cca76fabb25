"""`sparsify()`: the pipeline, one line a stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparsify.config import SparsifyConfig
from sparsify.errors import CaptureError, NoFFNError
from sparsify.passes.calibrate import without_padding
from sparsify.passes.capture import DynamicShapes, capture, evaluation_mode, left_out
from sparsify.passes.convert import ConvertedLayer, convert
from sparsify.passes.fixed_dims import fixed_dims
from sparsify.passes.graph_values import tensor_leaves
from sparsify.passes.match_ffn import FFNMatch, Rejection, match_ffn
from sparsify.passes.module_cover import cover_with_modules
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.plan import ConversionPlan, LayerPlan, fit_plan, make_plan
from sparsify.report import FFNReport, Report
from sparsify.sparse_model import SparseModel, SparseModelInfo

# Called as progress(stage, done, total).
Progress = Callable[[str, int, int], None]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found, in graph order: FFNs that can be split, and near misses with the reason."""

    ffns: list[FFNMatch]
    rejected: list[Rejection]

    def plan(self, config: SparsifyConfig | None = None, **options: Any) -> ConversionPlan:
        """What `sparsify` would do with each of the FFNs: to print, to edit, and to give to it as `plan=`.

        Args:
            config: how to divide; or give its fields as keyword options.
            **options: fields of `SparsifyConfig`.

        Raises:
            ValueError: an option is not valid.
            SelectionError: as in `sparsify`.
        """
        return make_plan(self.ffns, _config(config, options))


def inspect(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Inspection:
    """List the FFNs of a model. The model is not changed.

    Args:
        model: any module that `torch.export` can trace.
        args: example inputs.
        kwargs: example keyword inputs.

    Returns:
        Every legal FFN, paying or not, and every near miss.

    Raises:
        CaptureError: the model cannot be traced, or the example inputs do not fit it.
    """
    return Inspection(*match_ffn(NormalizeLinearPass()(capture(model, args, kwargs)).graph_module))


def sparsify(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: SparsifyConfig | None = None,
    plan: ConversionPlan | None = None,
    calibration: Iterable[object] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    consume_model: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SparseModel:
    """Convert the FFNs of a trained dense model into routed experts.

    Args:
        model: any module that `torch.export` can trace. It is not changed (but see `consume_model`). Weights that are
            not converted are shared with the result.
        args: example inputs, or a single tensor. Give every dimension that should stay dynamic a size of at least 2.
        kwargs: example keyword inputs.
        config: how to divide; or give its fields as keyword options.
        plan: which FFNs to convert and into how many experts, for all of them, as `inspect(...).plan(...)` makes it;
            it takes the place of `select`, `overrides` and the numbers of experts.
        calibration: an iterable of batches: `(args, kwargs)`, tuples, dicts or tensors, with the structure of the
            example inputs. Positions where a keyword `attention_mask` is 0 are left out. None converts from the weights
            and the example inputs alone, which costs quality.
        dynamic_shapes: "auto", or what `torch.export.export` takes.
        consume_model: free the dense weights of every FFN once it is converted, so that dense and converted weights are
            never all held at once (at the end, where sites share an FFN). The model is useless afterwards.
        progress: called as `progress(stage, done, total)`.
        **options: fields of `SparsifyConfig`.

    Returns:
        A `SparseModel` with the inputs and outputs of the model; `.report` says what was done.

    Raises:
        ValueError: an option is not valid.
        CaptureError: the model cannot be traced, or the example inputs do not fit it.
        NoFFNError: the model has no FFN that can be split.
        SelectionError: `select`, `overrides` or `plan` do not fit the FFNs of the model, or ask for more experts than
            one of them has neurons for.
        CalibrationError: the calibration data is empty, does not fit, or leads to values that are not finite.
    """
    _refuse_contradiction(plan, options)
    config = _config(config, options)
    args, kwargs = (args,) if isinstance(args, Tensor) else tuple(args), kwargs or {}
    clock = _Clock(progress)
    graph_module = clock.run("capture", lambda: capture(model, args, kwargs, dynamic_shapes))
    _require_free_names(model, graph_module)
    graph_module = NormalizeLinearPass()(graph_module).graph_module
    matches, rejections = clock.run("match", lambda: match_ffn(graph_module))
    _require_ffn(model, graph_module, matches, rejections)
    plan = make_plan(matches, config) if plan is None else fit_plan(plan, matches, config)
    converted = {layer.name for layer in plan.layers if layer.converts}
    covers = {match.name: cover_with_modules(graph_module, match) for match in matches if match.name in converted}
    example, expected, parameters_before = (args, kwargs), _dense_outputs(model, args, kwargs), _count(model)
    results, tokens = clock.run(
        "convert",
        lambda: convert(graph_module, matches, plan, config, calibration, example, clock.layers, consume=consume_model),
    )
    sparse = SparseModel(graph_module, graph_module.graph)
    sparse.train(model.training)
    error = clock.run("verify", lambda: _output_error(expected, sparse, args, kwargs))
    report = Report(
        ffns=_ffn_reports(matches, rejections, plan, results),
        notes=_notes(graph_module, args, kwargs, calibration is None, plan),
        calibration_tokens=tokens,
        parameters_before=parameters_before,
        parameters_after=_count(sparse),
        output_error=error,
        seconds=clock.seconds,
    )
    shared = {layer.name: layer.num_shared_experts for layer in plan.layers if layer.converts}
    sparse.info = SparseModelInfo(args, kwargs, shared, report, covers)
    return sparse


def _config(config: SparsifyConfig | None, options: dict[str, Any]) -> SparsifyConfig:
    if config is None:
        return SparsifyConfig(**options)
    return replace(config, **options)


def _refuse_contradiction(plan: ConversionPlan | None, options: dict[str, Any]) -> None:
    planned = ("num_experts", "top_k", "num_shared_experts", "select", "overrides")
    clash = [name for name in planned if name in options]
    if plan is not None and clash:
        raise ValueError(f"plan= already says what {', '.join(clash)} would; give the plan or the options, not both")


def _require_free_names(model: nn.Module, graph_module: GraphModule) -> None:
    taken = [name for name, value in vars(SparseModel).items() if isinstance(value, property)]
    clash = [name for name in taken if hasattr(graph_module, name)]
    if clash:
        raise CaptureError(
            f"{type(model).__name__} has members called {clash} at its top, names that SparseModel uses for itself. "
            "Wrap the model in a module that holds it under another name, and convert that."
        )


def _require_ffn(
    model: nn.Module, graph_module: GraphModule, matches: list[FFNMatch], rejections: list[Rejection]
) -> None:
    if matches:
        return
    linears = len(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
    nearest = "\n".join(f"  - {rejection}" for rejection in rejections[:5])
    detail = f"The nearest:\n{nearest}" if nearest else "None of them feeds another one through an activation function."
    raise NoFFNError(
        f"{type(model).__name__} has no feed-forward layer that can be split, among {linears} linear layers. {detail}"
    )


@torch.no_grad()
def _dense_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with evaluation_mode(model):
        return tensor_leaves(model(*args, **kwargs))


@torch.no_grad()
def _output_error(expected: list[Tensor], sparse: SparseModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Relative L2 difference to the dense outputs, all that are floating, padding left out."""
    pairs = zip(expected, tensor_leaves(sparse(*args, **kwargs)), strict=True)
    floating = [
        (without_padding(a, kwargs).double(), without_padding(b, kwargs).double())
        for a, b in pairs
        if a.is_floating_point() and a.dim() > 0
    ]
    difference = sum(float((a - b).square().sum()) for a, b in floating)
    size = sum(float(a.square().sum()) for a, _ in floating)
    return (difference / size) ** 0.5 if size else difference**0.5


def _ffn_reports(
    matches: list[FFNMatch],
    rejections: list[Rejection],
    plan: ConversionPlan,
    results: dict[str, ConvertedLayer],
) -> tuple[FFNReport, ...]:
    reports = [
        _ffn_report(match, layer, results.get(match.name)) for match, layer in zip(matches, plan.layers, strict=True)
    ]
    refused = [FFNReport(r.name, "", "", 0, 0, "rejected", f"{r.reason} (node `{r.node}`)") for r in rejections]
    return (*reports, *refused)


def _ffn_report(match: FFNMatch, layer: LayerPlan, result: ConvertedLayer | None) -> FFNReport:
    report = FFNReport(
        name=match.name,
        kind=match.kind,
        activation=match.activation,
        hidden_size=match.hidden_size,
        intermediate_size=match.intermediate_size,
        action="dense",
        reason=layer.reason,
        flops_before=match.flops_per_token * len(match.sites),
        flops_after=match.flops_per_token * len(match.sites),
        parameters_before=match.num_parameters,
        parameters_after=match.num_parameters,
    )
    if result is None:
        return report
    per_neuron = match.flops_per_token // match.intermediate_size
    per_site = layer.top_k * result.expert_size * per_neuron + result.router_flops
    return replace(
        report,
        action="converted",
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        num_shared_experts=layer.num_shared_experts,
        receipt=result.receipt,
        error=result.error,
        error_before_refit=result.error_before_refit,
        tokens_per_expert=result.tokens_per_expert,
        flops_after=per_site * len(match.sites),
        parameters_after=result.num_parameters,
    )


def _notes(
    graph_module: GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights_only: bool,
    plan: ConversionPlan,
) -> tuple[str, ...]:
    notes: list[str] = []
    values = pytree.tree_leaves((args, kwargs))
    inputs = list(zip(graph_module.graph.find_nodes(op="placeholder"), values, strict=True))
    for node, value in inputs:
        notes += [
            f"input `{node.name}` has a fixed size of {size} in dimension {dim}, because the example has it: a size of "
            "0 or 1 cannot stay dynamic; give an example with at least 2"
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ())
            if size < 2
        ]
    notes += [str(fixed) for fixed in fixed_dims(graph_module)]
    constants = ", ".join(f"`{node.name}` = {value!r}" for node, value in inputs if not isinstance(value, Tensor))
    if constants:
        notes.append(f"inputs that are no tensors stay as in the example, whatever is passed: {constants}")
    notes += [
        f"output {output} is None in the converted model, because torch finds no tensors in that class; have the model "
        "return a tuple or dict instead, or register the class (torch.utils._pytree.register_pytree_node) to keep it"
        for output in left_out(graph_module)
    ]
    if not any(layer.converts for layer in plan.layers):
        notes.append("nothing was converted: every FFN stays dense for the reason given; see select=")
    elif weights_only:
        notes.append(
            "no calibration data: experts, routers and means rest on the weights and on random tokens shaped like the "
            "example inputs, and down_proj was not refitted. The errors above are on the example inputs. Real "
            "calibration data lowers them; see README, section Limits, for what that is worth"
        )
    return tuple(notes)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Clock:
    """Times the stages and reports their progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def run(self, stage: str, work: Callable[[], _Result]) -> _Result:
        """Run one stage."""
        start = time.perf_counter()
        self._tell(stage, 0, 1)
        result = work()
        self._tell(stage, 1, 1)
        self.seconds[stage] = time.perf_counter() - start
        return result

    def layers(self, done: int, total: int) -> None:
        """Report layers within the stage "convert"."""
        self._tell("convert", done, total)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)
