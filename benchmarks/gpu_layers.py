"""Expert layers of different libraries behind one call, and the shapes they are measured at.

T tokens, D hidden_size, I neurons of one expert, E num_experts, K top_k. All are gated with SiLU, without biases: the
form that every library has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify import ops
from sparsify.kernels.reference import moe_ffn_reference


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    tokens: int
    size: int
    neurons: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.size} I={self.neurons} E={self.experts} K={self.top_k}"

    @property
    def flops(self) -> float:
        """Of a forward; a backward has twice as many."""
        return 6.0 * self.tokens * self.top_k * self.size * self.neurons

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.size * self.neurons


# Those of figure 14 of the SonicMoE paper.
ANCHORS = (
    Shape(40960, 768, 256, 128, 8),
    Shape(40960, 768, 1024, 32, 2),
    Shape(24576, 1536, 256, 128, 8),
    Shape(24576, 1536, 512, 64, 4),
    Shape(24576, 1536, 1024, 32, 2),
    Shape(32768, 4096, 1024, 64, 4),
    Shape(32768, 4096, 2048, 64, 4),
)
# A dense layer of E * I neurons of which a quarter runs.
SPLITS = (Shape(8192, 4096, 1024, 16, 4), Shape(8192, 768, 384, 8, 2))
DECODE = tuple(
    Shape(tokens, size, neurons, experts, top_k)
    for size, neurons, experts, top_k in ((4096, 7168, 8, 2), (2048, 1408, 64, 6), (4096, 1024, 16, 4))
    for tokens in (1, 2, 4, 8, 16, 64)
)
SMALLEST = (Shape(24, 32, 16, 4, 2),)


@dataclass(frozen=True)
class Inputs:
    """What every layer gets; leaves that need gradients."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    up: Tensor
    gate: Tensor
    down: Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Uniform routing, weights of a fresh layer."""

        def leaf(*sizes: int) -> Tensor:
            values = torch.randn(sizes, device=device, dtype=dtype) / sizes[-1] ** 0.5
            return values.requires_grad_()

        scores = torch.rand(shape.tokens, shape.experts, device=device)
        values, ids = scores.topk(shape.top_k, dim=-1)
        weights = values.softmax(-1).to(dtype).requires_grad_()
        x = torch.randn(shape.tokens, shape.size, device=device, dtype=dtype).requires_grad_()
        up, gate = (leaf(shape.experts, shape.neurons, shape.size) for _ in range(2))
        return cls(x, weights, ids, up, gate, leaf(shape.experts, shape.size, shape.neurons))

    def arguments(self) -> tuple[Any, ...]:
        """Of `sparsify::moe_ffn`."""
        return self.x, self.weights, self.ids, self.up, None, self.gate, None, self.down, None, "silu"

    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        return self.x, self.weights, self.up, self.gate, self.down


@dataclass(frozen=True)
class Layer:
    """A layer bound to its inputs."""

    run: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    """What gradients are for: the inputs and the layer's weights."""
    share: float = 1.0
    """Operations and bytes by those of the chosen experts."""


