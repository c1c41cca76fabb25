"""How far the outputs of a converted model are from those of the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.passes.calibrate import without_padding
from sparsify.passes.capture import evaluation_mode, same_random_numbers
from sparsify.passes.graph_values import tensor_leaves


@torch.no_grad()
def run_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The floating outputs of a model in evaluation mode that have a dimension, padding left out."""
    with evaluation_mode(model), same_random_numbers():  # routers may add noise, and drop, in training
        tensors = tensor_leaves(model(*args, **kwargs))
    return [without_padding(tensor, kwargs) for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 0]


def relative_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`|b - a| / |a|`, L2 over all pairs of a dense and a converted output together; of the same shapes."""
    difference, size = 0.0, 0.0
    for dense, converted in pairs:
        difference += float((converted.double() - dense.double()).square().sum())
        size += float(dense.double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5
