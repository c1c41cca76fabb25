"""`capture`: what comes out computes what the model computes, at every size, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import CaptureError
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.capture import capture


def test_sizes_stay_dynamic() -> None:
    """Protects: a graph captured at [2, 5] serves other batches and lengths."""
    model = Bert(BertConfig()).eval()
    graph_module = capture(model, (torch.randint(0, 256, (2, 5)),))
    for shape in ((1, 1), (3, 11)):
        input_ids = torch.randint(0, 256, shape)
        torch.testing.assert_close(graph_module(input_ids), model(input_ids))


def test_pytrees_and_keyword_order() -> None:
    """Protects: nested inputs, keywords in another order than the signature's, dict outputs."""

    class Model(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"sum": pair[0] * scale + shift, "other": pair[1]}

    inputs = {"shift": torch.randn(2, 3), "scale": torch.randn(2, 3)}
    pair = (torch.randn(2, 3), torch.randn(4, 2))
    graph_module = capture(Model(), (pair,), inputs)
    torch.testing.assert_close(graph_module(pair, **inputs), Model()(pair, **inputs))


def test_leaves_the_model_as_it_was() -> None:
    """Protects: training flags, which may differ between modules, come back; weights are shared, not copied."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    model[1].eval()
    graph_module = capture(model, (torch.randn(2, 4),))
    assert [module.training for module in model] == [True, False, True]
    assert graph_module.get_parameter("0.weight") is model.get_parameter("0.weight")
    x = torch.randn(3, 4)
    model.eval()
    torch.testing.assert_close(graph_module(x), model(x))


def test_inputs_that_do_not_fit() -> None:
    """Protects: the message shows what was given and the model's own error."""
    with pytest.raises(CaptureError, match=r"(?s)do not fit Linear: called with \(float32\[2, 3\]\).*RuntimeError"):
        capture(nn.Linear(4, 4), (torch.randn(2, 3),))


def test_a_model_that_cannot_be_traced() -> None:
    """Protects: the message names the file, line and text of the model where tracing stopped."""

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the line to name
                return x
            return -x

    with pytest.raises(CaptureError, match=r"Branches cannot be traced: .*test_capture\.py:\d+, `if x\.sum\(\) > 0"):
        capture(Branches(), (torch.ones(2, 3),))
