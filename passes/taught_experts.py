"""A layer of small experts in training, whose router learns from their neurons what each choice was worth.

Where few of them run it is the op, and the neurons of all are computed for the tokens that teach. Else it is products
over all neurons, those of experts not chosen set to zero, and Autograd keeps them.
T tokens, D hidden_size, D_out output features, E num_experts, I neurons of one expert, F = E * I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.cpu.backward import kernel_pays, masking_pays
from sparsify.cpu.experts import Experts, project_all
from sparsify.kernels.reference import ACTIVATIONS
from sparsify.ops import moe_ffn
from sparsify.passes.split.choice_loss import choice_gains, squared_outputs


@dataclass(frozen=True)
class TaughtRun:
    """What such a layer computed, without gradients.

    Attributes:
        x: `[T, D]`, what it read.
        hidden: `[T, E, I]`, the neurons of all experts; None where only those that ran were computed.
        chosen: `[T, E]`, which of them ran, bool.
        experts: whose they are.
    """

    x: Tensor
    hidden: Tensor | None
    chosen: Tensor
    experts: Experts

    @torch.no_grad()
    def gains(self, error: Tensor, rows: Tensor) -> Tensor:
        """See `choice_gains`: `[n, E]` fp32 for n of the tokens and the error `[n, D_out]` that is left of them."""
        hidden = _all_hidden(self.x[rows], self.experts) if self.hidden is None else self.hidden[rows]
        # Neurons that were computed in bf16 are multiplied in it.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            return self._gains(error.float(), hidden.float(), self.chosen[rows]).float()

    def _gains(self, error: Tensor, hidden: Tensor, chosen: Tensor) -> Tensor:
        columns, bias = self.experts.down_proj.transpose(1, 2).float(), self.experts.down_bias  # [E, I, D_out]
        bias = None if bias is None else bias.float()
        inner = ((error @ columns.flatten(0, 1).t()).view_as(hidden) * hidden).sum(2)
        inner = inner if bias is None else inner + error @ bias.t()
        return choice_gains(inner, squared_outputs(hidden.transpose(0, 1), columns, bias).t(), chosen)


def run_taught(x: Tensor, expert_ids: Tensor, experts: Experts) -> tuple[Tensor, TaughtRun] | None:
    """The output `[T, D_out]` of a layer whose routing weights are all 1, differentiable in tokens and experts.

    Args:
        x: `[T, D]`.
        expert_ids: `[T, K]` int64, different ones for each token; -1 is a slot that is not used.
        experts: of the layer.

    Returns:
        None where the experts one after another are faster, and on other devices than a CPU.
    """
    skips = not torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and kernel_pays(x, expert_ids, experts)
    if not skips and (x.device.type != "cpu" or not masking_pays(x, expert_ids, experts)):
        return None
    by_expert = torch.zeros(len(x), len(experts.up_proj) + 1, dtype=torch.bool).scatter_(1, expert_ids + 1, value=True)
    chosen = by_expert[:, 1:]  # without the slots that are not used
    if skips:
        if any(part.requires_grad for part in experts[:6] if part is not None) and not x.requires_grad:
            x = x.detach().requires_grad_()  # the op then keeps no copy of weights, and bits are those of any call
        y = moe_ffn(x, x.new_ones(expert_ids.shape), expert_ids, *experts)
        return y, TaughtRun(x.detach(), None, chosen, experts)
    hidden = _all_hidden(x, experts)
    running = hidden.masked_fill(~chosen.unsqueeze(2), 0).flatten(1)
    y = running @ experts.down_proj.transpose(1, 2).flatten(0, 1)
    y = y if experts.down_bias is None else y + chosen.to(x.dtype) @ experts.down_bias
    return y, TaughtRun(x.detach(), hidden.detach(), chosen, experts)


def _all_hidden(x: Tensor, experts: Experts) -> Tensor:
    """`[T, E, I]`."""
    up = project_all(x, experts.up_proj, experts.up_bias)
    gate = None if experts.gate_proj is None else project_all(x, experts.gate_proj, experts.gate_bias)
    act = ACTIVATIONS[experts.activation]
    hidden = act(up) if gate is None else act(gate) * up
    return hidden.unflatten(1, experts.up_proj.shape[:2])
