"""`capture_parts`: of a model that cannot be traced, the largest parts that can, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import CaptureError
from sparsify.passes.capture_parts import CapturedParts, capture_parts


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.ffn = feed_forward()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.ffn(x) * scale


class UntraceableBlock(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if x.abs().max().item() > 1e6:  # the block's own code
            return x
        return super().forward(x, scale)


class Branches(nn.Module):
    """Untraceable at the top and in one of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(), UntraceableBlock(), Block()])
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if x.sum() > 0:  # the root's own code
            x = -x
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def names(found: CapturedParts) -> list[str]:
    return [part.name for part in found.parts]


def skipped(found: CapturedParts) -> dict[str, str]:
    return {part.name: part.reason for part in found.skipped}


def assert_parts_compute(found: CapturedParts, model: nn.Module) -> None:
    model.eval()
    for part in found.parts:
        want = model.get_submodule(part.name)(*part.args, **part.kwargs)
        torch.testing.assert_close(part.graph_module(*part.args, **part.kwargs), want)


def test_a_model_that_can_be_traced_is_one_part() -> None:
    """Protects: nothing is taken apart without need."""
    model = Block()
    found = capture_parts(model, (torch.randn(2, 5, 8),))
    assert names(found) == [""]
    assert not found.skipped
    assert_parts_compute(found, model)


def test_branches_at_the_top_and_in_a_block() -> None:
    """Protects: traceable blocks are parts, an untraceable one is opened, each skipped module has its own line."""
    model = Branches().train()
    found = capture_parts(model, (torch.randint(0, 20, (2, 5)),))
    assert model.training
    assert names(found) == ["blocks.0", "blocks.1.attention", "blocks.1.ffn", "blocks.2"]
    assert_parts_compute(found, model)
    reasons = skipped(found)
    assert list(reasons) == ["", "blocks.1"]
    assert reasons[""].startswith("`if x.sum() > 0:  # the root's own code` (test_capture_parts.py:")
    assert "`if x.abs().max().item() > 1e6:  # the block's own code` (test_capture_parts.py:" in reasons["blocks.1"]


def test_parts_are_dynamic_and_share_weights() -> None:
    """Protects: a part serves other sizes than those of the example, is no copy, and has the names of the model."""
    model = Branches()
    part = capture_parts(model, (torch.randint(0, 20, (2, 5)),)).parts[0]
    model.eval()
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(part.graph_module(x), model.blocks[0](x))
    assert part.graph_module.get_parameter("blocks.0.ffn.0.weight") is model.get_parameter("blocks.0.ffn.0.weight")


def test_a_head_with_python_numbers() -> None:
    """Protects: the whole encoder is one part when only the head cannot be traced."""

    class Generates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(Block(), Block())
            self.head = feed_forward()

        def forward(self, *, x: Tensor) -> list[Tensor]:
            return list(self._steps(self.encoder(x)))

        def _steps(self, x: Tensor) -> Iterator[Tensor]:
            for _ in range(int(x.abs().argmax().item()) % 2 + 1):
                yield self.head(x)

    model = Generates()
    found = capture_parts(model, (), {"x": torch.randn(2, 5, 8)})
    assert names(found) == ["encoder", "head"]
    assert_parts_compute(found, model)
    assert "(test_capture_parts.py:" in skipped(found)[""]


class Holder(nn.Module):
    """Calls its parts as `steps` say, after code that cannot be traced."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, steps: list[tuple[str, float]]) -> Tensor:
        if x.sum() > 1e6:
            return x
        for name, scale in steps:
            x = self.get_submodule(name)(x, scale) if scale else self.get_submodule(name)(x)
        return x


X = torch.randn(2, 5, 8)


def test_a_module_with_two_names() -> None:
    """Protects: weights that two places share are captured once, in the largest module that holds them first."""
    ffn = feed_forward()
    model = Holder(first=ffn, again=ffn, outer=nn.Sequential(ffn, nn.LayerNorm(8), nn.Linear(8, 8)))
    found = capture_parts(model, (X, [("first", 0), ("again", 0), ("outer", 0)]))
    assert names(found) == ["first"]
    assert list(skipped(found)) == ["", "outer"]
    assert skipped(found)["outer"] == "holds a module that was dealt with before, under another name"


def test_a_module_within_a_part_is_no_part() -> None:
    """Protects: the inner module of a captured one is not captured again at its second place."""
    ffn = feed_forward()
    model = Holder(outer=nn.Sequential(ffn, nn.LayerNorm(8)), again=ffn)
    found = capture_parts(model, (X, [("outer", 0), ("again", 0)]))
    assert names(found) == ["outer"]


def test_a_module_that_is_called_in_different_ways() -> None:
    """Protects: other numbers than the first time are not seen by a graph, so only the inner modules become one."""
    model = Holder(block=Block())
    found = capture_parts(model, (X, [("block", 2.0), ("block", 3.0)]))
    assert names(found) == ["block.attention", "block.ffn"]
    assert skipped(found)["block"].startswith("called again with inputs that differ in more than")
    assert names(capture_parts(model, (X, [("block", 2.0), ("block", 2.0)]))) == ["block"]


def test_a_module_that_is_not_called() -> None:
    """Protects: weights that the example does not reach are listed, and as one."""
    model = Holder(used=Block(), unused=nn.ModuleList([Block(), Block()]))
    found = capture_parts(model, (X, [("used", 0)]))
    assert names(found) == ["used"]
    assert skipped(found)["unused"] == "not called with the example inputs"
    assert "unused.0" not in skipped(found)


def test_a_model_that_trains_otherwise() -> None:
    """Protects: what is called in evaluation mode counts, whatever mode the model is in."""

    class Trains(Holder):
        def forward(self, x: Tensor, steps: list[tuple[str, float]]) -> Tensor:
            return x if self.training else super().forward(x, steps)

    assert names(capture_parts(Trains(block=Block()).train(), (X, [("block", 0)]))) == ["block"]


def test_inputs_that_torch_does_not_know() -> None:
    """Protects: a module that is given an object is opened; the reason names the input."""

    class Cache:
        pass

    class WithCache(Block):
        def forward(self, x: Tensor, scale: Any = None) -> Tensor:
            return super().forward(x)

    model = Holder(block=WithCache())
    found = capture_parts(model, (X, [("block", Cache())]))  # pyright: ignore[reportArgumentType]
    assert names(found) == ["block.attention", "block.ffn"]
    assert "its input `scale` is a Cache" in skipped(found)["block"]


def test_inputs_that_do_not_fit() -> None:
    """Protects: bad example inputs are an error, not a list of skipped parts; no hook is left behind."""
    model = Branches()
    with pytest.raises(CaptureError, match="do not fit Branches"):
        capture_parts(model, (torch.randn(2, 5),))
    assert not any(module._forward_pre_hooks for module in model.modules())
