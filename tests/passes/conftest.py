"""Small converted models, made without a conversion: the graph that insert_moe leaves, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.ops import combine, dispatch, expert_linear
from sparsify.passes.capture import capture
from sparsify.routers import MLPRouter, Router
from sparsify.sparse_model import SparseModel, SparseModelInfo


@torch.library.custom_op("sparsify_test::route", mutates_args=())
def _route(x: Tensor, top_k: int, name: str) -> tuple[Tensor, Tensor]:
    """Holds the place of a router while a model is captured."""
    return x.new_ones(x.shape[0], top_k), torch.arange(top_k).repeat(x.shape[0], 1)


@_route.register_fake
def _(x: Tensor, top_k: int, name: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], top_k), x.new_empty(x.shape[0], top_k, dtype=torch.int64)


class _Experts(nn.Module):
    def __init__(self, num_experts: int, hidden: int, size: int, out: int, gated: bool, bias: bool) -> None:
        super().__init__()
        shapes = {"up_proj": (size, hidden), "down_proj": (out, size)}
        if gated:
            shapes["gate_proj"] = (size, hidden)
        for role, shape in shapes.items():
            self.register_parameter(role, nn.Parameter(torch.randn(num_experts, *shape) / shape[1] ** 0.5))
            if bias:
                self.register_parameter(f"{role}_bias", nn.Parameter(torch.randn(num_experts, shape[0])))


class MoELayer(nn.Module):
    """One converted FFN as `insert_moe` writes it."""

    def __init__(
        self,
        name: str = "layers.0",
        hidden: int = 16,
        size: int = 8,
        out: int | None = None,
        num_experts: int = 4,
        top_k: int = 2,
        activation: Callable[[Tensor], Tensor] = F.relu,
        gated: bool = False,
        bias: bool = True,
        shared: int = 0,
        vector: bool = False,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        out = out or hidden
        self.name, self.num_experts, self.activation, self.out = name, num_experts, activation, out
        self.placed_router = router or MLPRouter(hidden, num_experts, top_k, 12)
        self.experts = _Experts(num_experts, hidden, size, out, gated, bias)
        self.scale = nn.Parameter(torch.rand(num_experts, size)) if vector else None
        self.shared_up, self.shared_down = nn.Linear(hidden, shared or 1), nn.Linear(shared or 1, out, bias=False)
        self.has_shared = bool(shared)
        self.norm = nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        experts = self.experts
        flat = self.norm(x).reshape(-1, x.shape[-1])
        weights, ids = torch.ops.sparsify_test.route(flat, self.placed_router.top_k, self.name)
        rows, order, offsets = dispatch(flat, ids, self.num_experts)

        def linear(inputs: Tensor, role: str) -> Tensor:
            return expert_linear(inputs, getattr(experts, role), getattr(experts, f"{role}_bias", None), offsets)

        hidden = linear(rows, "up_proj")
        if hasattr(experts, "gate_proj"):
            hidden = self.activation(linear(rows, "gate_proj")) * hidden
        else:
            hidden = self.activation(hidden)
        if self.scale is not None:
            hidden = hidden * self.scale.index_select(0, ids.reshape(-1).index_select(0, order).clamp(0))
        y = combine(linear(hidden, "down_proj"), weights, order)
        if self.has_shared:
            y = y + self.shared_down(self.activation(self.shared_up(flat)))
        return (y + self.bias).reshape(*x.shape[:-1], self.out)


class MoETransformer(nn.Module):
    """Embedding, two converted FFNs with a residual, and a head that shares the embedding: ids and mask to a dict."""

    def __init__(self, vocabulary: int = 3000, hidden: int = 16, **layer: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(MoELayer(f"layers.{i}", hidden, **layer) for i in range(2))
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        for layer in self.layers:
            x = x + layer(x)
        return {"last_hidden_state": x, "logits": self.head(x)}


class SkippingRouter(Router):
    """Sigmoid weights; slots below one half stay unused (-1)."""

    def __init__(self, hidden: int = 16, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__(hidden, num_experts, top_k)
        self.hidden = hidden
        self.weight = nn.Parameter(torch.randn(num_experts, hidden))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(torch.sigmoid(self.logits(x)), self.top_k)
        return weights, torch.where(weights > 0.5, ids, -1)


def build_sparse(model: nn.Module, *args: Any, **kwargs: Any) -> SparseModel:
    """Capture `model` and put its routers in place, as modules that the graph calls."""
    graph_module = capture(model, args, kwargs)
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.sparsify_test.route.default):
        x, _, name = node.args
        owner = next(m for m in model.modules() if isinstance(m, MoELayer) and m.name == name)
        graph_module.add_submodule(f"{name}.router", owner.placed_router)
        with graph_module.graph.inserting_before(node):
            routed = graph_module.graph.call_module(f"{name}.router", (x,))
        routed.meta = node.meta.copy()
        node.replace_all_uses_with(routed)
        graph_module.graph.erase_node(node)
    sparse = SparseModel(graph_module, graph_module.graph)
    sparse.info = SparseModelInfo(args, kwargs, {}, None)
    return sparse


@pytest.fixture(scope="session")
def skipping_router() -> type[SkippingRouter]:
    """A router with weights of its own that leaves slots unused."""
    return SkippingRouter


@pytest.fixture(scope="session")
def sparse_layer() -> Callable[..., SparseModel]:
    """Makes a model of one converted FFN; options are those of `MoELayer`."""

    def make(**options: Any) -> SparseModel:
        return build_sparse(MoELayer(**options), torch.randn(2, 3, options.get("hidden", 16)))

    return make


@pytest.fixture(scope="session")
def sparse_transformer() -> Callable[..., SparseModel]:
    """Makes a model of two converted FFNs with token ids and a mask; options are those of `MoETransformer`."""

    def make(dtype: torch.dtype = torch.float32, **options: Any) -> SparseModel:
        model = MoETransformer(**options).to(dtype)
        return build_sparse(model, torch.randint(0, 50, (2, 5)), attention_mask=torch.ones(2, 5, dtype=dtype))

    return make
