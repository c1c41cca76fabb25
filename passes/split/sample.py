"""The calibration tokens of one FFN, and which of them are kept out of its fit. T tokens, D hidden_size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.passes.heap import trim_at_times, trim_heap
from sparsify.passes.on_disk import FileOfRows, lies_in_file, take_rows
from sparsify.passes.split.statistics import chunks

_HELD_OUT = 10  # every tenth token is kept out of every fit
_SMALLEST_VARIANCE = 1e-4  # of the hidden state of a token, relative to the mean: a bound for its weight


@dataclass(frozen=True)
class Sample:
    """Tokens `x` `[T, D]`, the output `target` `[T, D_out]` wanted for them, what an error weighs, and ids if read.

    `weight` `[T]` has the mean 1 over all calibration tokens; `ids` are `[T]`.
    """

    x: Tensor
    target: Tensor
    weight: Tensor
    ids: Tensor | None = None

    def every(self, step: int) -> Sample:
        """Every `step`-th token; inputs that lie in a file are copied to memory."""
        lies_there = step > 1 and lies_in_file(self.x)
        x = take_rows(self.x, torch.arange(0, len(self.x), step)) if lies_there else self.x[::step]
        ids = None if self.ids is None else self.ids[::step]
        return Sample(x, self.target[::step], self.weight[::step], ids)

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens and ids, a manageable number at a time."""
        parts = chunks(self.x)
        ids = iter(()) if self.ids is None else chunks(self.ids)
        return ((x, next(ids, None)) for x in parts)


@dataclass(frozen=True)
class Part:
    """Tokens as they come, as in `Sample`, with the variance `[T]` of the hidden state of each across its features."""

    x: Tensor
    target: Tensor
    variance: Tensor
    ids: Tensor | None = None


def hold_out(parts: Iterable[Part], *, on_disk: bool = False) -> tuple[Sample, Sample]:
    """Divide into tokens to fit to and tokens to measure on; fewer than ten tokens serve both.

    Args:
        parts: of the tokens, T > 0 in all, in their order.
        on_disk: keep inputs and targets in files.
    """
    fit, measured = _Columns(on_disk=on_disk), _Columns(on_disk=on_disk)
    seen = 0
    for index, part in enumerate(parts):
        held = torch.arange(seen, seen + len(part.x)) % _HELD_OUT == _HELD_OUT - 1
        seen += len(part.x)
        fit.append(part, ~held)
        measured.append(part, held)
        trim_at_times(index)  # rows that are kept lie between others that are not
    if seen < _HELD_OUT:
        whole = fit.sample(_weights(fit.variance.tensor()))
        return whole, whole
    weights = _weights(torch.cat([fit.variance.tensor(), measured.variance.tensor()]))
    own, others = weights.split([seen - seen // _HELD_OUT, seen // _HELD_OUT])
    return fit.sample(own), measured.sample(others)


def join(parts: Iterable[Part]) -> Sample:
    """All of them, none held out."""
    columns = _Columns(on_disk=False)
    for part in parts:
        columns.append(part, slice(None))
    return columns.sample(_weights(columns.variance.tensor()))


class _Rows:
    """As `FileOfRows`, in memory."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        self.parts.append(rows)

    def tensor(self) -> Tensor:
        """Empties the parts while it joins them, so that no row is held twice."""
        whole = self.parts[0].new_empty(sum(map(len, self.parts)), *self.parts[0].shape[1:])
        last = len(whole)
        while self.parts:
            rows = self.parts.pop()
            whole[last - len(rows) : last] = rows
            last -= len(rows)
        trim_heap()
        return whole


class _Columns:
    """Of a sample whose tokens are still coming."""

    def __init__(self, *, on_disk: bool) -> None:
        self.x, self.target = (FileOfRows() if on_disk else _Rows() for _ in range(2))
        self.variance, self.ids = _Rows(), _Rows()

    def append(self, part: Part, chosen: Tensor | slice) -> None:
        self.x.append(part.x[chosen])
        self.target.append(part.target[chosen])
        self.variance.append(part.variance[chosen])
        if part.ids is not None:
            self.ids.append(part.ids[chosen])

    def sample(self, weight: Tensor) -> Sample:
        return Sample(self.x.tensor(), self.target.tensor(), weight, self.ids.tensor() if self.ids.parts else None)


def _weights(variance: Tensor) -> Tensor:
    """`[T]`: one over the variance, at a mean of 1."""
    least = _SMALLEST_VARIANCE * variance.mean() + torch.finfo(variance.dtype).tiny
    weight = 1 / torch.maximum(variance, least)
    return weight / weight.mean()
