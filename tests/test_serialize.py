"""`SparseModel.save` and `SparseModel.load`: nothing is lost, and nothing is half-written."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import safetensors
import torch
from torch import nn
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from sparsify import serialize
from sparsify.errors import OutputError
from sparsify.routers import MLPRouter
from sparsify.sparse_model import SparseModel, SparseModelInfo

aten = torch.ops.aten


def captured(model: nn.Module, args=(), kwargs=None, dynamic_shapes=None) -> SparseModel:
    """The dense model as a SparseModel without experts, with its guards dropped as `capture` does."""
    kwargs = kwargs or {}
    exported = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    graph_module = exported.module()
    assert isinstance(graph_module, GraphModule)
    for node in graph_module.graph.find_nodes(op="call_module", target="_guards_fn"):
        graph_module.graph.erase_node(node)
    sparse = SparseModel(graph_module, graph_module.graph)
    sparse.info = SparseModelInfo(args, kwargs, {}, None)
    return sparse


def routed() -> SparseModel:
    """A graph as `insert_moe` writes it: 3 routed experts of width 2, down_proj a view of the dense matrix."""
    torch.manual_seed(0)
    dense_down = torch.randn(4, 6)  # [D, F]
    root = nn.Module()
    root.ffn = nn.Module()
    root.ffn.router = MLPRouter(hidden_size=4, num_experts=3, top_k=2, router_hidden_size=5)
    root.ffn.experts = nn.Module()
    root.ffn.experts.up_proj = nn.Parameter(torch.randn(3, 2, 4))
    root.ffn.experts.down_proj = nn.Parameter(dense_down.view(4, 3, 2).transpose(0, 1), requires_grad=False)
    graph = Graph()
    x = graph.placeholder("x")
    router = graph.call_module("ffn.router", (x,))
    weights, ids = (graph.call_function(operator.getitem, (router, i)) for i in range(2))
    dispatched = graph.call_function(torch.ops.sparsify.dispatch.default, (x, ids, 3))
    rows, order, offsets = (graph.call_function(operator.getitem, (dispatched, i)) for i in range(3))
    linear = torch.ops.sparsify.expert_linear.default
    hidden = graph.call_function(linear, (rows, graph.get_attr("ffn.experts.up_proj"), None, offsets))
    hidden = graph.call_function(aten.gelu.default, (hidden,), {"approximate": "tanh"})
    out = graph.call_function(linear, (hidden, graph.get_attr("ffn.experts.down_proj"), None, offsets))
    graph.output(graph.call_function(torch.ops.sparsify.combine.default, (out, weights, order)))
    sparse = SparseModel(root, graph)
    sparse.info = SparseModelInfo((torch.randn(5, 4),), {}, {"ffn": 1}, None)
    return sparse


def assert_same(loaded: SparseModel, saved: SparseModel, *args, **kwargs) -> None:
    """Bit for bit the same outputs, and the same graph, code, weights, routers and inputs."""
    want, want_spec = pytree.tree_flatten(saved(*args, **kwargs))
    got, got_spec = pytree.tree_flatten(loaded(*args, **kwargs))
    assert got_spec == want_spec
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert str(loaded.graph) == str(saved.graph)
    assert loaded.code == saved.code
    assert list(loaded.state_dict()) == list(saved.state_dict())
    for (name, a), b in zip(saved.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        assert torch.equal(a, b), name
    assert [n for n, _ in loaded.named_buffers()] == [n for n, _ in saved.named_buffers()]
    flags = [[(n, p.requires_grad) for n, p in model.named_parameters()] for model in (saved, loaded)]
    assert flags[0] == flags[1]
    assert loaded.dynamic_dims() == saved.dynamic_dims()
    assert {n: str(r) for n, r in loaded.routers.items()} == {n: str(r) for n, r in saved.routers.items()}
    assert loaded.training == saved.training
    assert loaded.info.num_shared_experts == saved.info.num_shared_experts
    assert loaded.info.report is None


class DictMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, *, scale=None, extra):
        y = self.down(torch.relu(self.up(x))) * extra["factor"]
        return {"y": y, "pair": (y + 1, [y.sum(-1), x.shape[0]]), "nothing": None}


@pytest.fixture(scope="module")
def mlp() -> SparseModel:
    kwargs = {"scale": None, "extra": {"factor": torch.randn(3, 4)}}
    shapes = {"x": {0: Dim.AUTO}, "scale": None, "extra": {"factor": {0: Dim.AUTO}}}
    return captured(DictMLP(), (torch.randn(3, 4),), kwargs, shapes)


@pytest.fixture
def folder(tmp_path):
    """A saved model with a router."""
    routed().save(tmp_path / "saved")
    return tmp_path / "saved"


def test_dict_outputs_and_keyword_inputs(mlp, tmp_path):
    """Protects the structure of inputs and outputs, example inputs, and dynamic dimensions with their names."""
    mlp.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert_same(loaded, mlp, torch.randn(7, 4), scale=None, extra={"factor": torch.randn(7, 4)})
    assert any(mlp.dynamic_dims().values())
    assert torch.equal(loaded.info.args[0], mlp.info.args[0])
    assert torch.equal(loaded.info.kwargs["extra"]["factor"], mlp.info.kwargs["extra"]["factor"])
    assert loaded.info.kwargs["scale"] is None


def test_save_load_save_gives_the_same_bytes(mlp, tmp_path):
    """Protects determinism, and that a loaded model can be saved again, over itself, without loss."""
    mlp.save(tmp_path / "a")
    first = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    SparseModel.load(tmp_path / "a").save(tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == first
    assert set(first) == {"graph.json", "model.safetensors"}


def test_routers_and_sparsify_ops(tmp_path):
    """Protects routers with their top_k, shared expert counts, our ops, and the layout of weights that are views."""
    saved = routed()
    saved.set_top_k(4)
    saved.save(tmp_path)
    state = torch.random.get_rng_state()
    loaded = SparseModel.load(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_same(loaded, saved, torch.randn(9, 4))
    assert loaded.routers["ffn"].top_k == 3
    down_projs = [model.get_parameter("ffn.experts.down_proj") for model in (saved, loaded)]
    assert [down_proj.stride() for down_proj in down_projs] == [(2, 6, 1), (2, 6, 1)]
    loaded.set_top_k(2)
    assert loaded.routers["ffn"].top_k == 1
    loaded(torch.randn(9, 4)).sum().backward()
    assert loaded.get_parameter("ffn.experts.up_proj").grad is not None


def test_minilm(minilm, tmp_path):
    """Protects a real encoder whose outputs are a class of transformers, imported on demand in a fresh process."""
    inputs = {"input_ids": torch.randint(0, 30000, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    saved = captured(minilm.model, (), inputs, {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs})
    saved.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    longer = {"input_ids": torch.randint(0, 30000, (3, 17)), "attention_mask": torch.ones(3, 17, dtype=torch.int64)}
    with torch.no_grad():
        assert_same(loaded, saved, **longer)
    assert saved.dynamic_dims()["input_ids"].keys() == {0, 1}
    lines = (
        "import sys; from sparsify.sparse_model import SparseModel",
        "assert 'transformers' not in sys.modules",
        "model = SparseModel.load(sys.argv[1]); print(type(model(**model.info.kwargs)).__module__)",
    )
    fresh = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert fresh.stdout.startswith("transformers.")


class Regions(nn.Module):
    """Higher-order ops, arithmetic on sizes, a constant, a non-persistent buffer, an input named like a builtin."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, input):
        with torch.no_grad():
            y = self.proj(input) + self.shift
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.proj(input)
        n = input.shape[0]
        z = z.float() + torch.arange(n * 2, dtype=torch.float32, device=input.device).sum() / (n // 2 + max(n, 5))
        w = torch.cond(z.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (z,))
        return y + torch.tensor([1.0, 2.0, 3.0, 4.0]), w[1:, ::2]


def test_higher_order_regions(tmp_path):
    """Protects no_grad, autocast and cond regions (nested graphs), symbolic sizes, constants and odd input names."""
    saved = captured(Regions(), (torch.randn(3, 4),), None, {"input": {0: Dim.AUTO}})
    names = {str(node.target) for node in saved.graph.nodes}
    assert {"wrap_with_set_grad_enabled", "wrap_with_autocast", "cond"} <= names
    saved.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert_same(loaded, saved, torch.randn(8, 4))
    assert "shift" not in loaded.state_dict()
    assert not loaded(torch.randn(8, 4))[0].requires_grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_tied_weights(tmp_path):
    """Protects sharing: one copy in the file, one parameter in the loaded model."""
    x = torch.randn(2, 64)
    model = Tied().eval()
    graph = Graph()
    first = graph.call_function(aten.linear.default, (graph.placeholder("x"), graph.get_attr("a.weight")))
    graph.output(graph.call_function(aten.linear.default, (first, graph.get_attr("b.weight"))))
    saved = SparseModel(model, graph)
    saved.info = SparseModelInfo((x,), {}, {}, None)
    saved.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert_same(loaded, saved, x)
    assert loaded.get_parameter("a.weight") is loaded.get_parameter("b.weight")
    assert (tmp_path / "model.safetensors").stat().st_size < 1.5 * model.a.weight.nbytes


def test_a_module_under_two_names(tmp_path):
    """Protects a router that serves two places: set_top_k must reach both."""
    saved = routed()
    saved.add_module("again", saved.get_submodule("ffn"))
    saved.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert loaded.again is loaded.ffn
    assert_same(loaded, saved, torch.randn(3, 4))


def test_overlapping_weights(tmp_path):
    """Protects the values of parameters that are views of one another, which safetensors itself refuses."""
    base = torch.randn(4, 4)
    root = nn.Module()
    root.whole, root.rows = nn.Parameter(base), nn.Parameter(base[:2])
    graph = Graph()
    product = (graph.get_attr("rows"), graph.get_attr("whole"))
    graph.output(graph.call_function(aten.mm.default, product))
    saved = SparseModel(root, graph)
    saved.info = SparseModelInfo((), {}, {}, None)
    saved.save(tmp_path)
    assert_same(SparseModel.load(tmp_path), saved)


def test_half_precision(tmp_path):
    """Protects fp16 weights and integer, boolean and empty tensors from any cast."""
    saved = captured(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).half(), (torch.randn(2, 4).half(),))
    saved.info = SparseModelInfo(saved.info.args, {"a": torch.tensor(True), "b": torch.zeros(0, 3).int()}, {}, None)
    saved.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    assert_same(loaded, saved, torch.randn(2, 4).half())
    assert loaded.info.kwargs["a"].dtype == torch.bool
    assert loaded.info.kwargs["b"].shape == (0, 3)


