"""The outputs of a dense or converted model, to be compared (`passes/output_change.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.passes.calibrate import without_padding
from sparsify.passes.capture import evaluation_mode, same_random_numbers
from sparsify.passes.graph_values import floating_leaves


@torch.no_grad()
def run_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The floating outputs of a model in evaluation mode that have a dimension, padding left out."""
    with evaluation_mode(model), same_random_numbers():  # routers may add noise, and drop, in training
        tensors = floating_leaves(model(*args, **kwargs))
    return [without_padding(tensor, kwargs) for tensor in tensors]
