"""`SparseModel` with label routing -> the same for one label: its experts alone, and no label input.

Graph and modules are new, tensors are shared but for the experts that were taken out of their bank.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Graph
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree

from sparsify.expert_units import ExpertUnits
from sparsify.passes.find_layers import DISPATCH
from sparsify.routers import LabelRouter

if TYPE_CHECKING:
    from sparsify.sparse_model import SparseModel


def specialise(sparse: SparseModel, label: int) -> SparseModel:
    """Keep one label.

    Args:
        sparse: left as it is.
        label: of all FFNs that are routed by label.

    Raises:
        ValueError: no FFN is, or the label is outside a table.
    """
    routers = {name: router for name, router in sparse.routers.items() if isinstance(router, LabelRouter)}
    if not routers:
        raise ValueError("no router of this model goes by labels, so it cannot be specialised to one")
    for router in routers.values():
        router.check_ids(torch.tensor([label]))
    from sparsify.sparse_model import SparseModel  # which imports routers that import nothing of the compiler

    made = SparseModel(sparse, copy.deepcopy(sparse.graph))
    made.info = sparse.info
    for name, router in routers.items():
        new, kept = router.specialised(label)
        new.weights = router.weights
        old = next(router.parameters(), None)
        made.set_submodule(f"{name}.router", new if old is None else new.to(old.device))
        rewire(made.graph, f"{name}.router", keep_experts(made, name, kept, router.num_experts))
    made.graph.eliminate_dead_code()
    unread = {node.name for node in made.graph.find_nodes(op="placeholder") if not node.users}
    unread -= {node.name for node in sparse.graph.find_nodes(op="placeholder") if not node.users}
    _drop_keywords(made, unread)
    made.recompile()
    return made.train(sparse.training)


def keep_experts(made: SparseModel, name: str, kept: list[int], num_experts: int) -> int:
    """Leave the experts `kept` of `num_experts` in the modules of the FFN `name`.

    Returns:
        The number of units that are left; of experts, where each is one.
    """
    if kept == list(range(num_experts)):
        return len(made.get_parameter(f"{name}.experts.down_proj"))
    units = dict(made.get_submodule(name).named_children()).get("units")
    if isinstance(units, ExpertUnits):
        fewer = ExpertUnits([units.sizes[expert] for expert in kept]).to(units.table.device)
        made.set_submodule(f"{name}.units", fewer)
        kept, num_experts = units.of(kept), units.num_units
    experts = made.get_submodule(f"{name}.experts")
    for key, parameter in list(experts.named_parameters(recurse=False)):
        if key != "bias" and parameter.dim() > 1 and len(parameter) == num_experts:
            chosen = parameter.detach()[torch.tensor(kept, device=parameter.device)].clone()
            setattr(experts, key, nn.Parameter(chosen, requires_grad=parameter.requires_grad))
    return len(kept)


def rewire(graph: Graph, router: str, num_units: int) -> None:
    """The router reads tokens alone; dispatch counts the experts, or units of experts, that are left."""
    for node in graph.find_nodes(op="call_module", target=router):
        node.args = node.args[:1]
        readers = {user for got in node.users for user in got.users}
        readers |= {user for units in readers if units.op == "call_module" for got in units.users for user in got.users}
        for dispatch in readers:
            if dispatch.target is DISPATCH:
                dispatch.args = (*dispatch.args[:2], num_units)


def _drop_keywords(made: SparseModel, names: set[str]) -> None:
    """Take keyword inputs out of the graph, the signature and the example."""
    codegen = made.graph._codegen  # pyright: ignore[reportPrivateUsage]
    kwargs = {name: value for name, value in made.info.kwargs.items() if name not in names}
    if not isinstance(codegen, _PyTreeCodeGen) or len(kwargs) == len(made.info.kwargs):
        return
    info = codegen.pytree_info
    _, spec = pytree.tree_flatten((made.info.args, kwargs))
    arguments = [name for name in info.orig_args if name not in names]
    made.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, spec, info.out_spec)))
    for node in made.graph.find_nodes(op="placeholder"):
        if node.name in names:
            made.graph.erase_node(node)
    made.info = replace(made.info, kwargs=kwargs)
