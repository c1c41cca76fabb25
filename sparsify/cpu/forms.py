"""The layer in plain torch ops, in five forms with the same result; which is fastest depends on the tokens per expert.

| form | when it pays | copies of the weights |
| --- | --- | --- |
| `token_loop` | a token or two: only the chosen experts are read | none |
| `padded_bmm` | few tokens, many threads | none |
| `dense_masked` | few tokens or narrow experts: nearly all are read anyway, in two large products | all, packed |
| `sorted_linears` | many tokens | none |
| `sorted_packed` | many tokens | all, packed |

They serve where `sparsify.cpu.kernel` cannot, or is slower. It has three more: `fused`, with the weights as they are,
`fused_blocks`, with a copy of them in blocks (`sparsify/cpu/blocks.py`), and `fused_new_blocks`, with a copy for this
call, as weights that are being trained need.
T tokens, D hidden_size, D_out output features, E num_experts, K top_k, I neurons of one expert, n pairs of a token and
a slot that is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsify.cpu import packed
from sparsify.cpu.experts import Experts, pick
from sparsify.kernels.pairs import sort_pairs

_MANY = 512  # tokens: packing gains nothing then in fp32, and oneDNN keeps memory for every number of rows it has seen

Form = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def token_loop(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor:
    """Every pair by itself."""
    y = x.new_zeros((x.shape[0], experts.down_proj.shape[1]), dtype=torch.float32)
    weights = routing_weights.float()
    for t, ids in enumerate(expert_ids.tolist()):
        row = x[t : t + 1]
        for k, e in ((k, e) for k, e in enumerate(ids) if e >= 0):
            out = functional.linear(experts.hidden(e, row), experts.down_proj[e], pick(experts.down_bias, e))
            y[t].addcmul_(out[0].float(), weights[t, k])
    return y.to(x.dtype)


def sorted_linears(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor:
    """The rows of one expert after another, with the weights as they are."""

    def run(e: int, rows: Tensor) -> Tensor:
        return functional.linear(experts.hidden(e, rows), experts.down_proj[e], pick(experts.down_bias, e))

    return _by_expert(x, routing_weights, expert_ids, experts, run)


def sorted_packed(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor:
    """The rows of one expert after another, with packed weights."""

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, e: int) -> Tensor:
        part = weight[e]
        made = packed.cached(part, "linear", lambda: packed.pack(part, part.shape, 64))
        return packed.apply(rows, made, pick(bias, e))

    def run(e: int, rows: Tensor) -> Tensor:
        gate = None if experts.gate_proj is None else linear(rows, experts.gate_proj, experts.gate_bias, e)
        hidden = experts.activate(linear(rows, experts.up_proj, experts.up_bias, e), gate)
        return linear(hidden, experts.down_proj, experts.down_bias, e)

    return _by_expert(x, routing_weights, expert_ids, experts, run)


def padded_bmm(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor:
    """All experts in one batched product, each padded to the rows of the fullest."""
    num_experts, num_slots = len(experts.up_proj), expert_ids.numel()
    pairs = sort_pairs(expert_ids, num_experts)
    counts = torch.tensor(pairs.counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)  # [n]
    expert = torch.repeat_interleave(torch.arange(num_experts), counts)  # [n]
    width = max(*pairs.counts, 1)
    place = expert * width + torch.arange(len(first)) - first  # [n], row in [E * width]
    rows = x.new_zeros((num_experts * width, x.shape[1])).index_copy_(0, place, x.index_select(0, pairs.tokens))
    rows = rows.view(num_experts, width, -1)

    def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.bmm(inputs, weight.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))

    gate = None if experts.gate_proj is None else product(rows, experts.gate_proj, experts.gate_bias)
    hidden = experts.activate(product(rows, experts.up_proj, experts.up_bias), gate)
    out = product(hidden, experts.down_proj, experts.down_bias).flatten(0, 1).index_select(0, place)
    return _combine(x, routing_weights, out, pairs.pairs, num_slots, pairs.unused)


def dense_masked(x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts) -> Tensor:
    """The dense layer, mostly on packed weights, hidden values times the routing weight of their expert or 0."""
    num_experts, width, hidden_size = experts.up_proj.shape
    used = expert_ids >= 0
    mask = x.new_zeros((len(x), num_experts), dtype=torch.float32)
    mask.scatter_add_(1, expert_ids.clamp(min=0), routing_weights.float() * used)  # [T, E]

    def into_hidden(weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = torch.Size((num_experts * width, hidden_size))
        return _dense_product(x, weight, weight, flat, None if bias is None else bias.reshape(-1))

    gate = None if experts.gate_proj is None else into_hidden(experts.gate_proj, experts.gate_bias)
    hidden = experts.activate(into_hidden(experts.up_proj, experts.up_bias), gate)
    hidden = (hidden.view(len(x), num_experts, width) * mask.unsqueeze(-1)).to(x.dtype).flatten(1)
    down = experts.down_proj
    flat = torch.Size((down.shape[1], num_experts * width))
    out = _dense_product(hidden, down, down.transpose(0, 1), flat, None)
    if experts.down_bias is None:
        return out
    return (out.float() + mask @ experts.down_bias.float()).to(x.dtype)


def _dense_product(x: Tensor, weight: Tensor, view: Tensor, flat: torch.Size, bias: Tensor | None) -> Tensor:
    """`[T, D]` by a `view` of `weight`, made `flat` `[N, D]`."""
    if x.dtype == torch.float32 and len(x) >= _MANY:
        return functional.linear(x, view.reshape(flat), bias)
    return packed.apply(x, packed.cached(weight, "dense", lambda: packed.pack(view, flat, 8)), bias)


FORMS: Mapping[str, Form] = {
    "token_loop": token_loop,
    "padded_bmm": padded_bmm,
    "dense_masked": dense_masked,
    "sorted_linears": sorted_linears,
    "sorted_packed": sorted_packed,
}
# Those that keep a packed copy of the weights, and how much faster they must be to be worth its memory.
PACKING: Mapping[str, float] = {"dense_masked": 1.25, "sorted_packed": 1.25, "fused_blocks": 1.1}


def _by_expert(
    x: Tensor, routing_weights: Tensor, expert_ids: Tensor, experts: Experts, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Give every expert its rows and bring the results back; `run` maps an expert and `[m, D]` to `[m, D_out]`."""
    pairs = sort_pairs(expert_ids, len(experts.up_proj))
    if not len(pairs.pairs):
        return x.new_zeros((len(x), experts.down_proj.shape[1]))
    rows = x.index_select(0, pairs.tokens).split(pairs.counts)
    out = torch.cat([run(e, rows[e]) for e, count in enumerate(pairs.counts) if count])
    return _combine(x, routing_weights, out, pairs.pairs, expert_ids.numel(), pairs.unused)


def _combine(x: Tensor, routing_weights: Tensor, out: Tensor, pairs: Tensor, num_slots: int, unused: int) -> Tensor:
    """`out` `[n, D_out]` in the order of `pairs`, to `[T, D_out]`: each token's rows weighted and summed in fp32."""
    by_slot = out.new_empty((num_slots, out.shape[1]), dtype=torch.float32)
    if unused:
        by_slot.zero_()
    by_slot.index_copy_(0, pairs, out.float())
    by_slot = by_slot.view(*routing_weights.shape, -1).mul_(routing_weights.float().unsqueeze(-1))
    return by_slot.sum(1).to(x.dtype)
