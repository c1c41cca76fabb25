"""Several dense models of one architecture, trained apart -> the weights of the same FFN in each of them.

Branch-Train-MiX (arXiv 2403.07816): the FFNs of the branches become experts, all other weights their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsify.passes.capture import DynamicShapes, capture
from sparsify.passes.match_ffn import FFNMatch, match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn
from sparsify.passes.split.experts import Experts, divide
from sparsify.passes.split.fold_vectors import fold_vectors


@dataclass(frozen=True)
class Branch:
    """A traced branch and its FFNs by name."""

    graph_module: GraphModule
    matches: Mapping[str, FFNMatch]

    def read(self, name: str) -> DenseFFN:
        """The weights of one FFN, its vectors folded as those of the model are."""
        match = self.matches[name]
        return fold_vectors(match, read_ffn(self.graph_module, match))[1]


def read_branches(
    branches: Sequence[nn.Module],
    matches: Sequence[FFNMatch],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: DynamicShapes,
) -> tuple[Branch, ...]:
    """Trace every branch.

    Args:
        branches: with the same parameters as the model that is converted.
        matches: the FFNs of that model.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as in `capture`.

    Raises:
        CaptureError: a branch cannot be traced.
        ValueError: a branch has other FFNs.
    """
    found: list[Branch] = []
    for i, branch in enumerate(branches):
        graph_module = NormalizeLinearPass()(capture(branch, args, kwargs, dynamic_shapes)).graph_module
        own = {match.name: match for match in match_ffn(graph_module)[0]}
        for match in matches:
            if match.name not in own or _parts(own[match.name]) != _parts(match):
                raise ValueError(
                    f"branch {i} computes something else at {match.name} than the model does, though its parameters "
                    "have the same shapes; give branches of one class and configuration"
                )
        found.append(Branch(graph_module, own))
    return tuple(found)


def _parts(match: FFNMatch) -> tuple[object, ...]:
    """What must be the same for two FFNs to differ in their weights alone."""
    return match.activation, match.kind, match.projections, len(match.vectors)


def join_branches(branches: Sequence[DenseFFN], granularity: int, total: float) -> Experts:
    """The shards of the first FFN, those of the second, and so on, each with the output bias of its branch.

    Args:
        branches: R FFNs, alike but for their weights.
        granularity: G, shards of each.
        total: what the routing weights of a token sum to.

    Returns:
        R G experts; all shards of one with weights of that sum give its FFN.
    """
    shards = torch.arange(branches[0].down.weight.shape[1]).view(granularity, -1)
    parts = [divide(branch, shards, num_shared=0) for branch in branches]
    biases = [None if part.bias is None else part.bias.expand(granularity, -1) / total for part in parts]
    return replace(
        parts[0],
        projections=tuple(torch.cat(same) for same in zip(*(part.projections for part in parts), strict=True)),
        projection_biases=tuple(_cat(same) for same in zip(*(part.projection_biases for part in parts), strict=True)),
        vectors=tuple(_cat_vectors(same) for same in zip(*(part.vectors for part in parts), strict=True)),
        down=torch.cat([part.down for part in parts]) * (granularity / total),
        expert_bias=_cat(biases),
        bias=None,
    )


def branch_receipt(branches: Sequence[DenseFFN], experts: Experts, tokens: Sequence[Tensor], total: float) -> float:
    """Max |all shards of one branch in equal parts - its FFN| / max |FFN|, over tokens `[T, D]`, the worst branch."""
    granularity = experts.num_routed // len(branches)
    worst = 0.0
    for i, branch in enumerate(branches):
        shards = i * granularity + torch.arange(granularity)
        difference, size = 0.0, 1e-30
        for x in tokens:
            expected, ids = branch(x), shards.expand(len(x), -1)
            y = experts(x, ids, torch.full_like(ids, total / granularity, dtype=x.dtype))
            difference = max(difference, float((y - expected).abs().max()))
            size = max(size, float(expected.abs().max()))
        worst = max(worst, difference / size)
    return worst


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None


def _cat_vectors(parts: Sequence[Tensor]) -> Tensor:
    """`[G, m]` each; a single number is that of the first branch."""
    return torch.cat(list(parts)) if parts[0].dim() == 2 else parts[0]
