"""Train the experts and the router of one FFN together towards the output that is wanted: some steps, no labels.

The weights follow the squared error. The router cannot, as chosen ids pass no gradient; it learns what each choice was
worth (`choice_loss`). Where nothing is routed there is none. Tokens are weighted (`Sample`).

T tokens, D hidden_size, F neurons of all experts, S of them shared, R routed experts, K that run, U units of m neurons
(one an expert, if all are of one width).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.passes.on_disk import take_rows
from sparsify.passes.split.bf16_products import has_bf16_products
from sparsify.passes.split.choice_loss import choice_gains, choice_loss, squared_outputs
from sparsify.passes.split.dense_ffn import Linear
from sparsify.passes.split.experts import Experts
from sparsify.passes.split.learning_rate import share_of_rate
from sparsify.passes.split.run_chosen import RunChosen, run_chosen
from sparsify.passes.split.statistics import chunks
from sparsify.routers import UnitRouter

_SMALLEST_BATCH, _LARGEST_BATCH = 256, 512
_BETAS = (0.8, 0.95)  # of Adam: few steps
_AHEAD = 4  # steps
_PASSES = 5  # over the tokens: as far as that larger batches help
_MOST_PASSES = 8  # more would learn them by heart
_EXPERT_LEARNING_RATE = 2e-3
_ROUTER_LEARNING_RATE = 3e-3
_SMALLEST_BF16 = 1 << 17  # weights of down_proj


def distill_block(
    experts: Experts, router: UnitRouter | None, x: Tensor, target: Tensor, weight: Tensor, *, steps: int, seed: int
) -> tuple[Experts, UnitRouter | None]:
    """Train copies of `experts` and `router` with Adam and a falling learning rate.

    Args:
        experts: the split.
        router: `logits` are differentiable in its parameters; its K stays. None where there are only shared experts.
        x: `[T, D]`, T > 0.
        target: `[T, D_out]`, the output that is wanted for each token.
        weight: `[T]`, of each token in the error.
        steps: of 256 tokens, or up to 512 where they pass over the tokens no more than five times; fewer are made
            where they would pass over them more than eight times.
        seed: of the order of the tokens.

    Returns:
        The trained experts and router. Same inputs, same result.
    """
    batch = min(max(_SMALLEST_BATCH, min(_LARGEST_BATCH, _PASSES * len(x) // max(steps, 1))), len(x))
    steps = min(steps, max(1, _MOST_PASSES * len(x) // batch))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.cat([part.square().sum(1) for part in chunks(target)])
    scale = 1 / (weight * sizes).mean().clamp(min=torch.finfo(x.dtype).tiny)
    block = _Block(experts, router, x)
    groups = [
        {"params": block.own_parameters(), "rate": _EXPERT_LEARNING_RATE},
        {"params": block.router_parameters(), "rate": _ROUTER_LEARNING_RATE},
    ]
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)
    drawn = (torch.randint(len(x), (batch,), generator=generator) for _ in range(steps))
    for step, (tokens, wanted, weights) in enumerate(_read_ahead(drawn, x, target, weight)):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share_of_rate(step, steps)
        with torch.enable_grad():
            loss = (weights * block(tokens, wanted)).mean() * scale
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return block.result()


def _read_ahead(drawn: Iterator[Tensor], *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of each step in `columns`; from files, those of several steps at a time."""
    while rows := list(itertools.islice(drawn, _AHEAD)):
        taken = [take_rows(column, torch.cat(rows)).split([len(own) for own in rows]) for column in columns]
        yield from zip(*taken, strict=True)


def _bf16_is_faster(x: Tensor, down: Tensor) -> bool:
    """Products of bf16 where they outweigh the casts.

    The weights that are trained stay in fp32, and the errors of layers are the same to three digits.
    """
    return down.numel() >= _SMALLEST_BF16 and has_bf16_products(x.device, x.dtype)


