"""Ids and labels reach every FFN: from the model's own input or an added one, in any layout of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import SparseModel, export_onnx, sparsify
from sparsify.errors import SelectionError
from sparsify.passes.thread_ids import own_inputs

HASH: dict[str, Any] = {"start": "upcycle", "router": "hash", "num_experts": 4, "top_k": 1, "select": "all"}
DEMIX: dict[str, Any] = {**HASH, "router": "demix"}


class FFN(nn.Module):
    def __init__(self, kernel: bool = False) -> None:
        super().__init__()
        self.up = nn.Conv2d(8, 24, 1) if kernel else nn.Linear(8, 24)
        self.down = nn.Conv2d(24, 8, 1) if kernel else nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Text(nn.Module):
    """Two embeddings and an FFN, called twice, in the given layout of its tokens."""

    def __init__(self, flat: bool = False, calls: int = 1) -> None:
        super().__init__()
        self.types, self.words = nn.Embedding(2, 8), nn.Embedding(40, 8)
        self.ffn, self.flat, self.calls = FFN(), flat, calls

    def forward(self, input_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = x if token_types is None else x + self.types(token_types)
        for _ in range(self.calls):
            y = self.ffn(x.reshape(-1, 8)).view(x.shape) if self.flat else self.ffn(x)
            x = x + y
        return x


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = FFN(kernel=True)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels + self.ffn(pixels)


def set_apart(sparse: SparseModel) -> SparseModel:
    """Expert e adds e to every feature, so that the output says which one ran."""
    for name, parameter in sparse.named_parameters():
        if ".experts." in name:
            parameter.data.zero_()
            if name.endswith("experts.up_proj_bias"):
                parameter.data[:, 0] = torch.arange(len(parameter)).float()
            if name.endswith("experts.down_proj"):
                parameter.data[:, :, 0] = 1.0
    return sparse


def table_of(sparse: SparseModel) -> Tensor:
    (router,) = sparse.routers.values()
    return router.get_buffer("table")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("calibrated", [False, True])
def test_token_ids_choose_the_expert(flat: bool, calls: int, calibrated: bool) -> None:
    """Protects: ids of the vocabulary, not those of the small embedding; every call site; other sizes than traced."""
    model, ids = Text(flat, calls).eval(), torch.randint(0, 40, (2, 5))
    types = torch.zeros_like(ids)
    batches = [(torch.randint(0, 40, (3, 9)), torch.zeros(3, 9, dtype=torch.int64))] if calibrated else None
    sparse = sparsify(model, (ids, types), calibration=batches, **HASH)
    torch.testing.assert_close(sparse(ids, types), model(ids, types), rtol=1e-5, atol=1e-5)
    assert "routers read the integers of the input `input_ids`" in sparse.report.notes
    other = torch.randint(0, 40, (3, 7))
    assert len(table_of(sparse)) == 40
    added = set_apart(sparse)(other, torch.zeros_like(other)) - (model.words(other) + model.types.weight[0])
    expected = calls * table_of(sparse)[other].float().unsqueeze(-1).expand(3, 7, 8)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)


def test_another_input_can_be_named() -> None:
    """Protects: `ids_input`."""
    ids, types = torch.randint(0, 40, (2, 5)), torch.randint(0, 2, (2, 5))
    model = Text().eval()
    sparse = set_apart(sparsify(model, (ids, types), ids_input="token_types", **HASH))
    assert len(table_of(sparse)) == 2
    added = sparse(ids, types) - (model.words(ids) + model.types(types))
    torch.testing.assert_close(added[..., 0], table_of(sparse)[types].float(), rtol=1e-4, atol=1e-4)


def test_balanced_by_the_calibration_data() -> None:
    """Protects: `balanced` sees the ids of the calibration data, padding left out."""
    ids = torch.cat([torch.zeros(2, 30, dtype=torch.int64), torch.randint(1, 40, (2, 30))], 1)
    sparse = sparsify(Text().eval(), (ids,), calibration=[ids], router_options={"balanced": True}, **HASH)
    table = table_of(sparse)
    alone = (table == table[0]).sum()
    assert alone < (table != table[0]).sum() / 3  # the id that is half of the text shares its expert with few


@pytest.mark.parametrize("layout", ["sequence", "flat", "image"])
@pytest.mark.parametrize("by", ["call", "entry", "token"])
def test_labels_are_an_added_keyword(layout: str, by: str) -> None:
    """Protects: a label for a call, for each entry of the batch or for each token, spread over the tokens."""
    model = Image().eval() if layout == "image" else Text(layout == "flat").eval()
    example = torch.randn(2, 8, 3, 5) if layout == "image" else torch.randint(0, 40, (2, 5))
    shape = {"call": (), "entry": (2,), "token": (2, 3, 5) if layout == "image" else (2, 5)}[by]
    labels = torch.randint(0, 4, shape)
    sparse = sparsify(model, (example,), {"expert_labels": labels}, **DEMIX)
    with torch.no_grad():
        torch.testing.assert_close(sparse(example, expert_labels=labels), model(example), rtol=1e-5, atol=1e-5)
        ran = set_apart(sparse)(example, expert_labels=labels)
    dense = example if layout == "image" else model.get_submodule("words")(example)
    ran = (ran - dense).movedim(1, -1)[..., 0] if layout == "image" else (ran - dense)[..., 0]
    expected = labels.reshape(*shape, *[1] * (ran.dim() - len(shape))).expand(ran.shape)
    torch.testing.assert_close(ran, expected.float(), rtol=1e-4, atol=1e-4)


def test_labels_survive_calibration_saving_and_export(tmp_path: Path) -> None:
    """Protects: the added input is one of the model: calibration, files and onnxruntime know it."""
    model, ids, labels = Text().eval(), torch.randint(0, 40, (2, 5)), torch.tensor([3, 1])
    batches = [((torch.randint(0, 40, (3, 6)),), {"expert_labels": torch.tensor([0, 1, 2])})]
    sparse = sparsify(model, (ids,), {"expert_labels": labels}, calibration=batches, **DEMIX)
    assert sparse.report.ffns[0].tokens_per_expert[3] == 0
    sparse.save(tmp_path / "saved")
    loaded = SparseModel.load(tmp_path / "saved")
    assert torch.equal(loaded(ids, expert_labels=labels), sparse(ids, expert_labels=labels))
    report = export_onnx(set_apart(sparse), tmp_path / "model.onnx")
    assert report.parity is not None
    assert len(report.parity.shapes) > 1
    with pytest.raises(TypeError, match="expert_labels"):
        sparse(ids)


@pytest.mark.parametrize(
    ("model", "kwargs", "options", "message"),
    [
        (Image(), {}, HASH, "no embedding of the model reads an integer input"),
        (Text(), {}, DEMIX, r"no integer input of that name, only input_ids.*torch.zeros\(B, dtype=torch.int64\)"),
        (Text(), {}, {**HASH, "ids_input": "words"}, "no integer input of that name, only input_ids"),
        (Text(), {"expert_labels": torch.zeros(2)}, DEMIX, r"must hold integers, got torch.float32; use .long\(\)"),
        (
            Text(),
            {"expert_labels": torch.zeros(3).long()},
            DEMIX,
            r"has the shape \[3\], and the tokens .* have \[2, 5\]",
        ),
    ],
)
def test_refusals(model: nn.Module, kwargs: dict[str, Any], options: dict[str, Any], message: str) -> None:
    """Protects: ids that are not there, or do not fit, are told with what to give instead."""
    example = torch.randn(2, 8, 3, 5) if isinstance(model, Image) else torch.randint(0, 40, (2, 5))
    with pytest.raises(SelectionError, match=message):
        sparsify(model.eval(), (example,), kwargs, **options)


def test_a_label_outside_the_table() -> None:
    """Protects: it is refused at the conversion, and in a call."""
    ids = torch.randint(0, 40, (2, 5))
    with pytest.raises(ValueError, match="knows the ids 0 to 3, got 7; give num_experts as large"):
        sparsify(Text().eval(), (ids,), {"expert_labels": torch.tensor([0, 7])}, **DEMIX)
    sparse = sparsify(Text().eval(), (ids,), {"expert_labels": torch.tensor([0, 3])}, **DEMIX)
    with pytest.raises(ValueError, match="got -1"):
        sparse(ids, expert_labels=torch.tensor([0, -1]))


def test_ids_input_needs_a_router_that_reads_it() -> None:
    """Protects: an option that would do nothing is refused."""
    with pytest.raises(ValueError, match="'top-k' with these router_options reads none"):
        sparsify(Text().eval(), (torch.randint(0, 40, (2, 5)),), start="upcycle", router="top-k", ids_input="input_ids")


def test_own_inputs_are_those_of_the_dense_model() -> None:
    """Protects: the dense model beside a converted one is called without the added input, and with all else."""

    class TakesAny(nn.Module):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return x + len(more)

    given = {"token_types": torch.zeros(1), "expert_labels": torch.zeros(1).long()}
    assert list(own_inputs(Text(), given)) == ["token_types"]
    assert list(own_inputs(TakesAny(), given)) == ["token_types"]
    assert list(own_inputs(Text(), {"domain": torch.zeros(1)})) == []
