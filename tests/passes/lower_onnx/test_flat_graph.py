"""Pytrees taken apart: names, constants, sizes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsify import export_onnx, sparsify
from sparsify.errors import ExportError
from sparsify.passes.capture import capture
from sparsify.passes.lower_onnx.flat_graph import (
    FlatGraph,
    axis_names,
    flatten_graph,
    free_sizes,
    resize_inputs,
    with_names,
    with_outputs,
)
from sparsify.passes.lower_onnx.trace_onnx import trace_onnx
from sparsify.sparse_model import SparseModel, SparseModelInfo


def _flat(model: nn.Module, *args: object, **kwargs: object) -> FlatGraph:
    graph_module = capture(model, args, kwargs)
    sparse = SparseModel(graph_module, graph_module.graph)
    sparse.info = SparseModelInfo(args, kwargs, {}, None)
    return flatten_graph(sparse, args, kwargs, sparse.dynamic_dims())


class _Pytrees(nn.Module):
    def forward(self, x: Tensor, extra: dict, scale: int = 1, nothing: None = None) -> dict:
        y = x * scale + extra["add"]
        return {"x": y, "parts": (y + 1, None, y.sum())}


def test_takes_pytrees_apart(sparse_transformer) -> None:
    """Inputs are the tensors only, outputs carry their path, and an output named like an input gets another name."""
    x = torch.randn(2, 3)
    model = _Pytrees()
    flat = _flat(model, x, {"add": x + 1}, scale=3, nothing=None)
    assert len(flat.inputs) == 2
    assert flat.output_names == ("x_out", "parts_0", "parts_2")
    y, first, total = flat.module()(*flat.inputs.values())
    expected = model(x, {"add": x + 1}, scale=3)
    assert torch.equal(y, expected["x"])
    assert torch.equal(first, expected["parts"][0])
    assert torch.equal(total, expected["parts"][2])


class _Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


def test_names_outputs_without_keys() -> None:
    """The names that a user of the file has to type."""
    assert _flat(_Tuple(), torch.randn(2, 3)).output_names == ("output", "output_1")


def test_takes_other_names() -> None:
    """Protects: names go by the order of the values, sizes stay with their input."""
    flat = with_names(_flat(_Masked(), torch.ones(2, 3), torch.ones(2, 3)), ["tokens", "attend"], ["masked"])
    assert list(flat.inputs) == list(flat.size_names) == ["tokens", "attend"]
    assert flat.output_names == ("masked",)
    assert axis_names(flat)["tokens"] == {0: "batch", 1: "sequence"}
    assert axis_names(with_names(flat, None, None)) == axis_names(flat)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (["tokens"], None, "input_names must hold a name for each of 2 values, in the order ids, mask"),
        ("ab", None, "input_names must hold"),
        (["tokens", ""], None, "input_names must hold"),
        (None, ["a", "b"], "output_names must hold a name for each of 1 values"),
        (["tokens", "tokens"], None, "got tokens more than once"),
        (["tokens", "mask"], ["mask"], "got mask more than once"),
    ],
)
def test_refuses_names_that_do_not_fit(inputs: list[str] | None, outputs: list[str] | None, reason: str) -> None:
    """Protects: a name too few must not shift the others, and ONNX names every value once."""
    flat = _flat(_Masked(), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=reason):
        with_names(flat, inputs, outputs)


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


def test_names_axes() -> None:
    """Readable axes; the channels, which tracing fixed, are no axis."""
    assert axis_names(_flat(_Image(), torch.randn(2, 3, 8, 6))) == {"image": {0: "batch", 2: "height", 3: "width"}}


class _Masked(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids * mask


def test_resizes_inputs_alike() -> None:
    """Sizes of one name change together; values are those of the example, so ids stay ids."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    flat = _flat(_Masked(), ids, torch.ones(2, 3, dtype=torch.int64))
    sizes = free_sizes(flat)
    assert list(sizes.values()) == [2, 3]
    resized = resize_inputs(flat, dict(zip(sizes, (3, 2), strict=True)))
    assert resized["ids"].tolist() == [[5, 6], [8, 9], [5, 6]]
    assert resized["mask"].shape == (3, 2)


def test_follows_derived_sizes() -> None:
    """A size written `s0 + 1` is computed from `s0`, and not chosen."""
    flat = _flat(_Masked(), torch.ones(2, 3), torch.ones(2, 3))
    names = {"ids": {1: "s0"}, "mask": {1: "s0 + 1"}}
    derived = FlatGraph(flat.graph, flat.root, flat.inputs, flat.output_names, {**names})
    assert free_sizes(derived) == {"s0": 3}
    assert resize_inputs(derived, {"s0": 6})["mask"].shape == (2, 7)


def test_leaves_the_model_alone() -> None:
    """Flattening and adding outputs work on copies that share the weights."""
    model = capture(_Image(), (torch.randn(2, 3, 8, 6),))
    before = str(model.graph)
    flat = flatten_graph(model, (torch.randn(2, 3, 8, 6),), {}, {})
    more = with_outputs(flat, lambda graph: [graph.find_nodes(op="placeholder")[0]])
    assert len(more(*flat.inputs.values())) == 2
    assert str(model.graph) == before
    assert more.get_parameter("conv.weight") is model.get_parameter("conv.weight")


def test_refuses_other_inputs() -> None:
    """Inputs of another structure would land at the wrong placeholders."""
    model = capture(_Masked(), (torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(ExportError, match="do not fit the captured model"):
        flatten_graph(model, (torch.ones(2, 3),), {}, {})
    with pytest.raises(ExportError, match="hold 3 values, but the captured model takes 2"):
        flatten_graph(model, (torch.ones(2, 3), [torch.ones(2, 3)] * 2), {}, {})


class _NoTensor(nn.Module):
    def forward(self, x: Tensor) -> dict:
        return {"nothing": None}


def test_refuses_a_model_without_output() -> None:
    """An ONNX graph without outputs is not valid."""
    with pytest.raises(ExportError, match="returns no tensor"):
        _flat(_NoTensor(), torch.ones(2, 3))


class _Checked(nn.Module):
    """Asserts a condition on its values, and returns one of them twice."""

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        torch._check_tensor_all((ids >= 0) & (ids < 9))
        y = x * 2
        return {"a": y, "b": y + 1, "c": y, "d": y}


def test_assertions_and_values_returned_twice(tmp_path: Path) -> None:
    """A file has no assertions, and every output its own name."""
    inputs = (torch.randn(2, 3), torch.ones(2, dtype=torch.int64))
    flat = _flat(_Checked(), *inputs)
    assert not [node for node in flat.graph.nodes if "assert" in str(node.target) or "all" in str(node.target)]
    ir.save(trace_onnx(flat, 20), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["a", "b", "c", "d"], {"x": inputs[0].numpy(), "ids": inputs[1].numpy()})
    for ours, dense in zip(found, _Checked()(*inputs).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), dense)


class _DeadEnd(nn.Module):
    """Its second FFN is computed for nothing, as the last layer of some encoders is for one of their streams.

    The dropout keeps it in the graph: to fx, what may draw random numbers is never dead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.dead = (nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        functional.dropout(self.dead(x), 0.1, self.training)
        return self.ffn(x)


def test_a_layer_that_nothing_reads(tmp_path: Path) -> None:
    """It is not in the file, and not looked for there."""
    sparse = sparsify(_DeadEnd().eval(), torch.randn(3, 6), num_experts=4, top_k=2, select="all", router_hidden_size=4)
    report = export_onnx(sparse, tmp_path / "m.onnx")
    assert [layer.name for layer in report.layers] == ["ffn"]
