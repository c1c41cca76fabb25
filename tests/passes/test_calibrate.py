"""`CalibrationStream` and `read_batches`: every form of batch, nothing that is not finite, padding left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import CalibrationError
from sparsify.passes import calibrate as module
from sparsify.passes.calibrate import CalibrationStream, Call, as_call, read_batches
from sparsify.passes.capture import capture
from sparsify.passes.on_disk import lies_in_file


class Model(nn.Module):
    """Two linear layers; the mask does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(self.first(x)) + 0 * attention_mask.unsqueeze(-1)


X, MASK = torch.randn(2, 5, 3), torch.ones(2, 5)


@pytest.fixture
def model() -> Model:
    return Model().eval()


def stream(model: nn.Module, *batches: object) -> CalibrationStream:
    return CalibrationStream(capture(model, (X,), {"attention_mask": MASK}), [as_call(batch) for batch in batches])


def test_forms_of_a_batch() -> None:
    """Protects: tensors, tuples, lists, dicts, (args, kwargs); a pair of tensors is two arguments."""
    assert as_call(X) == Call((X,), {}, None)
    assert as_call((X, MASK)) == as_call([X, MASK]) == Call((X, MASK), {}, None)
    assert as_call({"x": X}) == Call((), {"x": X}, None)
    assert as_call(((X,), {"mask": MASK})) == Call((X,), {"mask": MASK}, None)
    with pytest.raises(CalibrationError, match="got str"):
        as_call("text")


class WithTable(Model):
    """A view of a weight is needed after the second layer, when a batch was held back before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(200, 100))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        view = self.table.t()
        return super().forward(x, attention_mask) + view.sum()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tokens stay in memory")
def test_values_in_files() -> None:
    """Protects: the same tokens, whose memory is not that of the process; no copy of a weight for every batch."""
    model = WithTable().eval()
    batches = [as_call(((torch.randn(2, n, 3),), {"attention_mask": torch.ones(2, n)})) for n in (4000, 6000)]
    graph_module = capture(model, (X,), {"attention_mask": MASK})
    in_memory, in_files = (CalibrationStream(graph_module, batches, on_disk=on_disk) for on_disk in (False, True))
    for name in ("linear", "linear_1"):
        (expected,), (found,) = (run.tokens_at([(name, -1)], "ffn") for run in (in_memory, in_files))
        assert torch.equal(found, expected)
        assert lies_in_file(in_files.value(name, 1))
    held = [value for environment in in_files._environments for value in environment.values()]
    assert any(value.data_ptr() == model.table.data_ptr() for value in held)
    assert all(value.shape[1] in (4000, 6000) for value in held if lies_in_file(value))


def test_what_is_no_plain_memory_stays_where_it_is() -> None:
    """Protects: values whose bytes do not say all: complex ones, which may be conjugated lazily, and sparse ones."""
    x = torch.randn(300, 200)
    conjugate = torch.complex(x, x).conj()
    assert conjugate.imag.is_neg()
    assert module._is_plain(x.t())
    for value in (conjugate, conjugate.imag, x.to_sparse(), nn.Parameter(x), x.long(), (x, x)):
        assert not module._is_plain(value)


def test_tokens_in_order_and_without_padding(model: Model) -> None:
    """Protects: what a layer sees is what the model computes there, masked positions left out."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 3)
    run = stream(model, ((X,), {"attention_mask": MASK}), ((x,), {"attention_mask": mask}))
    (first,) = run.tokens_at([("linear", -1)], "ffn")
    torch.testing.assert_close(first, model.first(torch.cat([X.flatten(0, 1), x[mask.bool()]])))
    (second,) = run.tokens_at([("linear_1", -1)], "ffn")
    torch.testing.assert_close(second, model.second(first))


def test_reads_no_more_than_needed() -> None:
    """Protects: a stream without end can be given; masked positions do not count."""
    read: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            read.append(len(read))
            yield {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8).tril()}

    assert len(read_batches(endless(), 7)) == len(read) == 3  # 3 visible positions a batch


@pytest.mark.parametrize("empty", [[], iter(())])
def test_empty(empty: Any) -> None:
    """Protects: an exhausted generator is not taken for a conversion without data."""
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        read_batches(empty, 10)


def test_nan_in_an_input(model: Model) -> None:
    """Protects: the message names the batch and the input."""
    bad = X.clone()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="input `x` of calibration batch 1 holds NaN"):
        stream(model, ((X,), {"attention_mask": MASK}), ((bad,), {"attention_mask": MASK}))


def test_values_that_overflow_on_the_way(model: Model) -> None:
    """Protects: infinities made by the model itself are caught before they spoil the statistics."""
    model.first.weight.data *= 1e30
    run = stream(model, ((X * 1e30,), {"attention_mask": MASK}))
    with pytest.raises(CalibrationError, match="batch 0 leads to NaN or infinite values at the input of ffn"):
        run.tokens_at([("linear_1", -1)], "ffn")


def test_everything_masked(model: Model) -> None:
    """Protects: no division by zero tokens."""
    with pytest.raises(CalibrationError, match="no calibration token reaches ffn"):
        stream(model, ((X,), {"attention_mask": MASK * 0})).tokens_at([("linear", -1)], "ffn")


def test_another_structure(model: Model) -> None:
    """Protects: the message shows what the batch has and what the model was captured with."""
    with pytest.raises(CalibrationError, match=r"batch 0 has 0 positional inputs and the keywords \['x'\].*1 and"):
        stream(model, {"x": X})


def test_padding_is_left_out_of_flattened_tokens() -> None:
    """Protects: an FFN that reads flattened tokens (as GPT-2's does) and its residual see the same tokens."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y = self.down(torch.relu(self.up(x.reshape(-1, 3)))).view(x.shape)
            return x + y * attention_mask.unsqueeze(-1)

    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    run = stream(Flat(), ((X,), {"attention_mask": mask}))
    flat, whole = run.tokens_at([("reshape", -1), ("x", -1)], "ffn")
    torch.testing.assert_close(flat, whole)
    assert len(flat) == 8
