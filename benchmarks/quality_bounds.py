"""What limits a conversion: the split, the router or the budget. Choices that need the whole FFN, so no deployed model.

    python benchmarks/quality_bounds.py minilm --budget 0.25 --budget 0.5

All rows are closed form (mean folding and refit on the same tokens, no block-wise training), all layers are converted,
each on the output of those before it, and what is judged is the end metric of `benchmarks/quality.py`:

    ours            our split, our router
    best experts    our split; for every token the K experts that lower its error most, found greedily
    best neurons    no split; for every token the neurons of largest |h_j - mean_j| |W_down[:, j]|

The same number of neurons runs in each row; our router is not counted. T tokens, R routed experts, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast
from unittest import mock

import torch
import typer
from quality_methods import router_width
from quality_routers import GreedyRouter
from quality_subjects import Subject, load_subject
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify import SparsifyConfig, sparsify
from sparsify.passes.base import PassResult
from sparsify.passes.insert_moe import InsertMoEPass
from sparsify.passes.split.choose_neurons import activation_profiles, choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.fold_mean import fold_mean
from sparsify.passes.split.refit import refit
from sparsify.passes.split.sample import Sample
from sparsify.passes.split.split_ffn import SplitResult, split_ffn
from sparsify.passes.split.statistics import chunks, importance, measure_neurons
from sparsify.passes.verify import receipt
from sparsify.routers import UnitRouter

_TOKENS = 16_384  # of a refit


def main(
    model: Annotated[str, typer.Argument(help="minilm, smollm2 or gpt")],
    budget: Annotated[list[float] | None, typer.Option(help="share of the neurons that run for a token")] = None,
    experts: int = 16,
    split: Annotated[str, typer.Option(help="held_out or development")] = "held_out",
    calls: Annotated[int, typer.Option(help="calibration batches; 0 for all of `quality.py`")] = 0,
) -> None:
    """Print a row a bound."""
    subject = load_subject(model, cast("Any", split), None)
    print(f"{subject.data}; {f'the first {calls} batches' if calls else 'all batches'} of the calibration")
    print(_row("dense", 1.0, subject, subject.model))
    for share in budget or (0.25, 0.5):
        for name, function in _BOUNDS.items():
            print(_row(name, share, subject, _convert(subject, function, experts, share, calls)), flush=True)


def _row(name: str, share: float, subject: Subject, model: Callable[..., Any]) -> str:
    metric, evaluate = next(iter(subject.metrics.items()))
    return f"| {share:.1%} | {name} | {metric} {evaluate(model):.4g} |"


def _convert(subject: Subject, split: Callable[..., SplitResult], experts: int, share: float, calls: int) -> nn.Module:
    hidden_size = next(iter(subject.model.parameters())).shape[1]
    options: dict[str, Any] = {"num_experts": experts, "top_k": round(share * experts), "select": "all"}
    options |= {"router_hidden_size": router_width(hidden_size), "distill_steps": 0}
    batches = subject.calibration(0, 1)
    with (
        mock.patch("sparsify.passes.make_experts.split_ffn", split),
        mock.patch("sparsify.passes.convert.InsertMoEPass", _Insert),
    ):
        return sparsify(subject.model, (), subject.example, calibration=batches[: calls or None], **options)


def best_experts(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """The split of `split_ffn` behind a `GreedyRouter`."""
    few = _thin(fit)
    statistics = measure_neurons(dense, few.x)
    profiles = activation_profiles(dense, few.x)
    neurons = choose_neurons(profiles, importance(dense, statistics), config.num_experts, config.shared, config.seed)
    mean = statistics.mean[neurons.clamp(min=0)]
    folded = fold_mean(divide(dense, neurons, config.shared), mean[config.shared :])
    return _refitted(original, folded, mean, GreedyRouter(folded, config.top_k - config.shared), few, config)


def best_neurons(
    dense: DenseFFN, original: DenseFFN, fit: Sample, measured: Sample, config: SparsifyConfig, *, may_refit: bool
) -> SplitResult:
    """Every neuron is an expert."""
    few = _thin(fit)
    width = dense.down.weight.shape[1]
    mean = measure_neurons(dense, few.x).mean.unsqueeze(1)
    folded = fold_mean(divide(dense, torch.arange(width).unsqueeze(1), 0), mean)
    router = NeuronRouter(folded, mean.flatten(), round(config.top_k / config.num_experts * width))
    return _refitted(original, folded, mean, router, few, config)


def _refitted(
    original: DenseFFN, folded: Experts, mean: Tensor, router: UnitRouter, few: Sample, config: SparsifyConfig
) -> SplitResult:
    ids = torch.cat([router(part)[1] for part in chunks(few.x)])
    experts = refit(folded, mean.flatten(), few.x, few.target, few.weight, ids, config.ridge)
    whole = receipt(original, folded, few.x[:8]) if folded.down.shape[2] > 1 else 0.0
    return SplitResult(experts, router, whole, 0.0, None, (0,) * folded.num_routed, len(few.x))


def _thin(sample: Sample) -> Sample:
    return sample.every(-(-len(sample.x) // _TOKENS))


class NeuronRouter(UnitRouter):
    """The neurons that contribute most, of a split into single neurons."""

    def __init__(self, experts: Experts, mean: Tensor, top_k: int) -> None:
        super().__init__(experts.projections[0].shape[2], experts.num_routed, top_k)
        self._experts, self._mean = experts, mean.to(experts.down.dtype)
        self._norms = experts.down.norm(dim=1).flatten()  # [F]

    def logits(self, x: Tensor) -> Tensor:
        """`[T, F]`."""
        return (self._experts.hidden(x).squeeze(2) - self._mean).abs() * self._norms


class _SingleNeurons(nn.Module):
    """As the experts of one neuron compute it, by one masked product instead of a dispatch of F rows a token."""

    def __init__(self, experts: Experts, router: UnitRouter) -> None:
        super().__init__()
        self._experts, self.router = experts, router

    def forward(self, x: Tensor) -> Tensor:
        """`[.., D]` to `[.., D_out]`."""
        experts, flat = self._experts, x.reshape(-1, x.shape[-1])
        runs = torch.zeros(len(flat), experts.num_routed).scatter_(1, self.router(flat)[1], 1.0)
        y = (experts.hidden(flat).squeeze(2) * runs) @ experts.down.squeeze(2)
        y = y if experts.expert_bias is None else y + runs @ experts.expert_bias
        return (y if experts.bias is None else y + experts.bias).reshape(*x.shape[:-1], -1)


class _Insert(InsertMoEPass):
    """Experts of one neuron become a `_SingleNeurons`; others what they always become."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """See `InsertMoEPass.call`."""
        if not isinstance(self.router, UnitRouter) or self.experts.down.shape[2] > 1:
            return super().call(graph_module)
        (site,) = self.match.sites
        nodes = {node.name: node for node in graph_module.graph.nodes}
        down = nodes[site.down]
        graph_module.add_submodule(f"{self.match.name}.neurons", _SingleNeurons(self.experts, self.router))
        with graph_module.graph.inserting_before(down):
            output = graph_module.graph.call_module(f"{self.match.name}.neurons", (nodes[site.x],))
        output.meta.update(down.meta)
        down.replace_all_uses_with(output)
        graph_module.graph.erase_node(down)
        output.name = site.down
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, modified=True)


_BOUNDS: dict[str, Callable[..., SplitResult]] = {
    "ours, closed form": split_ffn,
    "best experts": best_experts,
    "best neurons": best_neurons,
}


if __name__ == "__main__":
    typer.run(main)
