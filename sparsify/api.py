"""`sparsify()`: the pipeline, one line a stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify.average_models import average_models, require_alike
from sparsify.config import SparsifyConfig
from sparsify.convert_budget import convert_within
from sparsify.convert_parts import Conversion, convert_parts
from sparsify.errors import CalibrationError, CaptureError, NoFFNError
from sparsify.make_report import conversion_notes, ffn_reports, input_notes, part_notes
from sparsify.passes.branches import Branch, read_branches
from sparsify.passes.calibrate import Call, as_call, read_batches
from sparsify.passes.capture import DynamicShapes, capture
from sparsify.passes.capture_parts import CapturedPart, CapturedParts, SkippedPart, capture_parts
from sparsify.passes.convert import convert
from sparsify.passes.find_causality import refuse_non_causal
from sparsify.passes.find_ffns import FoundFFNs, find_ffns
from sparsify.passes.match_ffn import FFNMatch, Rejection
from sparsify.passes.output_change import relative_difference
from sparsify.passes.plan import ConversionPlan, fit_plan, make_plan
from sparsify.passes.thread_ids import IdSource, read_ids, split_added
from sparsify.report import Report
from sparsify.run_outputs import run_outputs
from sparsify.sparse_model import SparseModel, SparseModelInfo

# Called as progress(stage, done, total).
Progress = Callable[[str, int, int], None]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found, in graph order.

    Attributes:
        ffns: FFNs that can be split.
        rejected: near misses, with the reason.
        skipped: modules whose own code could not be traced, the model first; empty where it was traced as a whole.
    """

    ffns: list[FFNMatch]
    rejected: list[Rejection]
    skipped: list[SkippedPart]

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
        model: any module. Where `torch.export` cannot trace it as a whole, the largest parts that it can are searched.
        args: example inputs.
        kwargs: example keyword inputs.

    Returns:
        Every legal FFN, paying or not, and every near miss.

    Raises:
        CaptureError: neither the model nor a part of it with an FFN can be traced, or the example inputs do not fit it.
    """
    kwargs = kwargs or {}
    found = find_ffns(model, capture_parts(model, args, kwargs), args, kwargs)
    return Inspection(found.matches, list(found.rejections), list(found.skipped))


def sparsify(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: SparsifyConfig | None = None,
    plan: ConversionPlan | None = None,
    branches: Sequence[nn.Module] = (),
    calibration: Iterable[object] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    consume_model: bool = False,
    allow_parts: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> SparseModel:
    """Convert the FFNs of a trained dense model into routed experts.

    Args:
        model: any module. It is not changed (but see `consume_model`). Weights that are not converted are shared with
            the result. Where `torch.export` cannot trace it as a whole, the FFNs of the largest parts that it can trace
            are converted, in a copy of its modules: the result is a `PartialSparseModel`, and the notes of its report
            list what was skipped.
        args: example inputs, or a single tensor. Give every dimension that should stay dynamic a size of at least 2.
        kwargs: example keyword inputs.
        config: how to divide; or give its fields as keyword options.
        plan: which FFNs to convert and into how many experts, for all of them, as `inspect(...).plan(...)` makes it;
            it takes the place of `select`, `overrides` and the numbers of experts.
        branches: models like `model`, trained apart (Branch-Train-MiX, arXiv 2403.07816), for start="upcycle": the FFN
            of each becomes an expert, in their order, and all other weights are the mean of the branches (see
            `average_models`). `num_experts` follows. The weights of `model` then count for nothing, unless it is one
            of them.
        calibration: an iterable of batches: `(args, kwargs)`, tuples, dicts or tensors, with the structure of the
            example inputs. Positions where a keyword `attention_mask` is 0 are left out. None converts from the weights
            and the example inputs alone, which costs quality.
        dynamic_shapes: "auto", or what `torch.export.export` takes.
        consume_model: free the dense weights of every FFN once it is converted, so that dense and converted weights are
            never all held at once (at the end, where sites share an FFN). The model is useless afterwards. With glibc
            this sets `M_MMAP_THRESHOLD` of the process (mallopt), without which it would keep what is freed.
        allow_parts: False refuses a model that cannot be traced as a whole, as one that will be saved or exported must.
        progress: called as `progress(stage, done, total)`.
        **options: fields of `SparsifyConfig`.

    Returns:
        A `SparseModel` with the inputs and outputs of the model; `.report` says what was done.

    Raises:
        ValueError: an option is not valid, or does not go with another.
        CaptureError: the model cannot be traced (nor can parts of it that hold an FFN), or the example inputs do not
            fit it.
        NoFFNError: the model has no FFN that can be split.
        SelectionError: `select`, `overrides` or `plan` do not fit the FFNs of the model, or ask for more experts than
            one of them has neurons for; or the model has no ids or groups of tokens as the router needs them.
        BudgetError: no conversion keeps the budget; the message says what can be reached.
        CausalityError: the model is causal and the router is not.
        CalibrationError: the calibration data is empty, does not fit, or leads to values that are not finite.
    """
    _refuse_contradiction(plan, options)
    config = _config(config, _with_branches(config, options, branches))
    if branches:
        model, allow_parts = _merged(model, branches, config), False
    _refuse_budget(config, plan, options, calibration, consume_model)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    given, added = split_added(model, kwargs or {}, config.ids_name)
    clock = _Clock(progress)
    captured = clock.run("capture", lambda: _capture(model, args, given, dynamic_shapes, allow_parts))
    found = clock.run("match", lambda: find_ffns(model, captured, args, given))
    _require_ffn(model, found)
    plan = make_plan(found.matches, config) if plan is None else fit_plan(plan, found.matches, config)
    refuse_non_causal(found.parts, plan, config)
    expected, parameters_before = run_outputs(model, args, given), _count(model)
    traced = read_branches(branches, _planned(found.matches, plan), args, given, dynamic_shapes)
    _refuse_other_counts(plan, len(branches) * config.granularity)
    ids, given = read_ids(found, config, added), {**given, **added}
    batches = _read(calibration, plan, config)
    convert_found = partial(_convert_whole, ids=ids, branches=traced) if found.is_whole else convert_parts
    done = clock.run(
        "convert",
        lambda: convert_within(
            convert_found, model, found, plan, config, batches, (args, given), clock.layers, consume=consume_model
        ),
    )
    error = clock.run(
        "verify", lambda: relative_difference(zip(expected, run_outputs(done.sparse, args, given), strict=True))
    )
    notes = input_notes(found.parts[0].graph_module, args, given) if found.is_whole else part_notes(found.skipped)
    report = Report(
        ffns=ffn_reports(found.matches, found.rejections, done.plan, done.results),
        notes=(
            *notes,
            *([] if done.note is None else [done.note]),
            *conversion_notes(
                done.plan, done.results, weights_only=calibration is None, copies=config.start != "split"
            ),
            *([] if ids is None else [str(ids)]),
            *([_branch_note(len(branches))] if branches else []),
        ),
        calibration_tokens=done.tokens,
        parameters_before=parameters_before,
        parameters_after=_count(done.sparse),
        output_error=error,
        seconds=clock.seconds,
    )
    done.sparse.info = replace(done.sparse.info, report=report)
    return done.sparse


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: DynamicShapes,
    allow_parts: bool,
) -> CapturedParts:
    if allow_parts:
        captured = capture_parts(model, args, kwargs, dynamic_shapes)
    else:
        captured = CapturedParts((CapturedPart("", capture(model, args, kwargs, dynamic_shapes), args, kwargs),))
    if captured.error is None:
        _require_free_names(model, captured.parts[0].graph_module)
    return captured


def _read(calibration: Iterable[object] | None, plan: ConversionPlan, config: SparsifyConfig) -> Sequence[Call] | None:
    if calibration is None or not any(layer.converts for layer in plan.layers):
        return None
    return read_batches(calibration, config.max_calibration_tokens)


def _convert_whole(
    model: nn.Module,
    found: FoundFFNs,
    plan: ConversionPlan,
    config: SparsifyConfig,
    calibration: Sequence[Call] | None,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    progress: Callable[[int, int], None],
    *,
    consume: bool = False,
    ids: IdSource | None,
    branches: Sequence[Branch],
) -> Conversion:
    """As `convert_parts`, for a model that is one graph."""
    (whole,) = found.parts
    call = as_call(example)
    results, tokens = convert(
        whole.graph_module,
        whole.matches,
        plan,
        config,
        calibration,
        call,
        progress,
        consume=consume,
        ids=ids,
        branches=branches,
    )
    sparse = SparseModel(whole.graph_module, whole.graph_module.graph)
    sparse.train(model.training)
    shared = {layer.name: layer.num_shared_experts for layer in plan.layers if layer.converts}
    covers = {name: whole.covers[name] for name in results}
    shards = {} if config.start == "split" else dict.fromkeys(results, config.granularity)
    sparse.info = SparseModelInfo(*example, shared, None, covers, shards)
    return Conversion(sparse, plan, results, tokens)


def _config(config: SparsifyConfig | None, options: dict[str, Any]) -> SparsifyConfig:
    if config is None:
        return SparsifyConfig(**options)
    return config.with_options(**options)


def _refuse_contradiction(plan: ConversionPlan | None, options: dict[str, Any]) -> None:
    planned = ("num_experts", "top_k", "num_shared_experts", "expert_widths", "select", "overrides")
    clash = [name for name in planned if name in options]
    if plan is not None and clash:
        raise ValueError(f"plan= already says what {', '.join(clash)} would; give the plan or the options, not both")


def _refuse_budget(
    config: SparsifyConfig, plan: ConversionPlan | None, options: dict[str, Any], calibration: object, consume: bool
) -> None:
    if config.limit is None:
        return
    if plan is not None or "top_k" in options or "num_shared_experts" in options:
        raise ValueError("budget= chooses top_k and num_shared_experts of every FFN; give one or the other")
    if calibration is None:
        raise CalibrationError("budget= goes by measured errors, so it needs calibration=: batches of real inputs")
    if consume and config.limit.unit == "error":
        raise ValueError(
            f"budget={config.budget!r} converts several times, so the model must stay whole; leave consume_model "
            "out, or give the share that the report of a first run names"
        )


def _with_branches(
    config: SparsifyConfig | None, options: dict[str, Any], branches: Sequence[nn.Module]
) -> dict[str, Any]:
    """The number of experts follows from the branches, unless it is given here."""
    shards = options.get("granularity", 1 if config is None else config.granularity)
    return {"num_experts": len(branches) * shards, **options} if branches else options


def _merged(model: nn.Module, branches: Sequence[nn.Module], config: SparsifyConfig) -> nn.Module:
    """The mean of the branches, in the mode of `model`."""
    if config.start != "upcycle":
        raise ValueError(f"branches= are copied as they are, which is start='upcycle', not start={config.start!r}")
    require_alike([model, *branches])
    return average_models(branches).train(model.training)


def _planned(matches: Sequence[FFNMatch], plan: ConversionPlan) -> list[FFNMatch]:
    return [match for match, layer in zip(matches, plan.layers, strict=True) if layer.converts]


def _refuse_other_counts(plan: ConversionPlan, count: int) -> None:
    for layer in plan.layers if count else ():
        if layer.converts and layer.num_experts != count:
            raise ValueError(
                f"{layer.name} is to have {layer.num_experts} experts, and the branches make {count}, one for each "
                f"shard of a branch; give num_experts={count} or leave it out"
            )


def _branch_note(count: int) -> str:
    return (
        f"the experts are the FFNs of {count} branches and all else is their mean; receipts compare every expert with "
        "its branch, errors compare with the mean of all weights"
    )


def _require_free_names(model: nn.Module, graph_module: GraphModule) -> None:
    taken = [name for name, value in vars(SparseModel).items() if isinstance(value, property)]
    clash = [name for name in taken if hasattr(graph_module, name)]
    if clash:
        raise CaptureError(
            f"{type(model).__name__} has members called {clash} at its top, names that SparseModel uses for itself. "
            "Wrap the model in a module that holds it under another name, and convert that."
        )


def _require_ffn(model: nn.Module, found: FoundFFNs) -> None:
    if found.matches:
        return
    linear = torch.ops.aten.linear.default
    linears = sum(len(part.graph_module.graph.find_nodes(op="call_function", target=linear)) for part in found.parts)
    nearest = "\n".join(f"  - {rejection}" for rejection in found.rejections[:5])
    detail = f"The nearest:\n{nearest}" if nearest else "None of them feeds another one through an activation function."
    skipped = "".join(f"\nNot traced: {part}" for part in found.skipped[:5])
    raise NoFFNError(
        f"{type(model).__name__} has no feed-forward layer that can be split, among {linears} linear layers. {detail}"
        f"{skipped}"
    )


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
