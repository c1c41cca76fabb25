"""What helps to train a `SparseModel`: all but its routers frozen; gradients of experts scaled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.routers import Router, UnitRouter

_COMMON = "bias"  # of the FFN's output, added once and not by an expert


def freeze_all_but_routers(sparse: nn.Module) -> None:
    """Leave `requires_grad` to the parameters of routers alone.

    Raises:
        ValueError: there is nothing left to train. Nothing is changed then.
    """
    routers = [module for module in sparse.modules() if isinstance(module, Router)]
    trained = [p for router in routers if not isinstance(router, UnitRouter) for p in router.parameters()]
    if not trained:
        names = ", ".join(sorted({router.system.name for router in routers}))
        raise ValueError(
            f"no router ({names or 'the model has none'}) has weights that a gradient reaches; convert with another "
            "one (`sparsify routers`)"
        )
    sparse.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def scale_expert_gradients(sparse: nn.Module, factor: float | None = None) -> list[RemovableHandle]:
    """Register a hook on every parameter of a routed expert; see `SparseModel.scale_expert_gradients`."""
    return [
        parameter.register_hook(_times(num_experts**-0.5 if factor is None else factor))
        for num_experts, parameter in _expert_parameters(sparse)
    ]


def _expert_parameters(sparse: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """With the number of routed experts of the FFN; frozen ones left out."""
    for owner in list(sparse.modules()):
        children = dict(owner.named_children())
        router, experts = children.get("router"), children.get("experts")
        if not isinstance(router, Router) or experts is None:
            continue
        for name, parameter in experts.named_parameters():
            if name != _COMMON and parameter.requires_grad:
                yield router.num_experts, parameter


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor
