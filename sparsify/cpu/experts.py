"""The weights of a layer's experts as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as functional
from torch import Tensor

from sparsify.kernels.reference import ACTIVATIONS


class Experts(NamedTuple):
    """What `sparsify::moe_ffn` is given besides tokens and routing; shapes stand there."""

    up_proj: Tensor
    up_bias: Tensor | None
    gate_proj: Tensor | None
    gate_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None
    activation: str

    @property
    def weights(self) -> list[Tensor]:
        """The two or three projections."""
        return [self.up_proj, self.down_proj, *([] if self.gate_proj is None else [self.gate_proj])]

    def hidden(self, e: int, rows: Tensor) -> Tensor:
        """`[n, D]` to `[n, I]`: what expert `e` feeds to its down projection."""
        up = functional.linear(rows, self.up_proj[e], pick(self.up_bias, e))
        if self.gate_proj is None:
            return self.activate(up, None)
        return self.activate(up, functional.linear(rows, self.gate_proj[e], pick(self.gate_bias, e)))

    def double(self) -> Experts:
        """The same in fp64."""
        return Experts(
            self.up_proj.double(), _double(self.up_bias), _double(self.gate_proj), _double(self.gate_bias),
            self.down_proj.double(), _double(self.down_bias), self.activation,
        )  # fmt: skip

    def activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """The activation, of the gate where there is one; all of one shape."""
        act = ACTIVATIONS[self.activation]
        return act(up) if gate is None else act(gate).mul_(up)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def pick(bias: Tensor | None, e: int) -> Tensor | None:
    """`[E, N]` to `[N]`, where there is one."""
    return None if bias is None else bias[e]


def project_all(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By all experts at once: `[T, D]` to `[T, E * I]`."""
    return functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
