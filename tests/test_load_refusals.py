"""`SparseModel.load` and files that are damaged or hostile: a `LoadError`, and nothing of the file is executed."""

from __future__ import annotations

import builtins
import hashlib
import json
import sys

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import Graph

from sparsify.errors import LoadError
from sparsify.routers import MLPRouter
from sparsify.sparse_model import SparseModel, SparseModelInfo


@pytest.fixture
def folder(tmp_path):
    """A saved model with one node of each kind."""
    root = nn.Module()
    root.ffn = nn.Module()
    root.ffn.router = MLPRouter(hidden_size=4, num_experts=3, top_k=2, router_hidden_size=5)
    root.ffn.experts = nn.Module()
    root.ffn.experts.up_proj = nn.Parameter(torch.randn(3, 2, 4))
    graph = Graph()
    x = graph.placeholder("x")
    graph.call_module("ffn.router", (x,))
    graph.get_attr("ffn.experts.up_proj")
    graph.output(graph.call_function(torch.ops.aten.gelu.default, (x,), {"approximate": "tanh"}))
    sparse = SparseModel(root, graph)
    sparse.info = SparseModelInfo((torch.randn(2, 4),), {}, {"ffn": 1}, None)
    sparse.save(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder, edit) -> None:
    """Edit graph.json as an attacker would: with the checksum of the pair made right."""
    document = json.loads((folder / "graph.json").read_text())
    edit(document)
    text = json.dumps(document).encode()
    (folder / "graph.json").write_bytes(text)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"graph_sha256": hashlib.sha256(text).hexdigest()})


def nodes_of(document) -> dict:
    return {node["name"]: node for node in document["graph"]["nodes"]}


def module_of(document, name) -> dict:
    return next(module for module in document["modules"] if module["name"] == name)


def edit_node(node, /, **changes):
    return lambda document: nodes_of(document)[node].update(changes)


def edit_tree(**changes):
    leaf = {"type": None, "context": None, "children_spec": []}
    return lambda document: document["example_inputs"]["spec"].__setitem__(1, {**leaf, **changes})


def rename_node(name):
    """Everywhere, so that only the name itself can be refused."""

    def edit(document) -> None:
        nodes_of(document)["output"]["args"] = [{"node": name}]
        nodes_of(document)["gelu_default"]["name"] = name

    return edit


def rename_weight(name):
    """In all three places, so that only the name itself can be refused."""

    def edit(document) -> None:
        nodes_of(document)["ffn_experts_up_proj"]["target"] = name
        tensor = next(tensor for tensor in document["tensors"] if tensor["name"] == "ffn.experts.up_proj")
        tensor["name"] = name

    return edit


def without_inputs(argument):
    """A graph whose signature alone holds `argument`: there it need not be a name to be valid Python."""

    def edit(document) -> None:
        output = {"op": "output", "name": "output", "target": "output", "args": [1], "kwargs": {}}
        document["graph"] = {"signature": {**SIGNATURE, "arguments": [argument]}, "nodes": [output]}

    return edit


DEFAULTDICT = {"default_factory_module": "attacker", "default_factory_name": "attack", "dict_context": []}
ENUM = json.dumps([{"__enum__": True, "fqn": "attacker:Attack", "name": "A"}])
CODE = "print(open('/etc/passwd').read())"
QUOTED = "print(1)"  # no dot, which would end the name
ATTACKS = {
    "function": edit_node("gelu_default", target="builtins.eval"),
    "bare function": edit_node("gelu_default", target="eval"),
    "module function": edit_node("gelu_default", target="os.system"),
    "operator that reaches attributes": edit_node("gelu_default", target="operator.attrgetter"),
    "operator that calls": edit_node("gelu_default", target="operator.methodcaller"),
    "op that writes a file": edit_node("gelu_default", target="torch.ops.aten.save.default"),
    "op that maps a file": edit_node("gelu_default", target="torch.ops.aten.from_file.default"),
    "op of another library": edit_node("gelu_default", target="torch.ops.profiler._record_function_enter.default"),
    "higher-order op": edit_node("gelu_default", target="torch.ops.higher_order.flat_apply"),
    "attribute of an op": edit_node("gelu_default", target="torch.ops.aten.gelu.__class__"),
    "method": edit_node("gelu_default", op="call_method", target="backward"),
    "kind of node": edit_node("gelu_default", op="exec"),
    "code as name": rename_node(f"a\n    {CODE}\n    b"),
    "keyword as name": rename_node("import"),
    "code as input": edit_node("x", target=f"x, y={CODE}"),
    "code as keyword": edit_node("gelu_default", kwargs={f"approximate={CODE}, x": 1}),
    "quote in a path": rename_weight(f'ffn.experts.x"), {QUOTED}, ("'),
    "special attribute": edit_node("ffn_experts_up_proj", target="__class__"),
    "attribute of a module": edit_node("ffn_experts_up_proj", target="forward.__globals__"),
    "module that is no router": edit_node("ffn_router", target="ffn.experts"),
    "value that is code": edit_node("gelu_default", args=[{"eval": CODE}]),
    "undefined node": edit_node("gelu_default", args=[{"node": "nowhere"}]),
    "device that is code": edit_node("gelu_default", args=[{"device": CODE}]),
    "constant that is a function": edit_node("gelu_default", args=[{"constant": "torch.load"}]),
    "argument name": without_inputs(f"x={CODE}"),
    "keyword argument": lambda d: d["graph"].update(signature={**SIGNATURE, "in_spec": KEYWORDS}),
    "defaultdict factory": edit_tree(type="collections.defaultdict", context=DEFAULTDICT),
    "enumeration key": edit_tree(type="builtins.dict", context=ENUM),
    "container of a foreign module": edit_tree(type="attacker.Output", context="[]"),
    "module of transformers that is no model": edit_tree(type="transformers.commands.chat.Chat", context="[]"),
    "router class": lambda d: module_of(d, "ffn.router").update({"class": "Sequential"}),
    "router argument": lambda d: module_of(d, "ffn.router")["options"].update(device=0),
    "module name": lambda d: module_of(d, "ffn").update(name="__class__"),
    "module that holds itself": lambda d: module_of(d, "ffn.experts").update(kind="alias", of=""),
    "tensor name": lambda d: d["tensors"][0].update(name="ffn.forward"),
}
LEAF = {"type": None, "context": None, "children_spec": []}
TUPLE = {"type": "builtins.tuple", "context": "null", "children_spec": [LEAF]}
KEYED = {"type": "builtins.dict", "context": json.dumps([f"x': {CODE}, 'y"]), "children_spec": [LEAF]}
SIGNATURE = {"arguments": ["x"], "in_spec": [1, TUPLE], "out_spec": None}
KEYWORDS = [1, {**TUPLE, "children_spec": [{**TUPLE, "children_spec": []}, KEYED]}]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused(attack, folder, monkeypatch, tmp_path):
    """Protects users who load a file from a stranger: it is refused, and neither runs, imports nor writes a thing."""
    (tmp_path / "attacker.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builtins, "print", lambda *_: pytest.fail("code of the file ran"))
    before = {path.name for path in tmp_path.iterdir()}
    rewrite(folder, attack)
    with pytest.raises(LoadError, match=r"refused|damaged"):
        SparseModel.load(folder)
    assert "attacker" not in sys.modules
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_attack_harness_itself_loads(folder):
    """Protects the attack tests from passing for the wrong reason."""
    rewrite(folder, lambda document: document["graph"].update(signature=SIGNATURE))
    assert SparseModel.load(folder)(torch.randn(2, 4)).shape == (2, 4)


def test_quotes_in_strings_stay_strings(folder):
    """Protects the generated source from strings that try to end themselves."""
    text = f"tanh'), {CODE}, ('"
    rewrite(folder, edit_node("gelu_default", kwargs={"approximate": text}))
    loaded = SparseModel.load(folder)
    with pytest.raises(RuntimeError, match="approximate"):
        loaded(torch.randn(2, 4))


def missing_graph(folder):
    (folder / "graph.json").unlink()


def missing_tensors(folder):
    (folder / "model.safetensors").unlink()


def truncated_tensors(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-20])


