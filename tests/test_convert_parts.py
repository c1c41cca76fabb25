"""A model that cannot be traced as a whole: its parts are converted, and the model with them is the result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import PartialSparseModel, SparseModel, export_onnx, inspect, sparsify
from sparsify.errors import CalibrationError, CaptureError, ExportError, NoFFNError, OutputError

OPTIONS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "select": "all", "router_hidden_size": 4}

LAYERS: dict[str, Any] = {**OPTIONS, "select": "layers.*"}
HEAD: dict[str, Any] = {**OPTIONS, "select": "head"}
EXACT: dict[str, Any] = {**OPTIONS, "top_k": 4, "refit": False}


class FeedForward(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(size, 13), nn.GELU(), nn.Linear(13, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix, self.ffn = nn.Linear(size, size), FeedForward(size)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.mix(x).cumsum(1)
        return x + self.ffn(x)


class Functional(Block):
    """Its FFN is code of the block, so there is no module to put experts into."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + self.ffn.down(F.relu(self.ffn.up(x)))


class Branching(nn.Module):
    """Cannot be traced: it branches on values between its blocks; the head is an FFN that is a part of its own."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(6), block(6)])
        self.head: nn.Module = FeedForward(6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            if x.sum() > 1e6:
                return {"out": x}
            x = layer(x, attention_mask=attention_mask)
        return {"out": self.head(x)}


X = torch.randn(2, 5, 6)


@pytest.fixture
def model() -> Branching:
    return Branching().eval()


def test_inspection_names_ffns_as_the_model_does(model: Branching) -> None:
    """Protects: names and plans are those of the whole model; what was not traced is listed with its line."""
    found = inspect(model, (X,))
    assert [ffn.name for ffn in found.ffns] == ["layers.0.ffn", "layers.1.ffn", "head"]
    assert [part.name for part in found.skipped] == [""]
    assert "`if x.sum() > 1e6:` (test_convert_parts.py:" in str(found.skipped[0])


def test_all_experts_compute_the_dense_model(model: Branching) -> None:
    """Protects: exactness at sizes other than the example's, inputs and outputs as they were, the model untouched."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = sparsify(model, (X,), **EXACT)
    assert len(sparse.report.converted) == 3
    for shape in ((2, 5, 6), (1, 1, 6), (3, 11, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x)["out"], model(x)["out"], rtol=1e-5, atol=1e-5)
    assert isinstance(model.head, FeedForward)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sparse.report.output_error < 1e-5
    assert any("cannot be traced as a whole" in note and "x.sum() > 1e6" in note for note in sparse.report.notes)


def test_weights_are_shared(model: Branching) -> None:
    """Protects: what is not converted is not copied."""
    sparse = sparsify(model, (X,), **OPTIONS)
    assert isinstance(sparse, PartialSparseModel)
    name = "layers.0.mix.weight"
    assert sparse.original.get_parameter(name) is model.get_parameter(name)


