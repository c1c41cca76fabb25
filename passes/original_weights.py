"""The FFNs that a split model was made from, as weights for its own experts.

With all experts on, a layer is one FFN over the neurons of all of them, in any order. So with the neurons of the
original one in the places of its experts, first come, first served, and no means folded in, it is the original.
A refit and training had changed them. E experts of M neurons, D and N features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from sparsify.passes.capture import capture
from sparsify.passes.match_ffn import match_ffn
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.split.dense_ffn import DenseFFN, read_ffn
from sparsify.passes.split.fold_vectors import fold_vectors
from sparsify.passes.thread_ids import own_inputs
from sparsify.sparse_model import SparseModel


@torch.no_grad()
def original_weights(sparse: SparseModel, dense: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Read the FFNs of the dense model.

    Args:
        sparse: a split of `dense`.
        dense: it is not changed.

    Returns:
        For every layer with a router, by name: new values for the parameters of its experts, by their names in
        `sparse`. A layer is left out where `dense` has no such FFN, or one that does not fit into its experts.
    """
    captured = capture(dense, sparse.info.args, own_inputs(dense, sparse.info.kwargs))
    graph_module = NormalizeLinearPass()(captured).graph_module
    found: dict[str, dict[str, Tensor]] = {}
    for match in match_ffn(graph_module)[0]:
        if match.name not in sparse.routers:
            continue
        ffn = fold_vectors(match, read_ffn(graph_module, match))[1]
        weights = _weights(_parameters(sparse, match.name), ffn)
        if weights is not None:
            found[match.name] = {f"{match.name}.{name}": weight for name, weight in weights.items()}
    return found


def with_weights(model: fx.GraphModule, weights: Mapping[str, Tensor]) -> fx.GraphModule:
    """A model with other values for some parameters; it shares the rest with `model`, which stays as it is."""
    changed = fx.GraphModule(model, copy.deepcopy(model.graph))
    for name, weight in weights.items():
        owner, _, parameter = name.rpartition(".")
        setattr(changed.get_submodule(owner), parameter, nn.Parameter(weight, requires_grad=False))
    return changed


def _parameters(sparse: SparseModel, name: str) -> dict[str, nn.Parameter]:
    children = dict(sparse.get_submodule(name).named_children())
    holders = {child: children[child] for child in ("experts", "shared") if child in children}
    return {f"{child}.{key}": value for child, holder in holders.items() for key, value in holder.named_parameters()}


def _weights(parameters: Mapping[str, nn.Parameter], ffn: DenseFFN) -> dict[str, Tensor] | None:
    """None where parameters do not fit: neurons were pruned, or have constants of their own."""
    num_experts, features, size = parameters["experts.down_proj"].shape
    shared = parameters["shared.down_proj"].shape[1] if "shared.down_proj" in parameters else 0
    spare = num_experts * size + shared - ffn.down.weight.shape[1]
    if spare < 0:
        return None

    def place(role: str, by_neuron: Tensor) -> dict[str, Tensor]:
        """`[F, ...]` to `[E, M, ...]`, and what is left to the shared expert."""
        routed, rest = torch.cat([by_neuron, by_neuron.new_zeros(spare, *by_neuron.shape[1:])]).split(
            [num_experts * size, shared]
        )
        return {f"experts.{role}": routed.unflatten(0, (num_experts, size)), f"shared.{role}": rest}

    down, zeros = place("down_proj", ffn.down.weight.t()), ffn.down.weight.new_zeros(num_experts, features)
    found = {name: weight.transpose(-1, -2) for name, weight in down.items()}
    found |= {"experts.down_proj_bias": zeros, "shared.down_proj_bias": zeros[0]}
    found["experts.bias"] = zeros[0] if ffn.down.bias is None else ffn.down.bias
    for linear in ffn.projections:
        bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
        found |= place(linear.role, linear.weight) | place(f"{linear.role}_bias", bias)
    lost = any(bool(found[name].any()) for name in found.keys() - parameters.keys())
    if lost or parameters.keys() - found.keys():
        return None
    return {name: found[name].to(parameter.dtype).contiguous() for name, parameter in parameters.items()}
