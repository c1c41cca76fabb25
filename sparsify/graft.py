"""Put the experts of a `SparseModel` back into the modules of the original model.

Code that was written for the original class goes on working: `generate()` with its cache, `save_pretrained()`, training
loops. The parameters are shared with the `SparseModel`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sparsify.errors import GraftError
from sparsify.passes.capture import evaluation_mode, same_random_numbers
from sparsify.passes.graph_values import fake_tensor, tensor_leaves
from sparsify.passes.module_calls import ModuleCalls, misfit, observe_calls, parameter_name
from sparsify.passes.module_cover import ModuleCover

if TYPE_CHECKING:
    from sparsify.sparse_model import SparseModel

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class GraftReport:
    """What `SparseModel.graft` did.

    Attributes:
        grafted: the modules that were replaced, by the name of the FFN. The first of them holds the experts.
        skipped: why an FFN was left dense in the original modules, by its name.
    """

    grafted: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        """One line for each FFN."""
        lines = [f"{name}: experts in {', '.join(modules)}" for name, modules in self.grafted.items()]
        return "\n".join([*lines, *(f"{name}: left dense: {reason}" for name, reason in self.skipped.items())])


def graft(sparse: SparseModel, model: nn.Module) -> GraftReport:
    """Replace the FFNs of `model` by the experts of `sparse`, in place.

    Args:
        sparse: converted from `model`, or from one with the same modules.
        model: changed in place.

    Returns:
        What was replaced, and why the rest was not.

    Raises:
        GraftError: `model` does not have the modules that `sparse` was converted from, or (checked where no FFN had to
            be skipped) gives other outputs with the experts than `sparse` does. It is unchanged then.
    """
    covers = sparse.info.covers
    missing = [path for cover in covers.values() for path in cover.modules if not _has_module(model, path)]
    if missing:
        raise GraftError(
            f"{type(model).__name__} has no module {missing[0]}: give the model that was converted, or one of the same "
            "class and configuration"
        )
    skipped = {name: reason for name in covers if (reason := _reads_ids(sparse, name))}
    if len(skipped) == len(covers):
        return GraftReport({}, skipped)
    calls, names = _observe(model, sparse), _all_names(model)
    replacements: dict[str, dict[str, nn.Module]] = {}
    for name, cover in covers.items():
        if name in skipped:
            continue
        reason = misfit(cover, calls) or _loses_groups(sparse, name, cover, calls)
        if reason:
            skipped[name] = reason
            continue
        experts = sparse.expert_module(name, parameter_name(cover, calls))
        first, *rest = [names[model.get_submodule(path)] for path in cover.modules]
        replacements[name] = {path: nn.Identity() for paths in rest for path in paths}
        replacements[name] |= dict.fromkeys(first, experts)
    skipped |= _replace_all(model, sparse, replacements)
    done = {name: covers[name].modules for name in replacements if name not in skipped}
    return GraftReport(done, skipped)


def _reads_ids(sparse: SparseModel, name: str) -> str | None:
    """Why the experts cannot run inside a module: it is given tokens alone."""
    router = sparse.routers.get(name)
    if router is None or not router.reads_ids:
        return None
    return f"its router ({router.system.name}) reads an integer of every token, which the module is not given"


def _loses_groups(sparse: SparseModel, name: str, cover: ModuleCover, calls: ModuleCalls) -> str | None:
    """Why tokens would compete in other groups inside the module than in the graph."""
    nodes = sparse.graph.find_nodes(op="call_module", target=f"{name}.router")
    if not nodes or not sparse.routers[name].reads_groups:
        return None
    (args, kwargs), _ = calls[cover.modules[0]]
    given, read = [*args, *kwargs.values()][0], fake_tensor(nodes[0].all_input_nodes[0])
    if len(given) > 2 or (read is not None and read.dim() == 2):
        return None
    return f"its tokens compete within an entry of the batch, and {cover.modules[0]} is given them in one row"


def _replace_all(
    model: nn.Module, sparse: SparseModel, replacements: dict[str, dict[str, nn.Module]]
) -> dict[str, str]:
    """Replace all at once where the model then runs, else one after the other; return what was undone, and why."""
    together = {path: module for modules in replacements.values() for path, module in modules.items()}
    before = _swap(model, together)
    if _error(model, sparse) is None:
        if len(replacements) == len(sparse.info.covers):
            _check_outputs(model, sparse, before)
        return {}
    _swap(model, before)
    failed: dict[str, str] = {}
    for name, modules in replacements.items():
        before = _swap(model, modules)
        error = _error(model, sparse)
        if error is not None:
            _swap(model, before)
            failed[name] = f"with experts in its place the model raises {error}"
    return failed


def _check_outputs(model: nn.Module, sparse: SparseModel, before: dict[str, nn.Module]) -> None:
    difference = _difference(model, sparse)
    if difference <= _TOLERANCE:
        return
    _swap(model, before)
    raise GraftError(
        f"{type(model).__name__} with the experts differs from the converted model by {difference:.1e} on the example "
        f"inputs (bound {_TOLERANCE:.0e}): its weights are not those that were converted, or its modules do something "
        "that evaluation mode does not show. Nothing was changed."
    )


@torch.no_grad()
def _difference(model: nn.Module, sparse: SparseModel) -> float:
    """Largest difference of the floating outputs, relative to the largest value of each."""
    args, kwargs = sparse.info.args, sparse.info.kwargs
    with evaluation_mode(model), evaluation_mode(sparse):
        outputs = [_outputs(module, args, kwargs) for module in (model, sparse)]
    worst = 0.0
    for a, b in zip(*outputs, strict=True):
        if a.is_floating_point() and a.numel():
            size = b.double().abs().max().clamp(min=1e-30)
            worst = max(worst, float((a.double() - b.double()).abs().max() / size))
    return worst


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with same_random_numbers():
        return tensor_leaves(module(*args, **kwargs))


@torch.no_grad()
def _error(model: nn.Module, sparse: SparseModel) -> str | None:
    try:
        with evaluation_mode(model):
            model(*sparse.info.args, **sparse.info.kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules into their places; return what was there."""
    before = {path: model.get_submodule(path) for path in modules}
    for path, module in modules.items():
        module.train(before[path].training)
        model.set_submodule(path, module)
    return before


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The paths of every module; there are several where modules are shared."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _observe(model: nn.Module, sparse: SparseModel) -> ModuleCalls:
    try:
        return observe_calls(model, sparse.info.args, sparse.info.kwargs, sparse.info.covers.values())
    except Exception as error:
        raise GraftError(
            f"{type(model).__name__} does not run on the example inputs of the conversion: "
            f"{type(error).__name__}: {error}"
        ) from error


