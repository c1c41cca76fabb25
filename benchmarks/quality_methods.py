"""The conversions that `benchmarks/quality.py` compares: ours, and our own code for what others published.

A method takes the place of `split_ffn` in the pipeline of `sparsify`, so all of them see the same calibration tokens,
layer after layer, and end as real experts in a real graph, timed by the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from quality_clusterings import Fisher, clustered_by, magnitude, output, weights
from quality_routers import by_gain, by_sets, linear, low_rank, routed_by
from quality_subjects import Subject
from torch import Tensor, nn
from torch.nn import functional

from sparsify import SparsifyConfig, inspect, sparsify
from sparsify.passes.split.choose_neurons import activation_profiles, choose_neurons
from sparsify.passes.split.cluster import balanced_kmeans
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.refit import refit
from sparsify.passes.split.sample import Sample
from sparsify.passes.split.split_ffn import SplitResult, relative_error, split_ffn, tokens_per_expert
from sparsify.passes.split.statistics import chunks, importance, measure_neurons
from sparsify.passes.split.train_router import expert_norms, train_router
from sparsify.passes.verify import receipt
from sparsify.routers import Router, UnitRouter

Split = Callable[..., SplitResult]


@dataclass(frozen=True)
class Size:
    """Of an FFN: D, F and its multiply-adds for a token."""

    hidden: int
    neurons: int
    macs: int


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        says: what it does, for people.
        split: stands in for `split_ffn`.
        router: multiply-adds of its router, from the size of the FFN and R, the number of routed experts.
        num_shared: of E experts of which K run, how many always run.
        options: fields of `SparsifyConfig` that differ.
        uneven: K of each layer, from the importance of its E parts and the mean K.
        allocates: `budget=` chooses K and the shared experts of each layer.
        calibrates: it sees calibration data.
        bound: it needs what no deployed model has.
        prepare: is shown the dense model and the calibration data first.
    """

    says: str
    split: Split
    router: Callable[[Size, int], int]
    num_shared: Callable[[int, int], int] = lambda experts, top_k: 0
    options: dict[str, Any] = field(default_factory=lambda: {})
    uneven: Callable[[dict[str, Tensor], int], dict[str, int]] | None = None
    allocates: bool = False
    calibrates: bool = True
    bound: bool = False
    prepare: Callable[[Subject, list[Any]], None] | None = None

    def share(self, size: Size, experts: int, top_k: int) -> float:
        """Of the multiply-adds of the FFN, what is left with K of E experts."""
        return top_k / experts + self.router(size, experts - self.num_shared(experts, top_k)) / size.macs


def _result(dense: DenseFFN, original: DenseFFN, fit: Sample, experts: Experts, router: Router) -> SplitResult:
    whole = receipt(original, experts, fit.x[:256])
    return SplitResult(experts, router, whole, 0.0, None, tokens_per_expert(experts, router, fit), len(fit.x))


