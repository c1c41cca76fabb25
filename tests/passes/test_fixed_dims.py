"""`fixed_dims`: an input size that a model fixes is named with the line of the model that needs it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from sparsify import sparsify
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.vit import ViT, ViTConfig
from sparsify.passes.capture import capture
from sparsify.passes.fixed_dims import fixed_dims


def found(graph_module: GraphModule) -> dict[tuple[str, int], str]:
    """(input, dimension) -> the code in the reason."""
    return {
        (fixed.input, fixed.dim): re.findall("`(.+)`", fixed.reason)[0].partition("  #")[0]
        for fixed in fixed_dims(graph_module)
    }


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.flat = nn.Linear(24, 2)
        self.positions = nn.Parameter(torch.zeros(1, 6, 8))


def test_an_operation_that_fits_one_size() -> None:
    """Protects: features and positions are fixed, each by its own line, and the batch is not."""

    class Positions(Model):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            return hidden + self.positions  # [B, 6, 8]

    fixed = fixed_dims(capture(Positions(), (torch.randn(2, 6, 4),)))
    assert [(item.input, item.dim, item.size) for item in fixed] == [("x", 1, 6), ("x", 2, 4)]
    line = r"`return hidden \+ self\.positions  # \[B, 6, 8\]` \(test_fixed_dims\.py:\d+\)"
    assert re.fullmatch(
        rf"input `x` has a fixed size of 6 in dimension 1: {line} needs exactly that size", str(fixed[0])
    )
    assert "`hidden = self.linear(x)`" in fixed[1].reason


def test_a_branch_on_a_size() -> None:
    """Protects: Python code between two operations has its own line, not that of the operation after it."""

    class Branch(Model):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if x.shape[0] == 5 and y.shape[0] != 3:
                y = y * 2
            assert y.shape[1] == 7
            return x.sum() + y.sum()

    graph_module = capture(Branch(), (torch.randn(5, 6), torch.randn(2, 7)))
    assert found(graph_module) == {
        ("x", 0): "if x.shape[0] == 5 and y.shape[0] != 3:",
        ("y", 1): "assert y.shape[1] == 7",
    }


def test_a_condition_that_leaves_one_size() -> None:
    """Protects: 4 * S = 24 fixes S, which torch keeps dynamic; otherwise other sizes would be promised that crash."""

    class Flat(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x.flatten(1)).sum() + self.linear(x)

    graph_module = capture(Flat(), (torch.randn(2, 6, 4),))
    assert found(graph_module)["x", 1] == "return self.flat(x.flatten(1)).sum() + self.linear(x)"
    shape = graph_module.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    assert [isinstance(size, torch.SymInt) for size in shape[:2]] == [True, False]


def test_a_branch_on_sizes_that_leaves_one_of_each() -> None:
    """Protects: the line of a branch that no operation repeats."""

    class Area(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] * x.shape[2] == 15:
                x = x * 2
            return x + 1

    line = "if x.shape[1] * x.shape[2] == 15:"
    assert found(capture(Area(), (torch.randn(2, 3, 5),))) == {("x", 1): line, ("x", 2): line}


def test_a_size_tied_to_another_that_is_fixed_later() -> None:
    """Protects: both are reported, with the line that fixed them, not the one that tied them."""

    class Tied(Model):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert x.shape[1] == y.shape[1]
            return self.linear(y) + x.sum()

    graph_module = capture(Tied(), (torch.randn(3, 4), torch.randn(2, 4)))
    line = "return self.linear(y) + x.sum()"
    assert found(graph_module) == {("x", 1): line, ("y", 1): line}


def test_sizes_that_may_change_are_not_listed() -> None:
    """Protects: no note for what is free, even, tied to another input, half of it, or 1 in the example."""

    class Free(nn.Module):
        def forward(self, x: Tensor, y: Tensor, half: Tensor, one: Tensor) -> Tensor:
            pairs = x.T.unflatten(1, (-1, 2)).flatten(1).T
            return (pairs + y) * torch.cat([half, half]) * one

    sizes = ((6, 3), (6, 3), (3, 3), (1, 3))
    assert fixed_dims(capture(Free(), tuple(torch.randn(size) for size in sizes))) == ()
    assert fixed_dims(capture(Bert(BertConfig()), (torch.randint(0, 256, (2, 5)),))) == ()


def test_a_model_without_code_of_its_own() -> None:
    """Protects: the line of the torch layer is better than none; frames of the caller are not the model's."""
    graph_module = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (torch.randn(2, 4),))
    assert found(graph_module) == {("input_1", 1): "return F.linear(input, self.weight, self.bias)"}


def test_sizes_that_the_caller_fixed() -> None:
    """Protects: a dimension that `dynamic_shapes` fixes is the caller's choice, not news."""
    example = (torch.randn(2, 3, 4),)
    assert fixed_dims(capture(nn.Linear(4, 4), example, None, None)) == ()
    assert found(capture(nn.Linear(4, 4), example, None, ({2: torch.export.Dim.AUTO},))).keys() == {("input_1", 2)}


def test_graphs_without_a_record() -> None:
    """Protects: a graph that was traced otherwise, or loaded, gives nothing instead of an error."""
    assert fixed_dims(symbolic_trace(nn.Linear(4, 4))) == ()


@pytest.mark.parametrize("batch", [2, 3])
def test_a_vision_model(batch: int) -> None:
    """Protects: channels, height and width of an image, in a model that was not written for this test."""
    fixed = fixed_dims(capture(ViT(ViTConfig()), (torch.randn(batch, 3, 32, 32),)))
    assert [(item.dim, item.size) for item in fixed] == [(1, 3), (2, 32), (3, 32)]
    assert all("(vit.py:" in item.reason for item in fixed)


def test_the_report_says_so() -> None:
    """Protects: the notes of a conversion name fixed sizes and values, without a path of this machine."""

    class Scaled(Bert):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
            assert input_ids.shape[1] == 6
            return super().forward(input_ids, attention_mask) * scale

    inputs = {"input_ids": torch.randint(0, 256, (2, 6)), "scale": 2.0}
    notes = sparsify(Scaled(BertConfig()), (), inputs, num_experts=4, top_k=2, select="all").report.notes
    assert re.fullmatch(
        r"input `input_ids` has a fixed size of 6 in dimension 1: `assert input_ids\.shape\[1\] == 6` "
        r"\(test_fixed_dims\.py:\d+\) was traced with exactly that size",
        notes[0],
    )
    assert notes[1] == "inputs that are no tensors stay as in the example, whatever is passed: `scale` = 2.0"