VALUES = [
    float("inf"), float("-inf"), float("nan"), -0.0, 1.0, 1, True, 1e-45, 2**63, None, "a 'b' \"c\" \\ \n", "é", 1 - 2j,
    [1, (2,), []], slice(None, 2, None), torch.float16, torch.strided, torch.channels_last, torch.device("cuda", 1),
    {"k": [float("inf"), {}]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_argument_values(value, tmp_path):
    """Protects every kind of constant, non-finite ones and hostile strings included, through JSON and source code."""
    graph = Graph()
    graph.output((graph.placeholder("x"), value))
    saved = SparseModel(nn.Module(), graph)
    saved.info = SparseModelInfo((value,), {}, {}, None)
    saved.save(tmp_path)
    loaded = SparseModel.load(tmp_path)
    for got in (loaded(0)[1], loaded.info.args[0]):
        assert repr(got) == repr(value)
    assert str(loaded.graph) == str(saved.graph)


def relu_of_torch() -> SparseModel:
    graph = Graph()
    graph.output(graph.call_function(torch.relu, (graph.placeholder("x"),)))
    return SparseModel(nn.Module(), graph)


def plain_module() -> SparseModel:
    root = nn.Module()
    root.act = nn.ReLU()
    graph = Graph()
    graph.output(graph.call_module("act", (graph.placeholder("x"),)))
    return SparseModel(root, graph)


def foreign_router() -> SparseModel:
    class Other(MLPRouter):
        pass

    saved = routed()
    saved.get_submodule("ffn").add_module("router", Other(4, 3, 2, 5))
    return saved


def odd_value() -> SparseModel:
    graph = Graph()
    graph.output((graph.placeholder("x"), range(3)))
    return SparseModel(nn.Module(), graph)


def complex_weight() -> SparseModel:
    saved = routed()
    saved.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    return saved


def unregistered_container() -> SparseModel:
    class Point(NamedTuple):
        x: int

    saved = routed()
    saved.info = SparseModelInfo((Point(1),), {}, {}, None)
    return saved


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (relu_of_torch, ["relu", "no aten"]),
        (plain_module, ["act", "router"]),
        (foreign_router, ["MLPRouter", "Other"]),
        (odd_value, ["range"]),
        (complex_weight, ["phase", "complex128"]),
        (unregistered_container, ["Point"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_saved_is_refused(make, words, tmp_path):
    """Protects from a file that could not be loaded: save says what has no place in the format, and writes nothing."""
    saved = make()
    saved.meta.setdefault("sparsify", SparseModelInfo((), {}, {}, None))
    with pytest.raises(OutputError) as caught:
        saved.save(tmp_path / "new")
    assert all(word in str(caught.value) for word in [*words, str(tmp_path / "new")]), str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, safetensors.SafetensorError])
def test_an_interrupted_save_leaves_the_old_model(error, folder, monkeypatch):
    """Protects the model of yesterday when today's cannot be written."""
    (folder / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    saved = routed()
    saved.set_top_k(3)

    def interrupted(_, path, metadata):
        path.write_bytes(b"half")
        raise error("no space left")

    monkeypatch.setattr(serialize, "save_file", interrupted)
    with pytest.raises(OutputError if error is safetensors.SafetensorError else error, match="no space left"):
        saved.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_interrupted_move_leaves_the_old_model(folder, monkeypatch):
    """Protects the pair of files from an interruption between the two renames."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    replace = os.replace

    def interrupted(source, destination):
        if str(destination) == str(folder / "model.safetensors") and "old" not in str(source):
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", interrupted)
    saved = routed()
    saved.set_top_k(3)
    with pytest.raises(KeyboardInterrupt):
        saved.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_path_that_is_a_file(tmp_path):
    """Protects a file of the user, and the error says which path and what to do."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file.*choose another folder"):
        routed().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