def random_split(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Neurons divided by lot; mean folding, norm router and closed-form refit as ours without training."""
    width = dense.down.weight.shape[1]
    size = -(-width // config.num_experts)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(config.seed))
    neurons = functional.pad(order, (0, config.num_experts * size - width), value=-1).view(-1, size)
    mean = measure_neurons(dense, fit.x).mean[neurons.clamp(min=0)]
    split = fold_mean(divide(dense, neurons, 0), mean)
    router = train_router(fit.x, expert_norms(split, fit.x), config.top_k, config.router_hidden_size, config.seed)
    return _refitted(dense, original, split, mean, router, fit, measured, config)


def oracle(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Our clusters and refit, and the experts whose output truly has the largest norm."""
    statistics = measure_neurons(dense, fit.x)
    scores = importance(dense, statistics)
    profiles = activation_profiles(dense, fit.x)
    neurons = choose_neurons(profiles, scores, config.num_experts, config.shared, config.seed)
    mean = statistics.mean[neurons.clamp(min=0)]
    split = fold_mean(divide(dense, neurons, config.shared), mean[config.shared :])
    router = OracleRouter(split, config.top_k - config.shared)
    return _refitted(dense, original, split, mean, router, fit, measured, config)


def _refitted(
    dense: DenseFFN,
    original: DenseFFN,
    split: Experts,
    mean: Tensor,
    router: Router,
    fit: Sample,
    measured: Sample,
    config: SparsifyConfig,
) -> SplitResult:
    ids = torch.cat([router(part)[1] for part in chunks(fit.x)])
    result = _result(dense, original, fit, split, router)
    experts = refit(split, mean.flatten(), fit.x, fit.target, fit.weight, ids, config.ridge)
    return replace(result, experts=experts, error=relative_error(experts, router, measured))


class OracleRouter(UnitRouter):
    """Computes every expert to know which matter."""

    def __init__(self, experts: Experts, top_k: int) -> None:
        super().__init__(experts.projections[0].shape[2], experts.num_routed, top_k)
        self._experts = experts

    def logits(self, x: Tensor) -> Tensor:
        """`[T, R]`: the norm of what each expert adds."""
        return expert_norms(self._experts, x)


def moefication(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Zhang et al., arXiv 2110.01786: balanced k-means on the rows of the first projection, a two-layer tanh router.

    Its target is the activation of an expert, here of |h|, as h of GELU and SwiGLU has both signs.
    """
    rows = functional.normalize(dense.projections[0].weight, dim=1)
    neurons = balanced_kmeans(rows, config.num_experts, config.seed)
    split = divide(dense, neurons, 0)
    kept = (neurons >= 0).to(rows.dtype).unsqueeze(2)
    centroids = (rows[neurons.clamp(min=0)] * kept).sum(1) / kept.sum(1)
    router = TanhRouter(centroids, config.top_k)
    _train_on_activation(router, dense, neurons, fit.x, config.seed)
    result = _result(dense, original, fit, split, router)
    return replace(result, error=relative_error(split, router, measured))


class TanhRouter(UnitRouter):
    """Linear, tanh, linear on the direction of the token; starts as the similarity to the centroids."""

    def __init__(self, centroids: Tensor, top_k: int) -> None:
        super().__init__(centroids.shape[1], len(centroids), top_k)
        self.first = nn.Linear(centroids.shape[1], len(centroids), bias=False)
        self.second = nn.Linear(len(centroids), len(centroids), bias=False)
        with torch.no_grad():
            self.first.weight.copy_(centroids)
            self.second.weight.copy_(torch.eye(len(centroids)))

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, E]`."""
        direction = functional.normalize(x.to(self.first.weight.dtype), dim=1)
        return self.second(torch.tanh(self.first(direction)))


def _train_on_activation(router: TanhRouter, dense: DenseFFN, neurons: Tensor, x: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    kept = (neurons >= 0).to(x.dtype)
    for _ in range(600):
        rows = torch.randint(len(x), (min(512, len(x)),), generator=generator)
        part = x.index_select(0, rows)
        activation = (dense.hidden(part).abs()[:, neurons.clamp(min=0)] * kept).sum(2)  # [T, E]
        with torch.enable_grad():
            wanted = activation / activation.max()
            loss = functional.binary_cross_entropy_with_logits(router.logits(part), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def cmoe(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Pei et al., arXiv 2502.04416: shared experts of the highest activation rate, k-means on activation markers.

    The score of an expert is the activation of the neuron nearest its centroid.
    """
    x = fit.x[:: -(-len(fit.x) // 4096)]
    hidden = dense.hidden(x).abs()
    markers = torch.zeros_like(hidden).scatter_(1, hidden.topk(10, dim=1).indices, 1.0)  # [T, F]
    rate = markers.mean(0)
    size = -(-len(rate) // config.num_experts)
    by_rate = rate.argsort(descending=True, stable=True)
    shared, rest = by_rate[: config.shared * size].view(-1, size), by_rate[config.shared * size :].sort().values
    columns = markers.t()[rest]
    clusters = balanced_kmeans(columns, config.num_experts - config.shared, config.seed)
    routed = torch.where(clusters < 0, -1, rest[clusters.clamp(min=0)])
    routed = functional.pad(routed, (0, size - routed.shape[1]), value=-1)
    split = divide(dense, torch.cat([shared, routed]), config.shared)
    kept = (clusters >= 0).to(columns.dtype).unsqueeze(2)
    members = columns[clusters.clamp(min=0)]  # [R, m, T]
    centroids = (members * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    distance = (members - centroids).square().sum(2).masked_fill(clusters < 0, torch.inf)
    router = NeuronRouter(dense, rest[clusters.gather(1, distance.argmin(1, keepdim=True)).flatten()], config)
    result = _result(dense, original, fit, split, router)
    return replace(result, error=relative_error(split, router, measured))


class NeuronRouter(UnitRouter):
    """The magnitude of one neuron of each expert, its rows normalised."""

    def __init__(self, dense: DenseFFN, neurons: Tensor, config: SparsifyConfig) -> None:
        super().__init__(dense.projections[0].weight.shape[1], len(neurons), config.top_k - config.shared)
        self._activation = dense.activation
        self._vectors = tuple(v[neurons] if v.dim() else v for v in dense.vectors)
        rows = [p.weight[neurons] for p in dense.projections]
        norms = [row.norm(dim=1, keepdim=True) for row in rows]
        self.rows = nn.ParameterList(nn.Parameter(r / n) for r, n in zip(rows, norms, strict=True))
        self._biases = [
            None if p.bias is None else p.bias[neurons] / n.flatten()
            for p, n in zip(dense.projections, norms, strict=True)
        ]

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, R]`."""
        x = x.to(self.rows[0].dtype)
        projected = [functional.linear(x, row, bias) for row, bias in zip(self.rows, self._biases, strict=True)]
        return self._activation(*projected, *self._vectors).abs()


def ffn_size(subject: Subject) -> Size:
    """All FFNs of a subject have one size."""
    first = inspect(subject.model, (), subject.example).ffns[0]
    return Size(first.hidden_size, first.intermediate_size, first.flops_per_token // 2)


def importance_by_layer(subject: Subject, batches: list[Any], experts: int) -> dict[str, Tensor]:
    """By the name of the FFN, how much output variance each of E parts of its neurons holds `[E]`, falling."""
    found: list[Tensor] = []

    def record(
        dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
    ) -> SplitResult:
        scores = importance(dense, measure_neurons(dense, fit.x)).sort(descending=True).values
        found.append(scores[: len(scores) // experts * experts].view(experts, -1).mean(1))
        return split_ffn(dense, original, fit, measured, config, may_refit=False)

    with mock.patch("sparsify.passes.make_experts.split_ffn", record):
        options: dict[str, Any] = {"num_experts": experts, "top_k": experts, "select": "all"}
        options["num_shared_experts"] = experts  # nothing is routed, so no router is trained
        sparse = sparsify(subject.model, (), subject.example, calibration=batches[:8], **options)
    names = [ffn.name for ffn in sparse.report.converted]
    return dict(zip(names, found, strict=True))


def _one_threshold(scores: dict[str, Tensor], top_k: int) -> dict[str, int]:
    """FLAP: scores standardised within each layer, then one threshold for all layers."""
    standard = {name: (part - part.mean()) / part.std() for name, part in scores.items()}
    ranked = torch.cat(list(standard.values())).sort(descending=True).values
    threshold = ranked[min(top_k * len(scores), len(ranked)) - 1]
    return {name: max(1, int((part >= threshold).sum())) for name, part in standard.items()}


def router_width(hidden_size: int) -> int:
    """Of the two-layer router: about 2 % of the multiply-adds of an FFN of the usual width."""
    return max(8, hidden_size // 8)


def _mlp(size: Size, routed: int) -> int:
    return router_width(size.hidden) * (size.hidden + routed)


def _neuron(size: Size, routed: int) -> int:
    """The projections of one neuron: two thirds of a gated FFN's multiply-adds for it, half of a plain one's."""
    return routed * (size.macs // size.neurons - size.hidden)


def _none(size: Size, routed: int) -> int:
    return 0


def few_shared(experts: int, top_k: int) -> int:
    """As `SparsifyConfig.shared` has it by default."""
    return SparsifyConfig(num_experts=experts, top_k=top_k).shared


def _all_shared(experts: int, top_k: int) -> int:
    return top_k


def _half_shared(experts: int, top_k: int) -> int:
    return top_k // 2


def _clustering(says: str, split: Split, prepare: Callable[[Subject, list[Any]], None] | None = None) -> Method:
    """As "ours, closed form", by another similarity of neurons."""
    return Method(f"neurons grouped by {says}", split, _mlp, few_shared, {"distill_steps": 0}, prepare=prepare)


def _routing(says: str, split: Split, router: Callable[[Size, int], int] = _mlp) -> Method:
    """As "ours, closed form", behind another router."""
    return Method(f"router: {says}", split, router, few_shared, {"distill_steps": 0})


def _linear(size: Size, routed: int) -> int:
    return size.hidden * routed


def _low_rank(size: Size, routed: int) -> int:
    return _mlp(size, routed) // 2


_FISHER = Fisher()

METHODS: dict[str, Method] = {
    "ours": Method("clusters, shared expert, router, refit, block-wise training", split_ffn, _mlp, few_shared),
    "ours, budget": Method(
        "ours, K of each layer and pruning by measured error", split_ffn, _mlp, few_shared, allocates=True
    ),
    "ours, closed form": Method("the same without training", split_ffn, _mlp, few_shared, {"distill_steps": 0}),
    "ours, weights only": Method("no calibration data", split_ffn, _mlp, few_shared, calibrates=False),
    "ours, pruned": Method("all of K shared: pruning, refit, block-wise training", split_ffn, _none, _all_shared),
    "static": Method("by output variance, means folded, refit", split_ffn, _none, _all_shared, {"distill_steps": 0}),
    "FLAP-like": Method(
        says="static pruning, one threshold for all layers, folded means",
        split=split_ffn,
        router=_none,
        num_shared=_all_shared,
        options={"refit": False},
        uneven=_one_threshold,
    ),
    "random split": Method("random experts, our router and refit, no training", random_split, _mlp),
    "MoEfication": Method("weight clusters, tanh router", moefication, lambda s, r: r * (s.hidden + r)),
    "CMoE": Method("activation rates, one-neuron router, half of K shared", cmoe, _neuron, _half_shared),
    "weight clusters": _clustering("direction of the weights", clustered_by(weights)),
    "magnitude clusters": _clustering("distance from the mean, without sign", clustered_by(magnitude)),
    "output clusters": _clustering("contribution to the output of the FFN", clustered_by(output)),
    "Fisher clusters": _clustering("contribution to the output of the model", clustered_by(_FISHER), _FISHER.measure),
    "linear router": _routing("ridge regression of the norms", routed_by(linear), _linear),
    "low-rank router": _routing("the same, of half the rank of ours", routed_by(low_rank), _low_rank),
    "router of gains": _routing("ours, on the error that an expert takes away", routed_by(by_gain)),
    "router of sets": _routing("ours, on the sets of an oracle", routed_by(by_sets)),
    "oracle": Method("ours in closed form, experts of truly largest norm", oracle, _mlp, few_shared, bound=True),
}
