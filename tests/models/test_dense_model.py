from __future__ import annotations

import numpy
import pytest
import torch

from sparsify.models.dense_model import call, output_tensor


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"x": 1, "y": 2}, ((), {"x": 1, "y": 2})),
        ((1, 2), ((1, 2), {})),
        (((1,), {"y": 2}), ((1,), {"y": 2})),
        (torch.tensor(3), ((torch.tensor(3),), {})),
    ],
    ids=["mapping", "tuple", "pair", "tensor"],
)
def test_call_spreads_every_form_of_batch(batch, expected):
    """The forms are those that `sparsify(calibration=...)` takes."""
    assert call(lambda *args, **kwargs: (args, kwargs), batch) == expected


def test_call_records_no_gradients():
    """Scoring a model must not keep its activations."""
    weight = torch.ones(2, requires_grad=True)
    assert not call(lambda x: x * weight, torch.ones(2)).requires_grad


@pytest.mark.parametrize("output", [torch.ones(2), [torch.ones(2), 5], {"logits": numpy.ones(2, dtype="float32")}])
def test_output_tensor_reads_what_torch_and_onnxruntime_return(output):
    """One metric scores a module, a Hugging Face module and an ONNX session."""
    torch.testing.assert_close(output_tensor(output, "logits"), torch.ones(2))


def test_output_tensor_refuses_what_has_no_tensor():
    """The message says what came and what to return."""
    with pytest.raises(TypeError, match=r"returned NoneType.*'logits'"):
        output_tensor(None, "logits")
