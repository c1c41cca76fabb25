"""Groups of tokens: sequences, images and calls, as the model has them; conversion, graft and files agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, export_onnx, sparsify
from sparsify.errors import SelectionError
from sparsify.routers.soft_moe_router import SoftMoERouter

OPTIONS: dict[str, Any] = {"start": "upcycle", "num_experts": 4, "top_k": 1, "select": "all"}


def but(**changes: Any) -> dict[str, Any]:
    """The options, some of them changed."""
    return {**OPTIONS, **changes}


class FFN(nn.Module):
    def __init__(self, kernel: bool = False) -> None:
        super().__init__()
        self.up = nn.Conv2d(8, 24, 1) if kernel else nn.Linear(8, 24)
        self.down = nn.Conv2d(24, 8, 1) if kernel else nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.norm, self.layout, self.ffn = nn.LayerNorm(8), layout, FFN(layout == "image")

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "image":
            return x + self.ffn(x)
        y = self.norm(x)
        return x + (self.ffn(y.view(-1, 8)).view(x.shape) if self.layout == "flat" else self.ffn(y))


def example(layout: str, batch: int = 2, length: int = 6) -> Tensor:
    return torch.randn(batch, 8, 2, length) if layout == "image" else torch.randn(batch, length, 8)


def soft_by_loops(sparse: SparseModel, x: Tensor) -> Tensor:
    """The converted FFN of `[G, S, D]`, in fp64."""
    (router,) = sparse.routers.values()
    assert isinstance(router, SoftMoERouter)
    weights = {name.rpartition(".")[2]: p.detach().double() for name, p in sparse.named_parameters() if "ffn." in name}
    dispatch, combine = (part.detach() for part in router.double().mixtures(x.double()))
    router.float()
    slots = router.num_experts * router.top_k
    y = torch.zeros(*x.shape[:2], 8, dtype=torch.float64)
    for g in range(len(x)):
        for s in range(slots):
            e = s // router.top_k
            slot = sum((dispatch[g, t, s] * x[g, t].double() for t in range(x.shape[1])), torch.zeros(8).double())
            hidden = torch.relu(weights["up_proj"][e] @ slot + weights["up_proj_bias"][e])
            y[g] += combine[g, :, s, None] * (weights["down_proj"][e] @ hidden)
    return y + weights["bias"]


@pytest.mark.parametrize("layout", ["sequence", "flat", "image"])
@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_mixes_within_an_entry(layout: str, slots: int) -> None:
    """Protects: the graph of Soft MoE: slots of each sequence or image, back to its tokens; other sizes than traced."""
    model = Model(layout).eval()
    sparse = sparsify(model, (example(layout),), router="soft-moe", **but(top_k=slots))
    for parameter in sparse.routers["ffn"].parameters():
        parameter.data.mul_(3.0)
    for name, parameter in sparse.named_parameters():
        if ".experts." in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = example(layout, 3, 5)
    found = (sparse(x) - x).detach()
    tokens = x.movedim(1, -1).flatten(1, 2) if layout == "image" else nn.functional.layer_norm(x, (8,))
    found = found.movedim(1, -1).flatten(1, 2) if layout == "image" else found
    torch.testing.assert_close(found.double(), soft_by_loops(sparse, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["sequence", "flat", "image"])
@pytest.mark.parametrize("router", ["expert-choice", "soft-moe"])
def test_entries_of_a_batch_do_not_meet(layout: str, router: str) -> None:
    """Protects: the group is one sequence or image, also where the model flattens them before its FFN."""
    sparse = sparsify(Model(layout).eval(), (example(layout),), router=router, **OPTIONS)
    x = example(layout, 3, 5)
    torch.testing.assert_close(sparse(x)[1:2], sparse(x[1:2]), rtol=1e-5, atol=1e-6)
    size = 12 if layout == "image" else 6
    assert any(f"the {size} tokens of each entry of the batch compete" in note for note in sparse.report.notes)


def test_plain_tokens_are_one_group() -> None:
    """Protects: without a sequence dimension all tokens of a call compete, and the report says so."""
    sparse = sparsify(FFN().eval(), (torch.randn(10, 8),), router="expert-choice", **OPTIONS)
    assert any("all tokens of a call compete" in note for note in sparse.report.notes)
    assert sparse(torch.randn(7, 8)).shape == (7, 8)


@pytest.mark.parametrize("layout", ["sequence", "flat", "image"])
@pytest.mark.parametrize("router", ["expert-choice", "soft-moe", "mixture-of-depths"])
def test_groups_survive_the_graft(layout: str, router: str) -> None:
    """Protects: experts in the modules of the original model compete within the same groups."""
    model, x = Model(layout).eval(), example(layout)
    options = but(num_experts=1) if router == "mixture-of-depths" else OPTIONS
    sparse = sparsify(model, (x,), router=router, **options)
    expected = sparse(x)
    report = sparse.graft(model)
    if layout == "flat":
        assert "ffn is given them in one row" in report.skipped["ffn"]
        return
    assert not report.skipped
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_shared_keeps_the_whole_ffn_beside_the_slots() -> None:
    """Protects: `start="shared"` makes Soft MoE and expert choice start as the dense model."""
    for router in ("soft-moe", "expert-choice"):
        model, x = Model("sequence").eval(), example("sequence")
        sparse = sparsify(model, (x,), **but(router=router, start="shared"))
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-6)
        upcycled = sparsify(model, (x,), router=router, **OPTIONS)
        assert upcycled.report.ffns[0].error is not None
        assert upcycled.report.ffns[0].error > 0.01
        assert any("the start is not the dense model" in note for note in upcycled.report.notes)


@pytest.mark.parametrize("router", ["expert-choice", "soft-moe"])
def test_export_and_save(router: str, tmp_path: Path) -> None:
    """Protects: groups in onnxruntime at other sizes, for a flattening model, and in a saved one."""
    x = example("flat")
    sparse = sparsify(Model("flat").eval(), (x,), **but(router=router, top_k=2))
    sparse.routers["ffn"].get_parameter("phi" if router == "soft-moe" else "weight").data.normal_()
    report = export_onnx(sparse, tmp_path / "model.onnx")
    assert report.parity is not None
    assert len(report.parity.shapes) > 1
    sparse.save(tmp_path / "saved")
    assert torch.equal(SparseModel.load(tmp_path / "saved")(x), sparse(x))


def test_refuses_groups_below_one_slot() -> None:
    """Protects: expert choice with less than one slot for an expert names the FFN and says what to change."""
    with pytest.raises(SelectionError, match="ffn: with groups of 3 tokens each of 4 experts would take 3"):
        sparsify(Model("sequence").eval(), (example("sequence", length=3),), router="expert-choice", **OPTIONS)