class Interpreted(torch.autograd.Function):
    """The kernels without the op, which would run plain ops on CPU tensors."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # noqa: D102
        from sparsify.kernels.moe_triton import moe_ffn_triton

        *tensors, ctx.activation = arguments
        ctx.save_for_backward(*tensors)
        run: Any = moe_ffn_triton
        return run(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        from sparsify.kernels.moe_triton import moe_ffn_backward_triton

        needs = list(ctx.needs_input_grad[:9])
        run: Any = moe_ffn_backward_triton
        found = run(grads[0].contiguous(), *ctx.saved_tensors, ctx.activation, needs)
        return *(g if wants else None for g, wants in zip(found, needs, strict=True)), None


def sparsify_layer(inputs: Inputs) -> Layer:
    """Ours."""
    run: Any = ops.moe_ffn if inputs.x.device.type == "cuda" else Interpreted.apply
    return Layer(lambda: run(*inputs.arguments()), inputs.leaves())


def loop_layer(inputs: Inputs) -> Layer:
    """One expert after another, with a synchronisation each."""
    return Layer(lambda: moe_ffn_reference(*inputs.arguments()), inputs.leaves())


def dense_layer(inputs: Inputs) -> Layer:
    """The layer that has all E * I neurons."""
    up, gate = (w.detach().flatten(0, 1).requires_grad_() for w in (inputs.up, inputs.gate))
    down = inputs.down.detach().transpose(0, 1).flatten(1).contiguous().requires_grad_()

    def run() -> Tensor:
        return F.linear(F.silu(F.linear(inputs.x, gate)) * F.linear(inputs.x, up), down)

    return Layer(run, (inputs.x, up, gate, down), inputs.up.shape[0] / inputs.ids.shape[1])


def grouped_mm_layer(inputs: Inputs) -> Layer:
    """`torch.nn.functional.grouped_mm` between sort, gather and sum."""
    both = torch.cat([inputs.gate, inputs.up], 1).detach().requires_grad_()
    experts, top_k = inputs.up.shape[0], inputs.ids.shape[1]

    def run() -> Tensor:
        by_expert, order = inputs.ids.flatten().sort(stable=True)
        bounds = torch.arange(1, experts + 1, device=by_expert.device)
        ends = torch.searchsorted(by_expert, bounds, out_int32=True)
        gate, up = F.grouped_mm(inputs.x[order // top_k], both.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, inputs.down.transpose(1, 2), offs=ends)
        by_pair = torch.empty_like(rows).index_copy(0, order, rows)
        weighted = by_pair.view(*inputs.ids.shape, -1).float() * inputs.weights.float().unsqueeze(-1)
        return weighted.sum(1).to(inputs.x.dtype)

    return Layer(run, (inputs.x, inputs.weights, both, inputs.down))


def hf_layer(inputs: Inputs, implementation: str) -> Layer:
    """The experts of Mixtral in transformers, by one of its implementations."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, neurons, size = inputs.up.shape
    config = MixtralConfig(hidden_size=size, intermediate_size=neurons, num_local_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer: Any = MixtralExperts(config)
    layer.gate_up_proj = torch.nn.Parameter(torch.cat([inputs.gate, inputs.up], 1).detach())
    layer.down_proj = torch.nn.Parameter(inputs.down.detach())
    leaves = (inputs.x, inputs.weights, layer.gate_up_proj, layer.down_proj)
    return Layer(lambda: layer(inputs.x, inputs.ids, inputs.weights), leaves)


def scattermoe_layer(inputs: Inputs) -> Layer:
    """`scattermoe.mlp.GLUMLP`, with weights of its own."""
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    experts, neurons, size = inputs.up.shape
    layer: Any = GLUMLP(size, neurons, experts, inputs.ids.shape[1], activation=torch.nn.SiLU())
    layer.to(device=inputs.x.device, dtype=inputs.x.dtype)
    leaves = (inputs.x, inputs.weights, *layer.parameters())
    return Layer(lambda: layer(inputs.x, inputs.weights, inputs.ids), leaves)


def megablocks_layer(inputs: Inputs) -> Layer:
    """`megablocks.layers.dmoe.dMoE`, with weights and a router of its own."""
    from megablocks.layers.arguments import Arguments  # pyright: ignore[reportMissingImports]
    from megablocks.layers.dmoe import dMoE  # pyright: ignore[reportMissingImports]

    experts, neurons, size = inputs.up.shape
    layer: Any = dMoE(
        Arguments(
            hidden_size=size,
            ffn_hidden_size=neurons,
            moe_num_experts=experts,
            moe_top_k=inputs.ids.shape[1],
            mlp_type="glu",
            activation_fn=F.silu,
            bias=False,
            return_bias=False,
            device=inputs.x.device,
            bf16=inputs.x.dtype == torch.bfloat16,
            fp16=inputs.x.dtype == torch.float16,
        )
    )
    return Layer(lambda: layer(inputs.x.unsqueeze(1)).squeeze(1), (inputs.x, *layer.parameters()))


LAYERS: Mapping[str, Callable[[Inputs], Layer]] = {
    "sparsify": sparsify_layer,
    "dense": dense_layer,
    "grouped_mm": grouped_mm_layer,
    "transformers grouped_mm": functools.partial(hf_layer, implementation="grouped_mm"),
    "transformers sonicmoe": functools.partial(hf_layer, implementation="sonicmoe"),
    "transformers deepgemm": functools.partial(hf_layer, implementation="deepgemm"),
    "ScatterMoE": scattermoe_layer,
    "MegaBlocks": megablocks_layer,
}
# Copies the weights of every pair, or synchronises: for few tokens only.
SMALL_LAYERS: Mapping[str, Callable[[Inputs], Layer]] = {
    **LAYERS,
    "transformers batched_mm": functools.partial(hf_layer, implementation="batched_mm"),
    "transformers eager": functools.partial(hf_layer, implementation="eager"),
    "loop": loop_layer,
}
