"""Split and insert, layer after layer, each on the output of the layers already converted.

Two streams of calibration tokens run side by side, one through the dense model and one through what has been converted
so far. A layer is fitted to bring the hidden state of the second back to the first: with x, r the input and residual of
the FFN in the converted stream and x*, r* in the dense one, the output that is wanted is

    FFN(x*) + r* - r                                    so that    r + output = r* + FFN(x*)

The model reads its hidden state through a normalisation, so an error counts relative to the size of the hidden state of
its token: the few tokens of huge norm that many models have (Sun et al., arXiv 2402.17762) would own the sum otherwise.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify.config import SparsifyConfig
from sparsify.errors import SelectionError
from sparsify.passes.branches import Branch
from sparsify.passes.calibrate import CalibrationStream, Call, count_tokens
from sparsify.passes.find_layers import find_layers
from sparsify.passes.fuse_moe import FuseMoEPass, why_not_fused
from sparsify.passes.heap import give_freed_memory_back, trim_heap
from sparsify.passes.insert_moe import InsertMoEPass
from sparsify.passes.make_experts import make_experts
from sparsify.passes.match_ffn import FFNMatch
from sparsify.passes.on_disk import has_room
from sparsify.passes.plan import ConversionPlan
from sparsify.passes.residual import residual_terms, sums_behind
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn
from sparsify.passes.split.fold_vectors import fold_vectors
from sparsify.passes.split.sample import Part, Sample, hold_out, join
from sparsify.passes.split.split_ffn import SplitResult
from sparsify.passes.split.statistics import chunks
from sparsify.passes.thread_ids import IdSource, thread_ids
from sparsify.passes.token_layout import group_size
from sparsify.passes.upcycle_ffn import starts_exact
from sparsify.passes.verify import check_receipt
from sparsify.routers import MergingRouter, Router, router_class

_SYNTHETIC_TOKENS = 4096
_HELD_TIMES = 4  # that a token is held


@dataclass(frozen=True)
class ConvertedLayer:
    """What the report says of a layer (see `FFNReport`), without its weights, which the graph holds.

    Attributes:
        neurons_per_token: neurons that run for a token, of routed and shared experts.
        gap: the start is not exact, as routing weights scale experts or tokens are left out; `error` says by how much.
        num_parameters: of experts and router.
        router_flops: per token, 2 per multiply-add.
        group: how many tokens compete for its experts, or share a merged one, at the example inputs, for a router that
            reads groups; 0 where these are all tokens of a call, None for any other router.
        merges: the tokens of a group share merged experts.
        unfused: why its experts run as a chain of ops, not as one; None where they are one.
    """

    neurons_per_token: int
    gap: bool
    num_parameters: int
    router_flops: int
    receipt: float
    error: float
    error_before_refit: float | None
    tokens_per_expert: tuple[int, ...]
    group: int | None = None
    merges: bool = False
    unfused: str | None = None


@torch.no_grad()
def convert(
    graph_module: GraphModule,
    matches: Sequence[FFNMatch],
    plan: ConversionPlan,
    config: SparsifyConfig,
    calibration: Sequence[Call] | None,
    example: Call,
    progress: Callable[[int, int], None],
    *,
    consume: bool = False,
    ids: IdSource | None = None,
    branches: Sequence[Branch] = (),
) -> tuple[dict[str, ConvertedLayer], int]:
    """Convert the planned FFNs in place.

    Args:
        graph_module: where `matches` were found.
        matches: all of them.
        plan: one entry per match.
        config: how to divide.
        calibration: batches, or None for a conversion from the weights and the example inputs alone.
        example: the example inputs.
        progress: called with the number of layers done and in all.
        consume: free the dense weights of every layer once it is converted, wherever else they are held.
        ids: the input that ids of tokens come from, for a router that reads them.
        branches: models whose FFNs become experts, in their order; none: copies or parts of the FFNs in the graph.

    Returns:
        The result of every converted FFN by name, and the number of calibration tokens.
    """
    todo = _in_order(graph_module, [m for m, layer in zip(matches, plan.layers, strict=True) if layer.converts])
    results: dict[str, ConvertedLayer] = {}
    if not todo:
        return results, 0
    if consume:
        give_freed_memory_back()
    batches = [example] if calibration is None else calibration
    dense_module = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    may_free_early = all(len(match.sites) == 1 for match in todo)  # shared sites need a second dense run
    on_disk = _belong_on_disk(batches, graph_module, todo)
    reference = CalibrationStream(dense_module, batches, on_disk=on_disk)
    stream = CalibrationStream(graph_module, batches, on_disk=on_disk)
    layers = {layer.name: layer for layer in plan.layers}
    outdated: list[tuple[str, nn.Parameter]] = []
    tokens = 0
    for done, match in enumerate(todo):
        progress(done, len(todo))
        options = _with_table(layers[match.name].configure(config), ids)
        original = read_ffn(graph_module, match)
        match, dense = fold_vectors(match, original)
        group = _group(graph_module, match, options)
        id_nodes = thread_ids(graph_module.graph, match, ids) if ids is not None else ()
        if len(match.sites) > 1:
            parts = iter([_pooled(dense_module, batches, match, dense, config.max_calibration_tokens, ids)])
        else:
            parts = _samples(reference, stream, graph_module, match, id_nodes)
        if calibration is None:
            fit, measured = _synthetic(join(parts), config.seed)
        else:
            fit, measured = hold_out(parts, on_disk=on_disk)
            tokens = len(fit.x) + (len(measured.x) if measured is not fit else 0)
        outdated = _free(outdated, graph_module, reference) if may_free_early else outdated
        trim_heap()
        copied = [branch.read(match.name) for branch in branches]
        result = make_experts(dense, original, fit, measured, options, copied, may_refit=calibration is not None)
        check_receipt(match.name, result.receipt)
        _check_group(result.router, group, match.name)
        before, last_down = list(graph_module.parameters()), [site.down for site in match.sites][-1]
        insertion = InsertMoEPass(match, result.experts, result.router, dense.dtypes, dense.requires_grad, id_nodes)
        insertion.requires(graph_module)
        insertion.call(graph_module)  # compiled once, at the end: torch keeps the code of every version of a graph
        FuseMoEPass().call(graph_module)  # the layers after it are calibrated through the faster op
        results[match.name] = _summary(result, options, len(measured.x), group)
        del original, dense, fit, measured, result, copied
        trim_heap()
        outdated += [(last_down, parameter) for parameter in before] if consume else []
    if consume:
        _free(outdated, graph_module)
    FuseMoEPass()(graph_module)
    for layer in find_layers(graph_module, graph_module.graph):
        if layer.name not in results:  # of an earlier conversion
            continue
        results[layer.name] = replace(results[layer.name], unfused=why_not_fused(layer))
    progress(len(todo), len(todo))
    return results, tokens


def _belong_on_disk(batches: Sequence[Call], graph_module: GraphModule, matches: Sequence[FFNMatch]) -> bool:
    """Tokens that are larger than the model: in two streams, as inputs and as wanted outputs."""
    if any(tensor.device.type != "cpu" for tensor in graph_module.parameters()):
        return False
    features = max(read_ffn(graph_module, match).down.weight.shape[0] for match in matches)
    size = _HELD_TIMES * torch.float32.itemsize * features * sum(map(count_tokens, batches))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in graph_module.parameters())
    return size > weights and has_room(size)


def _with_table(options: SparsifyConfig, ids: IdSource | None) -> SparsifyConfig:
    """A table of ids is as large as that of the embedding that reads them."""
    takes = "num_ids" in inspect.signature(router_class(options.router_name).__init__).parameters
    if ids is None or ids.num_ids is None or not takes or "num_ids" in options.options:
        return options
    return replace(options, router_options={**options.options, "num_ids": ids.num_ids})


def _group(graph_module: GraphModule, match: FFNMatch, options: SparsifyConfig) -> int | None:
    """See `ConvertedLayer.group`."""
    if not router_class(options.router_name).reads_groups:
        return None
    nodes = {node.name: node for node in graph_module.graph.nodes}
    return max(group_size(nodes[site.x], site.x_axis) or 0 for site in match.sites)


def _check_group(router: Router | None, group: int | None, name: str) -> None:
    try:
        if group and router is not None:
            router.check_group(group)
    except ValueError as error:
        raise SelectionError(f"{name}: {error}") from error


def _summary(result: SplitResult, options: SparsifyConfig, tokens: int, group: int | None) -> ConvertedLayer:
    router = [] if result.router is None else list(result.router.parameters())
    return ConvertedLayer(
        neurons_per_token=_neurons_per_token(result),
        gap=result.router is not None and options.start != "shared" and not starts_exact(result.router),
        num_parameters=result.experts.num_parameters + sum(parameter.numel() for parameter in router),
        router_flops=_router_flops(result, group or tokens),
        receipt=result.receipt,
        error=result.error,
        error_before_refit=result.error_before_refit,
        tokens_per_expert=result.tokens_per_expert,
        group=group,
        merges=isinstance(result.router, MergingRouter),
    )


def _router_flops(result: SplitResult, group: int) -> int:
    """Per token; experts are merged once for a segment of a `group` of tokens."""
    router, experts = result.router, result.experts
    if router is None:
        return 0
    flops = 2 * sum(parameter.numel() for parameter in router.parameters() if parameter.dim() == 2)
    if not isinstance(router, MergingRouter):
        return flops
    merged = sum(weight.numel() for weight in (*experts.projections, experts.down))
    return -(-(flops + 2 * merged) // max(1, int(min(router.segment(group), group))))


def _neurons_per_token(result: SplitResult) -> int:
    """Of the shared experts and of the routed ones; the mean over the tokens whose loads are known where it varies."""
    experts, router = result.experts, result.router
    always = 0 if experts.shared is None else experts.shared.down.weight.shape[1]
    if router is None:
        return always
    varies = (router.num_slots != router.top_k or experts.sizes is not None) and not router.merges
    if not varies or not result.routed_tokens:
        return round(router.top_k * sum(experts.widths) / experts.num_routed) + always
    loads = zip(result.tokens_per_expert, experts.widths, strict=True)
    return round(sum(load * width for load, width in loads) / result.routed_tokens) + always


def _free(
    outdated: list[tuple[str, nn.Parameter]], graph_module: GraphModule, reference: CalibrationStream | None = None
) -> list[tuple[str, nn.Parameter]]:
    """Empty parameters that neither the graph nor the dense stream will read; the model holds the same ones.

    Args:
        outdated: parameters that stood in the graph when the FFN whose down_proj is named was converted.
        graph_module: what it still reads is kept.
        reference: the dense stream, where it will go on.

    Returns:
        What must wait, as the dense stream has not passed it.
    """
    kept = {id(parameter) for parameter in graph_module.parameters()}
    waiting: list[tuple[str, nn.Parameter]] = []
    for down, parameter in outdated:
        if reference is not None and not reference.has_passed(down):
            waiting.append((down, parameter))
        elif id(parameter) not in kept:
            parameter.data = parameter.data.new_empty(0)
    if len(waiting) < len(outdated):
        give_freed_memory_back()
    return waiting


def _in_order(graph_module: GraphModule, matches: list[FFNMatch]) -> list[FFNMatch]:
    position = {node.name: i for i, node in enumerate(graph_module.graph.nodes)}
    return sorted(matches, key=lambda match: position[match.sites[0].x])


def _samples(
    reference: CalibrationStream,
    stream: CalibrationStream,
    graph_module: GraphModule,
    match: FFNMatch,
    id_nodes: Sequence[str],
) -> Iterator[Part]:
    """The inputs of the FFN in the converted stream, and the outputs that lead back to the dense one, by batch."""
    (site,) = match.sites
    down = next(node for node in graph_module.graph.nodes if node.name == site.down)
    residual_places = [(term.name, site.down_axis) for term in residual_terms(down)]
    places = [(site.x, site.x_axis), *residual_places]
    dense_places = [(site.down, site.down_axis), *residual_places]
    batches = zip(
        stream.batches_at(places, match.name, id_nodes), reference.batches_at(dense_places, match.name), strict=True
    )
    for (x, *others), (target, *dense_residuals) in batches:
        residuals, ids = others[: len(residual_places)], others[len(residual_places) :]
        for residual, dense_residual in zip(residuals, dense_residuals, strict=True):
            target = target + (dense_residual - residual)  # not in place: without a mask it is a view of the stream
        yield Part(x, target, _variance(target, residuals), ids[0] if ids else None)
    reference.pass_by([node.name for node in sums_behind(down)])


def _variance(target: Tensor, residuals: list[Tensor]) -> Tensor:
    """`[T]`: of the hidden state across features; ones where no residual is."""
    if not residuals:
        return target.new_ones(len(target))
    return (target + torch.stack(residuals).sum(0)).var(1, correction=0)


def _pooled(
    dense_module: GraphModule,
    batches: Sequence[Call],
    match: FFNMatch,
    dense: DenseFFN,
    max_tokens: int,
    source: IdSource | None,
) -> Part:
    """The inputs of all sites that share the FFN, in the dense model: its experts serve every site."""
    own = GraphModule(dense_module, copy.deepcopy(dense_module.graph))
    id_nodes = thread_ids(own.graph, match, source) if source is not None else ()
    stream = CalibrationStream(own, batches)
    sites = [(site.x, site.x_axis) for site in match.sites]
    found = stream.tokens_at(sites, match.name, id_nodes)
    x = torch.cat(found[: len(sites)])
    step = -(-len(x) // max_tokens)
    x, ids = x[::step], torch.cat(found[len(sites) :])[::step] if id_nodes else None
    return Part(x, torch.cat([dense(part) for part in chunks(x)]), x.new_ones(len(x)), ids)


def _synthetic(sample: Sample, seed: int) -> tuple[Sample, Sample]:
    """4096 tokens with the mean and spread, feature by feature, of the few that the example inputs give; and these."""
    generator = torch.Generator().manual_seed(seed)
    x = sample.x
    noise: Tensor = torch.randn(_SYNTHETIC_TOKENS, x.shape[1], generator=generator, dtype=x.dtype)
    mean, std = x.mean(0), x.std(0, correction=0)
    ids = None if sample.ids is None else sample.ids[torch.arange(_SYNTHETIC_TOKENS) % len(x)]
    return Sample(mean + noise * std, sample.target.new_empty(0), sample.weight.new_empty(0), ids), sample