def test_top_k_and_selection(model: Branching) -> None:
    """Protects: patterns speak of names in the whole model; set_top_k reaches every router."""
    sparse = sparsify(model, (X,), **LAYERS)
    assert list(sparse.routers) == ["layers.0.ffn", "layers.1.ffn"]
    sparse.set_top_k(4)
    torch.testing.assert_close(sparse(X)["out"], model(X)["out"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="top_k must be between"):
        sparse.set_top_k(5)
    plan = inspect(model, (X,)).plan(**HEAD)
    assert list(sparsify(model, (X,), plan=plan).routers) == ["head"]


def test_calibration_sees_what_the_part_is_called_with(model: Branching) -> None:
    """Protects: tokens of every batch count, but for padding, though the parts may use their mask in another sense."""
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    batches = [{"x": torch.randn(2, 5, 6), "attention_mask": mask} for _ in range(3)]
    sparse = sparsify(model, (), {"x": X, "attention_mask": mask}, calibration=batches, **OPTIONS)
    assert sparse.report.calibration_tokens == 18
    assert all(ffn.error_before_refit is not None for ffn in sparse.report.converted)


def test_a_batch_that_does_not_fit(model: Branching) -> None:
    """Protects: the batch is named."""
    with pytest.raises(CalibrationError, match=r"calibration batch 1.*do not fit"):
        sparsify(model, (X,), calibration=[X, torch.randn(2, 5, 7)], **OPTIONS)


class Inverted(Branching):
    """Gives its blocks a mask of the opposite sense, 0 for tokens."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(x, None if attention_mask is None else 1 - attention_mask)


def test_a_mask_within_the_model_is_no_padding() -> None:
    """Protects: without calibration data too, parts see all tokens of the example."""
    ones = torch.ones(2, 5, dtype=torch.int64)
    sparse = sparsify(Inverted().eval(), (), {"x": X, "attention_mask": ones}, **OPTIONS)
    assert len(sparse.report.converted) == 3


def test_unused_calibration_is_not_read(model: Branching) -> None:
    """Protects: data that can be read once is not consumed where every layer stays dense."""
    batches = iter([X])
    sparsify(model, (X,), calibration=batches, num_experts=64, top_k=2)
    assert next(batches) is X


def test_graft_copy_and_training(model: Branching) -> None:
    """Protects: grafting into the model itself, a deep copy that is independent, gradients in the experts."""
    sparse = sparsify(model, (X,), **OPTIONS)
    twin = copy.deepcopy(sparse)
    expected = sparse(X)["out"].detach()
    report = sparse.graft(model)
    assert len(report.grafted) == 3
    torch.testing.assert_close(model(X)["out"], expected)
    model.train()
    model(X)["out"].square().mean().backward()
    experts = model.get_parameter("layers.0.ffn.experts.up_proj")
    assert experts.grad is not None
    with torch.no_grad():
        experts.zero_()
    assert not torch.allclose(sparse(X)["out"], expected)
    torch.testing.assert_close(twin(X)["out"], expected)
    twin.set_top_k(3)
    assert {router.top_k for router in sparse.routers.values()} == {1}  # one more is shared


def test_what_cannot_go_back_stays_dense() -> None:
    """Protects: an FFN without a module of its own is a near miss here, with the reason, before any work."""
    model = Branching(Functional).eval()
    sparse = sparsify(model, (X,), **OPTIONS)
    assert list(sparse.routers) == ["layers.0.ffn", "head"]
    (rejected,) = [ffn for ffn in sparse.report.ffns if ffn.action == "rejected"]
    assert "cannot be put back" in rejected.reason
    assert "`relu` is code of layers.1" in rejected.reason


class Peeks(Block):
    """Reads a weight of its FFN from outside, which only shows when experts stand there."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x.to(self.ffn.up.weight.dtype))


def test_an_ffn_that_only_fails_when_replaced() -> None:
    """Protects: it is put back, reported as dense, and the others are experts."""
    model = Branching(Peeks).eval()
    sparse = sparsify(model, (X,), **EXACT)
    assert list(sparse.routers) == ["layers.0.ffn", "head"]
    (dense,) = [ffn for ffn in sparse.report.ffns if ffn.action == "dense"]
    assert dense.name == "layers.1.ffn"
    assert "raises" in dense.reason
    torch.testing.assert_close(sparse(X)["out"], model(X)["out"], rtol=1e-5, atol=1e-5)


def test_consumed_weights_are_freed(model: Branching) -> None:
    """Protects: dense weights go, those that are still used stay."""
    want = sparsify(model, (X,), **OPTIONS)(X)["out"]
    sparse = sparsify(model, (X,), consume_model=True, **OPTIONS)
    assert model.get_parameter("head.up.weight").numel() == 0
    assert model.get_parameter("layers.0.mix.weight").numel() == 36
    torch.testing.assert_close(sparse(X)["out"], want)


def test_what_needs_a_whole_graph_is_refused(model: Branching, tmp_path: Path) -> None:
    """Protects: saving and exporting say why not and what to do; allow_parts=False says it before any work."""
    sparse = sparsify(model, (X,), **OPTIONS)
    with pytest.raises(OutputError, match=r"keep|original\.state_dict"):
        sparse.save(tmp_path / "model")
    with pytest.raises(ExportError, match="not traced as a whole"):
        export_onnx(sparse, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CaptureError, match="cannot be traced"):
        sparsify(model, (X,), allow_parts=False, **OPTIONS)
    assert isinstance(sparse, SparseModel)


class Routed(nn.Module):
    """An MoE layer with a loop over its experts, and an FFN behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.unused = nn.Linear(6, 3), nn.Bilinear(6, 6, 6)
        self.experts = nn.ModuleList(FeedForward(6) for _ in range(3))
        self.ffn = FeedForward(6)

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(x[rows])
        return self.ffn(out)


def test_experts_of_the_model_itself() -> None:
    """Protects: an MoE layer that is there already is refused, expert by expert, whether all of them are called or one.

    An FFN that stands alone beside it is converted.
    """
    model = Routed().eval()
    for x in (torch.randn(20, 6), torch.randn(1, 6).expand(2, 6)):
        found = inspect(model, (x,))
        assert [ffn.name for ffn in found.ffns] == ["ffn"]
        assert found.rejected
        assert all(r.name.startswith("experts.") and "MoE layer" in r.reason for r in found.rejected)


class Draws(Branching):
    """Random in evaluation mode too."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(x[:, torch.randperm(x.shape[1])])


def test_a_model_that_draws_random_numbers() -> None:
    """Protects: dense and converted are compared with the same draws."""
    model = Draws().eval()
    sparse = sparsify(model, (X,), **EXACT)
    assert sparse.report.output_error < 1e-5
    assert len(sparse.graft(model).grafted) == 3


class NoFFN(nn.Module):
    """Nothing in it can be converted, and it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(6, 6)
        self.second: nn.Module = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 1e6 else self.second(x)


def test_nothing_to_convert() -> None:
    """Protects: without an FFN in any part, the error says what stopped the tracing."""
    for call in (inspect, sparsify):
        with pytest.raises(CaptureError, match=r"x\.sum\(\) > 1e6.*No part of it"):
            call(NoFFN(), (X,))


class Normalises(NoFFN):
    """A norm over the neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 6))


def test_only_near_misses() -> None:
    """Protects: near misses in the parts are shown, and the modules that were not traced."""
    with pytest.raises(NoFFNError, match=r"(?s)The nearest:.*norm.*Not traced: the model itself"):
        sparsify(Normalises(), (X,))
