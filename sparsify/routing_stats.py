"""Where the tokens of a `SparseModel` go: loads, tokens without an expert, experts that work together, and for whom.

T tokens, E routed experts, K slots of a token, V token ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify.passes.calibrate import Call, as_call
from sparsify.passes.capture import evaluation_mode
from sparsify.passes.graph_values import tensor_leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsify.sparse_model import SparseModel

_MOST_IDS = 1_000_000  # larger integers are no token ids


@dataclass(frozen=True, eq=False)
class LayerRouting:
    """The routes of one converted FFN.

    Attributes:
        name: of the FFN.
        tokens: T, that were routed; padding is left out.
        tokens_per_expert: `[E]`, assignments of each routed expert; shared experts, which have all, are left out. Where
            experts run on mixtures of tokens (Soft MoE), these count, here and in `together`.
        slots: K, columns of a route; the most experts that one token can have.
        unrouted_tokens: tokens that no expert takes: dropped over capacity, or left out by choice.
        together: `[E, E]` int64: tokens that have both experts; on the diagonal, those that have the one.
        ids_per_expert: `[E, V]` int64: how often each expert had each token id; None where the model has no input of
            token ids, one for every routed token.
    """

    name: str
    tokens: int
    tokens_per_expert: tuple[int, ...]
    slots: int
    unrouted_tokens: int
    together: Tensor
    ids_per_expert: Tensor | None

    @property
    def max_load(self) -> float:
        """Load of the fullest expert over the mean load: 1 is perfect balance, E collapse; 0 if nothing was routed."""
        total = sum(self.tokens_per_expert)
        return max(self.tokens_per_expert) * len(self.tokens_per_expert) / total if total else 0.0

    @property
    def load_variation(self) -> float:
        """Standard deviation of the loads over their mean (population): 0 is perfect balance, sqrt(E - 1) collapse."""
        loads = torch.tensor(self.tokens_per_expert, dtype=torch.float64)
        return float(loads.std(correction=0) / loads.mean()) if loads.sum() else 0.0

    @property
    def idle_experts(self) -> int:
        """Experts without a token."""
        return self.tokens_per_expert.count(0)

    @property
    def experts_per_token(self) -> float:
        """Mean number of routed experts that run for a token; all of them where they are merged into one."""
        return sum(self.tokens_per_expert) / self.tokens if self.tokens else 0.0

    @property
    def unrouted_share(self) -> float:
        """Share of the tokens that no expert takes."""
        return self.unrouted_tokens / self.tokens if self.tokens else 0.0

    def top_ids(self, expert: int, count: int = 10) -> list[tuple[int, int]]:
        """The token ids that an expert had most often, each with how often.

        Raises:
            LookupError: the model has no input of token ids.
        """
        if self.ids_per_expert is None:
            raise LookupError(f"no input of the model gives an id for every token that {self.name} routes")
        counts, ids = self.ids_per_expert[expert].topk(min(count, self.ids_per_expert.shape[1]))
        return [(int(i), int(n)) for i, n in zip(ids, counts, strict=True) if n]

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values; the counts of token ids are left out."""
        names = ("tokens", "slots", "max_load", "load_variation", "idle_experts", "experts_per_token", "unrouted_share")
        return {
            "name": self.name,
            **{name: getattr(self, name) for name in names},
            "tokens_per_expert": list(self.tokens_per_expert),
            "together": self.together.tolist(),
        }


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """The routes of all converted FFNs, in graph order. Prints as a table."""

    layers: tuple[LayerRouting, ...]

    def __getitem__(self, name: str) -> LayerRouting:
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def max_load(self) -> float:
        """Mean over the layers."""
        return _mean([layer.max_load for layer in self.layers])

    @property
    def experts_per_token(self) -> float:
        """Mean over the layers."""
        return _mean([layer.experts_per_token for layer in self.layers])

    @property
    def unrouted_share(self) -> float:
        """Mean over the layers."""
        return _mean([layer.unrouted_share for layer in self.layers])

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dump`."""
        return {"layers": [layer.to_json() for layer in self.layers]}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw two maps: the share of the tokens that each expert of each layer had; experts that work together.

        Args:
            path: where to write the picture, in the format that its ending names; None writes nothing.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from sparsify.plot_routing import plot_routing

        figure = plot_routing(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        lines = [f"{'layer':<28} {'tokens':>8} {'max/mean':>8} {'idle':>4} {'experts/token':>13} {'unrouted':>8}"]
        lines += [
            f"{layer.name:<28} {layer.tokens:>8} {layer.max_load:>8.2f} {layer.idle_experts:>4} "
            f"{layer.experts_per_token:>13.2f} {layer.unrouted_share:>8.2%}"
            for layer in self.layers
        ]
        return "\n".join(lines)


class RoutingRecorder:
    """Adds up the routes that it is shown."""

    def __init__(self, num_experts: Mapping[str, int]) -> None:
        """Start with none; `num_experts` by the name of the FFN."""
        self._num_experts = num_experts
        self._routes: dict[str, list[Tensor]] = {name: [] for name in num_experts}
        self._ids: dict[str, list[Tensor | None]] = {name: [] for name in num_experts}
        self._mixed: dict[str, int] = dict.fromkeys(num_experts, 0)
        self._call: Call | None = None

    def start(self, call: Call) -> None:
        """What the model is called with next; it tells padding and token ids."""
        self._call = call

    def add(self, name: str, expert_ids: Tensor, tokens: int | None = None) -> None:
        """One call of a router.

        Args:
            name: of the FFN.
            expert_ids: `[T, K]`; `[N, K]` where experts run on N mixtures of the tokens.
            tokens: T, where that is not N.
        """
        expert_ids = expert_ids.detach().cpu()
        ids = _token_ids(self._call, len(expert_ids))
        mask = None if self._call is None else self._call.mask
        if tokens is not None and tokens != len(expert_ids):
            self._mixed[name] += tokens
            ids = None
        elif mask is not None and mask.numel() == len(expert_ids):
            kept = mask.reshape(-1).cpu()
            expert_ids, ids = expert_ids[kept], None if ids is None else ids[kept]
        self._routes[name].append(expert_ids)
        self._ids[name].append(ids)

    def stats(self) -> RoutingStats:
        """What was recorded."""
        found = [(name, routes) for name, routes in self._routes.items() if routes]
        return RoutingStats(tuple(self._summarise(name, _join(routes)) for name, routes in found))

    def _summarise(self, name: str, expert_ids: Tensor) -> LayerRouting:
        num_experts, ids, mixed = self._num_experts[name], self._ids[name], self._mixed[name]
        used = torch.zeros(len(expert_ids), num_experts + 1)  # [T, E + 1], the last for slots that are not used
        used.scatter_(1, torch.where(expert_ids >= 0, expert_ids, num_experts), 1.0)
        used = used[:, :-1]
        known = [part for part in ids if part is not None]
        return LayerRouting(
            name=name,
            tokens=mixed or len(used),
            tokens_per_expert=tuple(int(load) for load in used.sum(0)),
            slots=expert_ids.shape[1],
            unrouted_tokens=0 if mixed else int((used.sum(1) == 0).sum()),
            together=(used.double().t() @ used.double()).long(),
            ids_per_expert=_count_ids(used, torch.cat(known)) if len(known) == len(ids) else None,
        )


@contextlib.contextmanager
def record_routing(sparse: SparseModel) -> Generator[RoutingRecorder]:
    """Record every route in this context, of calls in training too; `recorder.stats()` adds them up."""
    routers = sparse.routers
    recorder = RoutingRecorder({name: router.num_experts for name, router in routers.items()})

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, inputs, route: recorder.add(name, route[1], inputs[0].shape[:-1].numel())

    handles = [router.register_forward_hook(hook(name)) for name, router in routers.items()]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def routing_stats(sparse: SparseModel, batches: Iterable[object]) -> RoutingStats:
    """Run the model on `batches`, in evaluation mode, and add up where their tokens go.

    Args:
        sparse: left as it is.
        batches: `(args, kwargs)`, tuples, dicts or tensors; positions where a keyword `attention_mask` is 0 are left
            out.
    """
    with evaluation_mode(sparse), record_routing(sparse) as recorder:
        for batch in batches:
            call = as_call(batch)
            recorder.start(call)
            sparse(*call.args, **call.kwargs)
    return recorder.stats()


def _join(routes: Sequence[Tensor]) -> Tensor:
    """`[T, K]` of parts of fewer slots each: the K of annealed routers falls from step to step."""
    slots = max(part.shape[1] for part in routes)
    return torch.cat([pad(part, (0, slots - part.shape[1]), value=-1) for part in routes])


def _token_ids(call: Call | None, tokens: int) -> Tensor | None:
    """The first integer input with one number for every token, `[T]`."""
    for leaf in tensor_leaves((call.args, call.kwargs)) if call else ():
        if leaf.dtype in (torch.int64, torch.int32) and leaf.numel() == tokens and leaf.numel():
            ids = leaf.reshape(-1).cpu().long()
            return ids if int(ids.min()) >= 0 and int(ids.max()) < _MOST_IDS else None
    return None


def _count_ids(used: Tensor, ids: Tensor) -> Tensor:
    """`[T, E]` and `[T]` to `[E, V]`."""
    counts = torch.zeros(int(ids.max()) + 1 if len(ids) else 0, used.shape[1], dtype=torch.float64)
    return counts.index_add_(0, ids, used.double()).long().t()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
