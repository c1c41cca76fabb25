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
        self.norm, self.layout = nn.LayerNorm(8), layout
        self.ffn: nn.Module = FFN(layout == "image")

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


class Swish(nn.Module):
    """Gated, with a number of its own for every neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24, bias=False), nn.Linear(24, 8)
        self.beta = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(self.beta * gate) * self.up(x))


def merged_by_loops(weights: dict[str, Tensor], shares: Tensor, x: Tensor, gated: bool) -> Tensor:
    """`[T, D]` by experts merged with the shares `[T, E]` of each token, in fp64."""
    rows: list[Tensor] = []
    for token, share in zip(x.double(), shares.double(), strict=True):
        merged = {name: sum((p * part for p, part in zip(share, bank, strict=True)), torch.zeros(()).double())
                  for name, bank in weights.items() if name != "bias"}  # fmt: skip
        if gated:
            gate = merged["gate_proj"] @ token + merged["gate_proj_bias"]
            hidden = gate * torch.sigmoid(merged["vector_0"] * gate) * (merged["up_proj"] @ token)
        else:
            hidden = torch.relu(merged["up_proj"] @ token + merged["up_proj_bias"])
        rows.append(merged["down_proj"] @ hidden + weights["bias"])
    return torch.stack(rows)


@pytest.mark.parametrize("layout", ["sequence", "flat", "image", "gated"])
@pytest.mark.parametrize("router", ["smear", "lory"])
def test_experts_are_merged_for_a_segment(layout: str, router: str, tmp_path: Path) -> None:
    """Protects: the graph of SMEAR and Lory: every weight is merged, once for a segment; in files too."""
    model = Model("sequence" if layout == "gated" else layout)
    model.ffn = Swish() if layout == "gated" else model.ffn
    given: dict[str, Any] = {"router_options": {"segment_size": 4}} if router == "lory" else {}
    x = example(layout)
    sparse = sparsify(model.eval(), (x,), router=router, **but(**given))
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    for name, parameter in sparse.named_parameters():
        if ".experts." in name or ".router." in name:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    x = example(layout, 3, 5)
    found = (sparse(x) - x).detach().movedim(1 if layout == "image" else -1, -1).reshape(-1, 8)
    tokens = x.movedim(1, -1).flatten(1, 2) if layout == "image" else nn.functional.layer_norm(x, (8,))
    weights = {n.rpartition(".")[2]: p.detach().double() for n, p in sparse.named_parameters() if ".experts." in n}
    shares = sparse.routers["ffn"](tokens)[0].detach()
    expected = merged_by_loops(weights, shares, tokens.flatten(0, 1), layout == "gated")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    sparse.save(tmp_path / "saved")
    assert torch.equal(SparseModel.load(tmp_path / "saved")(x), sparse(x))
    if layout in ("flat", "gated"):  # an export takes longer than all else
        report = export_onnx(sparse, tmp_path / "model.onnx", routing_outputs=True)
        assert report.parity is not None
        assert len(report.parity.shapes) > 1
    with pytest.raises(ValueError, match="are merged anew for every sequence"):
        sparse.to_dense()
    with pytest.raises(ValueError, match="all its experts are merged for every token"):
        sparse.prune(2, sparse.routing_stats([x]))


@pytest.mark.parametrize("layout", ["sequence", "flat", "image"])
@pytest.mark.parametrize("router", ["expert-choice", "soft-moe", "smear"])
def test_entries_of_a_batch_do_not_meet(layout: str, router: str) -> None:
    """Protects: the group is one sequence or image, also where the model flattens them before its FFN."""
    sparse = sparsify(Model(layout).eval(), (example(layout),), router=router, **OPTIONS)
    x = example(layout, 3, 5)
    torch.testing.assert_close(sparse(x)[1:2], sparse(x[1:2]), rtol=1e-5, atol=1e-6)
    size = 12 if layout == "image" else 6
    action = "are the sequences for which experts are merged" if router == "smear" else "compete for experts"
    assert any(f"the {size} tokens of each entry of the batch {action}" in note for note in sparse.report.notes)


def test_plain_tokens_are_one_group() -> None:
    """Protects: without a sequence dimension all tokens of a call compete, and the report says so."""
    sparse = sparsify(FFN().eval(), (torch.randn(10, 8),), router="expert-choice", **OPTIONS)
    assert any("all tokens of a call compete" in note for note in sparse.report.notes)
    assert sparse(torch.randn(7, 8)).shape == (7, 8)


@pytest.mark.parametrize("layout", ["sequence", "flat", "image"])
@pytest.mark.parametrize("router", ["expert-choice", "soft-moe", "mixture-of-depths", "smear"])
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
    for router in ("soft-moe", "expert-choice", "smear"):
        model, x = Model("sequence").eval(), example("sequence")
        sparse = sparsify(model, (x,), **but(router=router, start="shared"))
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-6)
        if router == "smear":  # starts as the dense model either way
            continue
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
