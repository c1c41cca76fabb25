"""Replace every skipped expert by its mean output (G-MoEfication), at no cost at run time.

    y = (b + W_down mu) + sum over the selected e of (E_e(x) - c_e),   c_e = W_down[:, e] mu_e

Still the dense FFN with every expert selected.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsify.passes.split.experts import Experts


def fold_mean(experts: Experts, mean: Tensor) -> Experts:
    """Move the means into the biases.

    Args:
        experts: U units of m neurons, without expert_bias.
        mean: `[U, m]`, mean of the routed neurons.

    Returns:
        The experts with `expert_bias = -c` and `bias + sum c`.
    """
    outputs = [down.double() @ mu for down, mu in zip(experts.down, mean.double(), strict=True)]  # one by one: fp64
    constants = torch.stack(outputs)  # [U, D_out]
    bias = constants.sum(0) if experts.bias is None else experts.bias.double() + constants.sum(0)
    dtype = experts.down.dtype
    return replace(experts, expert_bias=-constants.to(dtype), bias=bias.to(dtype))