def grafted_ffn(sparse: SparseModel, name: str, cover: ModuleCover, parameter: str = "x") -> GraphModule:
    """The experts of one FFN as a module of its own.

    Args:
        sparse: the converted model, whose experts, router and shared expert the module will use.
        name: of the FFN.
        cover: says where the features lie.
        parameter: name of the input.

    Returns:
        A module from `[..., D]` to `[..., D_out]` (features along `x_axis` and `down_axis`), for any leading sizes.
    """
    read, y = _ends(sparse.graph, name)
    router = sparse.routers.get(name)
    grouped = router is not None and router.reads_groups
    graph = Graph()
    x = graph.placeholder(parameter)
    tokens = x if cover.x_axis == -1 else graph.call_method("movedim", (x, cover.x_axis, -1))
    shape = graph.call_function(getattr, (tokens, "shape"))
    size = graph.call_function(operator.getitem, (shape, -1))
    copied = {read: tokens if grouped else graph.call_method("reshape", (tokens, -1, size))}
    for node in _needed(y, read):
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op in ("get_attr", "call_module"):
            copied[node].target = str(node.target).removeprefix(f"{name}.")
        copied[node].meta.clear()
    leading = graph.call_function(operator.getitem, (shape, slice(None, -1)))
    children = dict(sparse.get_submodule(name).named_children())
    size = sparse.get_parameter(f"{name}.{'experts' if 'router' in children else 'shared'}.down_proj").shape[-2]
    out = graph.call_method("reshape", (copied[y], graph.call_function(operator.add, (leading, (size,)))))
    graph.output(out if cover.down_axis == -1 else graph.call_method("movedim", (out, -1, cover.down_axis)))
    owner = nn.Module()
    for child, module in sparse.get_submodule(name).named_children():
        if child in ("experts", "router", "shared", "units"):
            owner.add_module(child, module)
    return GraphModule(owner, graph, "GraftedFFN")


def _ends(graph: Graph, name: str) -> tuple[Node, Node]:
    """The tokens that the router reads, `[T, D]` or in groups, and the output `[T, D_out]` before it is reshaped.

    Where nothing is routed, the tokens are those that the shared expert reads.
    """
    own = [node for node in graph.nodes if str(node.target).startswith(f"{name}.")]
    router = next((node for node in own if node.target == f"{name}.router"), None)
    if router is not None:
        read = router.all_input_nodes[0]
    else:
        weight = next(node for node in own if str(node.target).startswith(f"{name}.shared."))
        read = next(iter(weight.users)).all_input_nodes[0]
    node = next(iter(next(node for node in own if str(node.target).endswith(".down_proj")).users))
    while node.target is not torch.ops.aten.reshape.default:
        node = next(iter(node.users))
    return read, node.all_input_nodes[0]


def _needed(y: Node, read: Node) -> list[Node]:
    """What `y` is computed with from `read`, in graph order."""
    stack, seen = [y], {read}
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(seen - {read})
