"""`SparseModel`: a `GraphModule` with the inputs and outputs of the dense model and experts in place of its FFNs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparsify.routers import Router

if TYPE_CHECKING:
    from sparsify.report import Report

_META_KEY = "sparsify"


@dataclass(frozen=True)
class SparseModelInfo:
    """What a `SparseModel` knows beside its graph; it travels in `GraphModule.meta`, which copies of the model keep.

    Attributes:
        args: the example inputs, as they were given.
        kwargs: the example keyword inputs.
        num_shared_experts: per converted FFN, how many of its experts run for every token.
        report: what was done to every FFN, and why.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_shared_experts: dict[str, int]
    report: Report | None


class SparseModel(fx.GraphModule):
    """The converted model. Call it as the dense one: same arguments, same outputs (pytrees included).

    It was captured in evaluation mode, so dropout is inert in `train()` too. Weights that were not converted are shared
    with the model that was given to `sparsify`; take a `copy.deepcopy` first to train the two apart.
    """

    @property
    def info(self) -> SparseModelInfo:
        """Example inputs, shared experts and report."""
        return self.meta[_META_KEY]

    @info.setter
    def info(self, info: SparseModelInfo) -> None:
        self.meta[_META_KEY] = info

    @property
    def report(self) -> Report | None:
        """What was done to every FFN and why, its receipts and costs. None in a model loaded from a file."""
        return self.info.report

    @property
    def routers(self) -> dict[str, Router]:
        """The router of every converted FFN, by the name of the FFN."""
        found = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        return {name.removesuffix(".router"): router for name, router in found.items()}

    def set_top_k(self, top_k: int) -> None:
        """Run `top_k` experts a token in every converted FFN, shared experts included.

        With `top_k = num_experts` and no refit (`refit=False`) the model equals the dense one. The closed-form refit is
        made for the top_k of the conversion; another value then costs quality.

        Raises:
            ValueError: `top_k` leaves no routed expert, or exceeds the experts, of some FFN. Nothing is changed then.
        """
        for name, router in self.routers.items():
            shared = self.info.num_shared_experts[name]
            if not shared < top_k <= router.num_experts + shared:
                raise ValueError(
                    f"top_k must be between {shared + 1} and {router.num_experts + shared} for {name} "
                    f"({router.num_experts} routed and {shared} shared experts), got {top_k}"
                )
        for name, router in self.routers.items():
            router.top_k = top_k - self.info.num_shared_experts[name]

    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        """The input dimensions that may change between calls: input name -> dimension -> name of its size."""
        dims: dict[str, dict[int, str]] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                dims[node.name] = {i: str(n) for i, n in enumerate(value.shape) if isinstance(n, torch.SymInt)}
        return dims