class _Block(nn.Module):
    """The experts as one wide FFN, shared neurons first; routed ones that do not run are masked, or left out."""

    def __init__(self, experts: Experts, router: UnitRouter | None, x: Tensor) -> None:
        super().__init__()
        self._experts = experts
        self.router = None if router is None else copy.deepcopy(router).requires_grad_(True)
        self.num_units, outputs, self.size = experts.down.shape
        self.owners, self.groups = experts.owners, experts.of_one_width()
        shared = experts.shared
        ups = [weight.flatten(0, 1) for weight in experts.projections]
        biases = [None if bias is None else bias.flatten() for bias in experts.projection_biases]
        vectors = [vector.flatten() if vector.dim() == 2 else vector for vector in experts.vectors]
        down = experts.down.transpose(1, 2).flatten(0, 1)
        if shared is not None:
            ups = [torch.cat([linear.weight, up]) for linear, up in zip(shared.projections, ups, strict=True)]
            biases = [_cat(linear.bias, bias) for linear, bias in zip(shared.projections, biases, strict=True)]
            vectors = [torch.cat([a, b]) if b.dim() else b for a, b in zip(shared.vectors, vectors, strict=True)]
            down = torch.cat([shared.down.weight.t(), down])
        self.ups = nn.ParameterList(nn.Parameter(up.clone()) for up in ups)
        self.biases = [None if bias is None else nn.Parameter(bias.clone()) for bias in biases]
        self.vectors = vectors
        self.down = nn.Parameter(down.clone())  # [F, D_out]
        self.num_shared = len(down) - self.num_units * self.size
        nothing = down.new_zeros(self.num_units, outputs)
        bias = nothing if experts.expert_bias is None else experts.expert_bias
        self.expert_bias = nn.Parameter(experts.to_experts(bias))  # [R, D_out]
        self.bias = nn.Parameter(down.new_zeros(outputs) if experts.bias is None else experts.bias.clone())
        self._run: RunChosen | None = None
        if router is not None and self.num_shared % self.size == 0 and not _bf16_is_faster(x, self.down):
            shared_units = self.num_shared // self.size
            self._run = run_chosen(experts, x, shared_units + router.top_k, shared_units + self.num_units)

    def own_parameters(self) -> list[nn.Parameter]:
        """All but those of the router."""
        biases = [bias for bias in self.biases if bias is not None]
        return [*self.ups, *biases, self.down, self.expert_bias, self.bias]

    def router_parameters(self) -> list[nn.Parameter]:
        """Those of the router, if there is one."""
        return [] if self.router is None else list(self.router.parameters())

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """`[T]`: squared error of each token, and what its routing has to learn."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_bf16_is_faster(x, self.down)):
            if self.router is None:
                return (target - torch.addmm(self.bias, self._hidden(x), self.down)).square().sum(1)
            return self._routed_error(self.router, x, target)

    def _hidden(self, x: Tensor, first: int = 0) -> Tensor:
        """`[T, F]`, or the neurons from `first` on."""
        biases = [None if bias is None else bias[first:] for bias in self.biases]
        projected = [functional.linear(x, up[first:], bias) for up, bias in zip(self.ups, biases, strict=True)]
        vectors = [vector[first:] if vector.dim() else vector for vector in self.vectors]
        return self._experts.activation(*projected, *vectors)

    def _routed_error(self, router: UnitRouter, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # bf16 would make ties
            logits = router.logits(x)
        ids = logits.detach().topk(router.top_k, dim=1, sorted=False).indices
        chosen, taught = torch.zeros_like(logits).scatter_(1, ids, 1.0), -(-len(x) // 4)
        y, routed = self._masked(x, chosen, taught) if self._run is None else self._skipping(self._run, x, ids, taught)
        error = target - y - chosen @ self.expert_bias
        gains = self._gains(routed, error.detach()[:taught], chosen[:taught])
        lesson = choice_loss(logits[:taught], gains, router.top_k) * (len(x) / taught)
        return error.square().sum(1) + functional.pad(lesson, (0, len(x) - taught))

    def _masked(self, x: Tensor, chosen: Tensor, taught: int) -> tuple[Tensor, Tensor]:
        """The output `[T, D_out]`, and of the first tokens the routed neurons `[taught, U * m]`, for their gains.

        Gains cost as much as half a forward pass, and routers are small, so they learn from a part of the tokens.
        """
        hidden = self._hidden(x)
        by_unit = chosen.to(hidden.dtype)[:, self.owners].repeat_interleave(self.size, dim=1)
        runs = functional.pad(by_unit, (self.num_shared, 0), value=1.0)  # [T, F]
        return torch.addmm(self.bias, hidden * runs, self.down), hidden.detach()[:taught, self.num_shared :]

    def _skipping(self, run: RunChosen, x: Tensor, ids: Tensor, taught: int) -> tuple[Tensor, Tensor]:
        """The same without the neurons that do not run; shared ones are units that every token chose."""
        of_unit = (-1, self.size)
        shared = self.num_shared // self.size
        ids = torch.cat([torch.arange(shared).expand(len(x), -1), ids + shared], dim=1)
        ups = [up.unflatten(0, of_unit) for up in self.ups]
        biases = [None if bias is None else bias.unflatten(0, of_unit) for bias in self.biases]
        with torch.no_grad():
            routed = self._hidden(x[:taught], self.num_shared)
        return self.bias + run(x, ids, ups, biases, self.down.unflatten(0, of_unit)), routed

    @torch.no_grad()
    def _gains(self, routed: Tensor, error: Tensor, chosen: Tensor) -> Tensor:
        """`[T, R]`; `routed` is `[T, U * m]`."""
        routed = routed.unflatten(1, (-1, self.size))  # [T, U, m]
        down = self.down[self.num_shared :]  # [U * m, D_out]
        by_unit = (routed * (error @ down.t()).view_as(routed)).sum(2).to(error.dtype)
        inner = torch.zeros_like(chosen).index_add_(1, self.owners, by_unit) + error @ self.expert_bias.t()
        columns = down.view(self.num_units, self.size, -1)
        squares = chosen.new_empty(len(self.expert_bias), len(chosen))
        for experts, by_expert, own in self._by_width(routed, columns):
            squares[experts] = squared_outputs(by_expert, own, self.expert_bias[experts]).to(squares.dtype)
        return choice_gains(inner, squares.t(), chosen)

    def _by_width(self, routed: Tensor, columns: Tensor) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
        """The n experts of each width, their neurons `[n, T, w]` and columns `[n, w, D_out]`.

        From `[T, U, m]` and `[U, m, D_out]`.
        """
        if self._experts.sizes is None:
            yield slice(None), routed.transpose(0, 1), columns
            return
        for experts, units in self.groups:
            yield experts, routed[:, units].flatten(2).transpose(0, 1), columns[units].flatten(1, 2)

    @torch.no_grad()
    def result(self) -> tuple[Experts, UnitRouter | None]:
        """The trained tensors, in their places."""
        experts, first = self._experts, self.num_shared
        biases = [None if bias is None else bias.detach() for bias in self.biases]
        shared = experts.shared
        if shared is not None:
            taken = zip(shared.projections, self.ups, biases, strict=True)
            projections = [Linear(p.role, up[:first].detach(), _head(b, first), p.dtype) for p, up, b in taken]
            down = Linear(shared.down.role, self.down[:first].t().contiguous(), None, shared.down.dtype)
            shared = replace(shared, projections=tuple(projections), down=down)
        routed = (self.num_units, self.size)
        trained = replace(
            experts,
            projections=tuple(up[first:].detach().unflatten(0, routed) for up in self.ups),
            projection_biases=tuple(None if b is None else b[first:].unflatten(0, routed) for b in biases),
            down=self.down[first:].unflatten(0, routed).transpose(1, 2).contiguous(),
            expert_bias=experts.to_units(self.expert_bias.detach()),
            bias=self.bias.detach(),
            shared=shared,
        )
        return trained, None if self.router is None else self.router.requires_grad_(False)


def _cat(shared: Tensor | None, routed: Tensor | None) -> Tensor | None:
    return None if shared is None or routed is None else torch.cat([shared, routed])


def _head(bias: Tensor | None, count: int) -> Tensor | None:
    return None if bias is None else bias[:count]
