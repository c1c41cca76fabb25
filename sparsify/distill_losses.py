"""What light training compares (`sparsify/distillation.py`). T tokens, D hidden_size, R routed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from sparsify.passes.calibrate import Call, select_tokens
from sparsify.passes.graph_values import floating_leaves, tensor_leaves
from sparsify.passes.output_change import divergence, find_logits
from sparsify.passes.split.choice_loss import choice_gains, choice_loss, choose
from sparsify.passes.training_graph import RoutedFFN, TracingInterpreter, expert_outputs
from sparsify.routers import UnitRouter
from sparsify.sparse_model import SparseModel

_ROUTED_TOKENS = 128  # of a layer and step that teach its router: all its experts run for them
_ROUTED_ROWS = 1 << 13  # of these tokens and experts: fewer tokens where experts are many
_TAUGHT_SHARE = 4  # one of so many tokens teaches, where all small experts run for it in wide products

# Called as loss(outputs of the converted model, outputs of the dense one, batch); a scalar that has a gradient.
DistillLoss = Callable[[Any, Any, Any], Tensor]


def output_loss(reference: GraphModule, ours: Any, theirs: Any, mask: Tensor | None) -> Tensor:
    """Divergence of logits, in nats a token, and squared error of other outputs relative to their size; the sum, `[]`.

    Args:
        reference: the dense model.
        ours: what the graph of the converted model returns.
        theirs: what that of the dense one does.
        mask: which tokens are no padding.
    """
    loss = torch.zeros(())
    pairs = zip(floating_leaves(ours), floating_leaves(theirs), find_logits(reference), strict=True)
    for *pair, holds_logits in pairs:
        a, b = (select_tokens(tensor, mask).float() for tensor in pair)
        loss = loss + (divergence(b, a) if holds_logits else _relative(a, b))
    return loss


def own_loss(loss: DistillLoss, ours: Any, theirs: Any, batch: Any) -> Tensor:
    """Of a function that a user gave, on outputs as the models return them; `[]`.

    Raises:
        ValueError: it returns no scalar, or one without the gradient that the outputs have.
    """
    value = loss(ours, theirs, batch)
    _require_scalar(value)
    # Outputs have none where routers alone are trained, or every block by itself.
    if not value.requires_grad and any(tensor.requires_grad for tensor in tensor_leaves(ours)):
        raise ValueError(
            "loss returned a tensor without a gradient; compute it from the outputs of the converted model, its first "
            "argument, without detach() or no_grad()"
        )
    return value.reshape(())


def _require_scalar(value: object) -> None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return
    seen = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"loss must return a scalar tensor, got {seen}; take its mean")


def layer_losses(
    sparse: SparseModel, ffn: RoutedFFN, student: TracingInterpreter, wanted: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Of one layer after both models ran on a batch.

    Args:
        sparse: the converted model.
        ffn: one of its layers.
        student: what kept its values; of a run with gradients.
        wanted: the hidden state behind the layer in the dense model.
        call: the batch.

    Returns:
        Mean squared error of the hidden state relative to its size, and what the router has to learn; `[]` both.
    """
    axis = sparse.info.covers[ffn.name].down_axis
    pair = (student.kept[ffn.hidden.name], wanted)
    ours, theirs = (select_tokens(hidden.movedim(axis, -1), call.mask).float() for hidden in pair)
    weight = 1 / theirs.var(1, correction=0).clamp(min=1e-12) / theirs.shape[1]
    error = theirs - ours  # [T, D_out]
    loss = (weight * error.square().sum(1)).mean()
    router = sparse.get_submodule(f"{ffn.name}.router")
    if not isinstance(router, UnitRouter) or router.top_k == router.num_experts:
        return loss, loss.new_zeros(())
    return loss, _lesson(ffn, router, student, (error.detach(), weight), call.mask)


def _lesson(
    ffn: RoutedFFN,
    router: UnitRouter,
    student: TracingInterpreter,
    weighted_error: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """The `choice_loss` of some of the tokens; 0 where the layer sees others than there are errors of."""
    error, weight = weighted_error  # [T, D_out], [T]
    x = student.kept[ffn.router_call.all_input_nodes[0].name].detach()
    places = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    places, x = select_tokens(places, mask).flatten(), x.flatten(0, -2)
    if len(places) != len(error) or not len(error):
        return error.new_zeros(())
    run = student.taught.get(ffn.mixed.name)
    if run is not None and run.chosen.shape[1] != router.num_experts:
        run = None  # experts of several widths run as units
    few = min(_ROUTED_TOKENS, _ROUTED_ROWS // router.num_experts)
    taught = max(1, few if run is None else len(error) // _TAUGHT_SHARE)
    rows = torch.arange(0, len(error), -(-len(error) // taught), device=x.device)
    error, weight, places = error[rows], weight[rows], places[rows]
    logits = router.logits(x[places]).float()
    gains = _gains_of_outputs(ffn, router, x[places], error, logits) if run is None else run.gains(error, places)
    return (weight * choice_loss(logits, gains, router.top_k)).mean()


def _gains_of_outputs(ffn: RoutedFFN, router: UnitRouter, x: Tensor, error: Tensor, logits: Tensor) -> Tensor:
    """From what every expert adds for every token `[T, D]`."""
    added = expert_outputs(ffn, x, router.num_experts).float()  # [T, R, D_out]
    chosen = choose(logits.detach(), router.top_k)
    return choice_gains((added @ error.unsqueeze(2)).squeeze(2), added.square().sum(2), chosen)


def _relative(ours: Tensor, wanted: Tensor) -> Tensor:
    """Squared error relative to the size, over all positions that count."""
    return functional.mse_loss(ours, wanted) / wanted.square().mean().clamp(min=1e-12)