def damaged_json(folder):
    text = (folder / "graph.json").read_text()
    (folder / "graph.json").write_text(text[: len(text) // 2])


def not_utf8(folder):
    (folder / "graph.json").write_bytes(b"\xff\xfe\x00")


def other_json(folder):
    (folder / "graph.json").write_text("[1, 2]")


def newer_version(folder):
    rewrite(folder, lambda document: document.update(format_version=99, sparsify_version="9.0"))


def another_graph(folder):
    (folder / "graph.json").write_bytes((folder / "graph.json").read_bytes() + b" ")


def another_shape(folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors["ffn.experts.up_proj"] = torch.zeros(3, 2, 5)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


def missing_router_weight(folder):
    rewrite(folder, lambda d: d.update(tensors=[t for t in d["tensors"] if t["name"] != "ffn.router.hidden.bias"]))


def missing_package(folder):
    rewrite(folder, edit_tree(type="transformers.models.nowhere.modeling_nowhere.Output", context="[]"))


def unknown_device(folder):
    rewrite(folder, lambda document: document["tensors"][0].update(device="cuda:77"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_graph, ["holds no saved model", "Give the folder"]),
        (missing_tensors, ["model.safetensors", "missing", "Give the folder"]),
        (truncated_tensors, ["model.safetensors is damaged", "Copy it again"]),
        (damaged_json, ["graph.json is damaged", "Copy it again"]),
        (not_utf8, ["graph.json is damaged", "Copy it again"]),
        (other_json, ["no model of sparsify", "Give the folder"]),
        (newer_version, ["version 99", "sparsify 9.0", "reads version 3", "Install"]),
        (another_graph, ["not of one save", "copy both"]),
        (another_shape, ["ffn.experts.up_proj", "[3, 2, 4]", "[3, 2, 5]", "copy both"]),
        (missing_router_weight, ["no weights for ffn.router.hidden.bias"]),
        (missing_package, ["transformers", "pip install"]),
        (unknown_device, ["cuda:77", "not usable here", "on the CPU"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(damage, words, folder):
    """Protects users of a damaged, mixed or foreign folder: the error says what was seen and what to do."""
    damage(folder)
    with pytest.raises(LoadError) as caught:
        SparseModel.load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_document_without_one_of_its_keys(folder):
    """Protects the promise that any damage gives a LoadError, by dropping every key of the document in turn."""
    text = (folder / "graph.json").read_text()
    keys = {key for key in _keys(json.loads(text)) if key not in ("sparsify_version", "torch_version")}
    for key in sorted(keys):
        rewrite(folder, lambda document, key=key: _drop(document, key))
        try:
            SparseModel.load(folder)
        except LoadError:
            continue
        finally:
            (folder / "graph.json").write_text(text)
        assert key == "approximate", key  # an optional argument of the op


def _keys(data):
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return {*(data if isinstance(data, dict) else ()), *(key for child in children for key in _keys(child))}


def _drop(data, key) -> None:
    if isinstance(data, dict):
        data.pop(key, None)
    for child in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _drop(child, key)
