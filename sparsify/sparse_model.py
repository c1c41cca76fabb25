"""`SparseModel`: a `GraphModule` with the inputs and outputs of the dense model and experts in place of its FFNs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils.hooks import RemovableHandle

from sparsify.routers import PolicyRouter, Router

if TYPE_CHECKING:
    from sparsify.graft import GraftReport
    from sparsify.passes.module_cover import ModuleCover
    from sparsify.report import Report
    from sparsify.routing_stats import RoutingStats

SIZES_KEY = "sparsify_sizes"
_META_KEY = "sparsify"


@dataclass(frozen=True)
class SparseModelInfo:
    """What a `SparseModel` knows beside its graph; it travels in `GraphModule.meta`, which copies of the model keep.

    Attributes:
        args: the example inputs, as they were given.
        kwargs: the example keyword inputs.
        num_shared_experts: per converted FFN, how many of its experts run for every token.
        report: what was done to every FFN, and why.
        covers: per converted FFN, the modules of the original model that it can be grafted into.
        shards: per FFN that was copied and not divided, into how many shards each copy was cut.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_shared_experts: dict[str, int]
    report: Report | None
    covers: Mapping[str, ModuleCover] = field(default_factory=lambda: {})
    shards: Mapping[str, int] = field(default_factory=lambda: {})


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
    def report(self) -> Report:
        """What was done to every FFN and why, its receipts and costs.

        Raises:
            LookupError: the model was loaded from a file, which does not hold its report.
        """
        if self.info.report is None:
            raise LookupError("a loaded model has no report; `sparsify convert` writes it to report.json beside it")
        return self.info.report

    @property
    def routers(self) -> dict[str, Router]:
        """The router of every converted FFN, by the name of the FFN."""
        found = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        return {name.removesuffix(".router"): router for name, router in found.items()}

    def aux_loss(self) -> Tensor:
        """What the routers ask of training beside the loss of the task: add it to that loss, after every forward call.

        The sum over all routers of their losses (balance, z-loss, ...) in the last call in training mode, each times
        its coefficient; `routers[name].losses` holds them one by one. Its gradient reaches the routers.

        Returns:
            A scalar; 0 where no router has a loss.
        """
        losses = [router.aux_loss() for router in self.routers.values()]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else torch.zeros(())

    def give_reward(self, reward: Tensor) -> None:
        """Tell routers that learn by reward how well the last call in training mode went, before `aux_loss()`.

        Args:
            reward: one number, or one for every sequence or token; larger is better. RL-R takes minus the
                cross-entropy.

        Raises:
            LookupError: no router of the model learns by reward.
            RuntimeError: there was no call in training mode since the last reward.
        """
        learning = [router for router in self.routers.values() if isinstance(router, PolicyRouter)]
        if not learning:
            raise LookupError("no router of this model learns by reward; `sparsify routers` lists which ones need one")
        for router in learning:
            router.give_reward(reward)

    def specialise(self, label: int) -> SparseModel:
        """The model for one label (a task, domain or language): without the label input and all other experts.

        Other weights are shared with this model.

        Raises:
            ValueError: no router goes by labels, or the label is outside its table.
        """
        from sparsify.passes.specialise import specialise

        return specialise(self, label)

    def after_step(self, *_: object) -> None:
        """Let every router adapt what no gradient moves: biases that balance the load, schedules.

        Call it after every step of the optimiser, once, or have torch do so:
        `optimizer.register_step_post_hook(sparse.after_step)`. Routers that need it say so (`sparsify routers`).
        """
        for router in self.routers.values():
            router.after_step()

    def set_top_k(self, top_k: int) -> None:
        """Run `top_k` experts a token in every converted FFN, shared experts included.

        With `top_k = num_experts` and no refit (`refit=False`) the model equals the dense one. The closed-form refit is
        made for the top_k of the conversion; another value then costs quality.

        Raises:
            ValueError: `top_k` leaves no routed expert, or exceeds the experts, of some FFN, or its router cannot
                choose so many. Nothing is changed then.
        """
        for name, router in self.routers.items():
            shared = self.info.num_shared_experts[name]
            if not shared < top_k <= router.num_experts + shared:
                raise ValueError(
                    f"top_k must be between {shared + 1} and {router.num_experts + shared} for {name} "
                    f"({router.num_experts} routed and {shared} shared experts), got {top_k}"
                )
            router.check_top_k(top_k - shared)
        for name, router in self.routers.items():
            router.top_k = top_k - self.info.num_shared_experts[name]

    @property
    def batch_invariant(self) -> bool:
        """No route of a token depends on another token: alone it gets the experts that it has in any batch."""
        return all(router.batch_invariant for router in self.routers.values())

    def routing_stats(self, batches: Iterable[object]) -> RoutingStats:
        """Where the tokens of `batches` go: loads, tokens without an expert, experts that work together.

        Args:
            batches: as `calibration` of `sparsify`: `(args, kwargs)`, tuples, dicts or tensors.

        Returns:
            Numbers for every converted FFN; prints as a table, and `.plot(path)` draws it.
        """
        from sparsify.routing_stats import routing_stats

        return routing_stats(self, batches)

    def freeze_all_but_routers(self) -> None:
        """Let training change the routers alone: no other parameter keeps `requires_grad`.

        Raises:
            ValueError: no router has weights that a gradient reaches. Nothing is changed then.
        """
        from sparsify.training import freeze_all_but_routers

        freeze_all_but_routers(self)

    def scale_expert_gradients(self, factor: float | None = None) -> list[RemovableHandle]:
        """Multiply every gradient of the routed experts, from now on; router and shared experts keep theirs.

        Args:
            factor: None: `1 / sqrt(E)` in each FFN, E its routed experts, as an expert sees E times fewer tokens than
                the rest of the model (Artetxe et al. 2021, arXiv 2112.10684).

        Returns:
            Handles; `remove()` of each ends it.
        """
        from sparsify.training import scale_expert_gradients

        return scale_expert_gradients(self, factor)

    def prune(self, keep: int, stats: RoutingStats) -> SparseModel:
        """This model with the `keep` most used routed experts of every FFN alone; see `routing_stats`.

        Tokens whose experts are all kept have the same routes as before. Other weights are shared with this model.

        Raises:
            ValueError: `keep` does not fit, or an FFN cannot do without some of its experts, as in a split.
        """
        from sparsify.passes.prune_experts import prune_experts

        return prune_experts(self, keep, stats)

    def to_dense(self) -> fx.GraphModule:
        """A dense model with the inputs and outputs of this one: the routed experts of every FFN become one FFN again.

        A split gives the dense model back that `set_top_k(num_experts)` computes, which is the original one with
        `refit=False`. Copies are averaged: exact until they are trained, and a loss of quality afterwards that
        you have to measure. What is not an expert is shared with this model.

        Raises:
            ValueError: experts run on mixtures of tokens (Soft MoE), or are merged for each sequence (SMEAR, Lory).
        """
        from sparsify.passes.merge_experts import merge_experts

        return merge_experts(self, self.info.shards, self.info.args, self.info.kwargs)

    def graft(self, model: nn.Module) -> GraftReport:
        """Put the experts into the modules of the original model, in place: code written for it goes on working.

        `generate()`, `save_pretrained()`, training loops and DDP then use the experts. Parameters are shared with this
        model. The names in the state dict are those of the modules: `<module>.experts.up_proj`, `<module>.router...`.

        Args:
            model: the one that was converted, or one of the same class and configuration.

        Returns:
            The modules that were replaced, and why others were not.

        Raises:
            GraftError: `model` is not the one that was converted. It is unchanged then.
        """
        from sparsify.graft import graft

        return graft(self, model)

    def expert_module(self, name: str, parameter: str = "x") -> fx.GraphModule:
        """The experts of one converted FFN, with their router, as a module that shares their weights.

        Args:
            name: of the FFN.
            parameter: what callers are to call its input.

        Returns:
            A module from `[..., D]` to `[..., D_out]`, the features where the original modules have them.
        """
        from sparsify.graft import grafted_ffn

        return grafted_ffn(self, name, self.info.covers[name], parameter)

    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        """The input dimensions that may change between calls: input name -> dimension -> name of its size."""
        found = {node.name: input_sizes(node) for node in self.graph.find_nodes(op="placeholder")}
        return {
            name: {i: size for i, size in enumerate(sizes) if isinstance(size, str)}
            for name, sizes in found.items()
            if sizes is not None
        }

    def save(self, path: str | Path) -> None:
        """Write the model to the folder `path`: `graph.json` and `model.safetensors`. The report is not written.

        Raises:
            OutputError: the folder cannot be written, or the model holds what the format has no words for.
        """
        from sparsify.serialize import save_model

        save_model(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> SparseModel:
        """Read a model from the folder that `save` wrote. Nothing that the files hold is executed or unpickled.

        Raises:
            LoadError: the folder holds no saved model, or one that is damaged or from a newer version.
        """
        from sparsify.serialize import load_model

        return load_model(Path(path))


def input_sizes(node: fx.Node) -> tuple[int | str, ...] | None:
    """The sizes of a tensor input, a name for each that may change between calls; None for an input of another kind.

    A traced graph has them in the fake tensor of the trace, a loaded one has the sizes alone.
    """
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(int(size) if is_concrete_int(size) else str(size) for size in value.shape)
    return node.meta.get(SIZES_KEY)
