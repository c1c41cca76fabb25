"""What the split needs to know about the neurons, summed up batch by batch. T tokens, F intermediate_size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.passes.on_disk import drop_pages
from sparsify.passes.split.dense_ffn import DenseFFN

CHUNK = 1024  # tokens at a time: [1024, F] fp32 is 34 MB at F = 8192


@dataclass(frozen=True)
class NeuronStatistics:
    """Mean `[F]` and variance `[F]` of the activated neurons over tokens, fp64."""

    mean: Tensor
    variance: Tensor


def measure_neurons(dense: DenseFFN, x: Tensor) -> NeuronStatistics:
    """Run the projections over `x` `[T, D]`, T > 0."""
    total = torch.zeros(dense.down.weight.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in chunks(x):
        hidden = dense.hidden(part)
        total += hidden.sum(0)
        squares += hidden.square_().sum(0)
    mean = total / len(x)
    return NeuronStatistics(mean, (squares / len(x) - mean.square()).clamp(min=0))


def importance(dense: DenseFFN, statistics: NeuronStatistics) -> Tensor:
    """`[F]`: the variance that a neuron adds to the output, var(h) |W_down column|^2 (WIFV, FLAP, arXiv 2312.11983)."""
    columns = [part.double().square().sum(0) for part in dense.down.weight.split(CHUNK, dim=1)]  # not all in fp64
    return statistics.variance * torch.cat(columns)


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Split `[T, ...]` into pieces that keep the hidden activations small."""
    for part in x.split(CHUNK) if len(x) else ():
        yield part
        drop_pages(x)
