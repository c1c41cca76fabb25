"""A trained dense model with everything that converting and judging it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any
"""Inputs of one call: a dict of keyword arguments, a tuple of positional ones, a pair of both, or one tensor."""


@dataclass(frozen=True)
class Metric:
    """How good a converted model is at the task of the dense one.

    Attributes:
        name: what is measured, with its unit if it has one.
        higher_is_better: the direction.
        evaluate: takes a callable with the signature of the model (the model, a converted one, or a wrapper of an
            ONNX session that returns tensors or arrays) and returns its score on held-out data.
    """

    name: str
    higher_is_better: bool
    evaluate: Callable[[Callable[..., Any]], float]


@dataclass(frozen=True)
class DenseModel:
    """A trained model, example inputs to trace it with, and data. All tensors are on the CPU.

    Attributes:
        name: short name, usable as a file name.
        model: the model in evaluation mode.
        args: positional example inputs.
        kwargs: keyword example inputs; every dynamic dimension is at least 2, as `torch.export` requires.
        calibration: starts a new pass over the calibration batches; None where there is no data.
        held_out: batches that calibration never sees.
        metric: how to score a conversion; None where no task is known.
        data: where the batches come from, for people.
        loss: how far the outputs of a conversion are from those of the model, for `distill`; None for all of them
            alike.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calibration: Callable[[], Iterator[Batch]] | None
    held_out: list[Batch]
    metric: Metric | None
    data: str
    loss: Callable[[Any, Any, Batch], Tensor] | None = None


def call(function: Callable[..., Any], batch: Batch) -> Any:
    """Calls a model on a batch, without gradients."""
    with torch.no_grad():
        if isinstance(batch, Mapping):
            return function(**batch)
        if isinstance(batch, Tensor):
            return function(batch)
        if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
            return function(*batch[0], **batch[1])
        return function(*batch)


def output_tensor(output: Any, name: str) -> Tensor:
    """Returns one tensor of what a model returned: `name` of a mapping, the first of a sequence, or the tensor itself.

    Raises:
        TypeError: the output is none of these.
    """
    if isinstance(output, Mapping):
        return torch.as_tensor(output[name])
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Sequence) and output:
        return torch.as_tensor(output[0])
    raise TypeError(
        f"the model returned {type(output).__name__}, in which {name!r} cannot be found; "
        f"return a tensor, a mapping with the key {name!r} or a sequence that begins with it"
    )
