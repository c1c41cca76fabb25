"""Every lowering of a whole layer in onnxruntime, against a loop over tokens and slots in float64 numpy.

T tokens, K slots, E experts, D and N features, M neurons of an expert.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from sparsify.cpu.kernel import kernel_status
from sparsify.passes.export_onnx import export_onnx
from sparsify.passes.lower_onnx.expert_region import find_regions
from sparsify.passes.lower_onnx.lower_placeholders import lower_layer, lower_placeholders
from sparsify.passes.lower_onnx.lowerings import WHOLE, Lowering
from sparsify.passes.lower_onnx.measure_lowerings import measure_lowerings
from sparsify.passes.lower_onnx.runtime import open_session

E, D, M = 5, 17, 11
LEFT_OUT = WHOLE if kernel_status().available else (*WHOLE, "fused_op")  # the first run all experts
LOWERINGS: list[Lowering] = [name for name in get_args(Lowering) if name not in LEFT_OUT]
Arrays = dict[str, np.ndarray[Any, Any]]


def _arrays(tokens: int, top_k: int, out: int, gated: bool, bias: bool) -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"up_proj": (E, M, D), "down_proj": (E, out, M)} | ({"gate_proj": (E, M, D)} if gated else {})
    if bias:
        shapes |= {f"{role}_bias": shape[:2] for role, shape in shapes.items()}
    arrays: Arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["x"] = random.standard_normal((tokens, D)).astype(np.float32)
    arrays["ids"] = random.random((tokens, E)).argsort(1)[:, :top_k].astype(np.int64)
    arrays["weights"] = (random.random((tokens, top_k)) + 0.5).astype(np.float32)
    return arrays


def _expected(arrays: Arrays, unit_weights: bool) -> np.ndarray:
    wide = {name: array.astype(np.float64) for name, array in arrays.items() if name != "ids"}
    y = np.zeros((len(arrays["x"]), arrays["down_proj"].shape[1]))

    def linear(role: str, x: np.ndarray, e: int) -> np.ndarray:
        return wide[role][e] @ x + (wide[f"{role}_bias"][e] if f"{role}_bias" in wide else 0)

    for t, k in np.ndindex(*arrays["ids"].shape):
        e, x = int(arrays["ids"][t, k]), wide["x"][t]
        if e < 0:
            continue
        hidden = linear("up_proj", x, e)
        if "gate_proj" in wide:
            gate = linear("gate_proj", x, e)
            hidden = hidden * gate / (1 + np.exp(-gate))
        else:
            hidden = np.maximum(hidden, 0)
        y[t] += (1 if unit_weights else wide["weights"][t, k]) * linear("down_proj", hidden, e)
    return y


def _model(arrays: Arrays, unit_weights: bool) -> ir.Model:
    """Placeholders as `emit_placeholders` leaves them, around a ReLU or SwiGLU."""
    types = {name: ir.TensorType(ir.DataType.from_numpy(array.dtype)) for name, array in arrays.items()}
    values = {
        name: ir.Value(
            name=name,
            type=types[name],
            shape=ir.Shape(array.shape if "proj" in name else ["tokens", array.shape[1]]),
            const_value=ir.Tensor(array, name=name) if "proj" in name else None,
        )
        for name, array in arrays.items()
    }
    parts, top_k, real = E + (not unit_weights), arrays["ids"].shape[1], types["x"]
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[Any], attributes: dict[str, Any], domain: str, outputs: int = 1) -> Any:
        attributes = {"layer": "ffn", **attributes} if domain else attributes
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.type = real
        nodes.append(node)
        return node.outputs if outputs > 1 else node.outputs[0]

    def linear(rows: ir.Value, role: str) -> ir.Value:
        inputs = [rows, values[role], values.get(f"{role}_bias"), counts]
        return add("ExpertLinear", inputs, {"num_parts": parts, "gate": int(role == "gate_proj")}, "sparsify")

    settings: dict[str, Any] = {"num_experts": E, "num_parts": parts, "top_k": top_k}
    settings["activation"] = "swiglu" if "gate_proj" in arrays else "relu"
    settings["function"] = "silu" if "gate_proj" in arrays else "relu"
    rows, order, _, counts = add("Dispatch", [values["x"], values["ids"]], settings, "sparsify", 4)
    order.type = counts.type = ir.TensorType(ir.DataType.INT64)
    if "gate_proj" in arrays:
        gate = linear(rows, "gate_proj")
        gate = add("Mul", [gate, add("Sigmoid", [gate], {}, "")], {}, "")
        hidden = add("Mul", [gate, linear(rows, "up_proj")], {}, "")
    else:
        hidden = add("Relu", [linear(rows, "up_proj")], {}, "")
    settings = {"top_k": top_k, "unit_weights": int(unit_weights)}
    y = add("Combine", [linear(hidden, "down_proj"), values["weights"], order], settings, "sparsify")
    y.name, y.shape = "y", ir.Shape(["tokens", arrays["down_proj"].shape[1]])
    graph = ir.Graph(
        [values[name] for name in ("x", "ids", "weights")],
        [y],
        nodes=nodes,
        initializers=[value for value in values.values() if value.const_value is not None],
        opset_imports={"": 20, "sparsify": 1},
        name="layer",
    )
    return ir.Model(graph, ir_version=10)


def _lowered(arrays: Arrays, lowering: Lowering, unit_weights: bool) -> onnx.ModelProto:
    model = _model(arrays, unit_weights)
    lower_layer(find_regions(model.graph)[0], lowering)
    lower_placeholders(model)
    proto = ir.to_proto(model)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=lowering not in ("moe_op", "fused_op"))
    onnx.checker.check_model(inferred)
    return proto


def _run(arrays: Arrays, lowering: Lowering, unit_weights: bool) -> np.ndarray:
    proto = _lowered(arrays, lowering, unit_weights)
    session, _ = open_session(proto.SerializeToString(), Path(), cuda=False, own_ops=lowering == "fused_op")
    return np.asarray(session.run(None, {name: arrays[name] for name in ("x", "ids", "weights")})[0])


def _check(arrays: Arrays, lowering: Lowering, unit_weights: bool) -> None:
    y, expected = _run(arrays, lowering, unit_weights), _expected(arrays, unit_weights)
    assert y.shape == expected.shape
    assert not y.size or np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("unit_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equals_numpy(lowering: Lowering, gated: bool, bias: bool, unit_weights: bool) -> None:
    """Protects: weights, biases, gate and up each reach their expert, in every lowering."""
    _check(_arrays(7, 2, D, gated, bias), lowering, unit_weights)


@pytest.mark.parametrize("top_k", [1, E])
@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_extreme_sizes(lowering: Lowering, tokens: int, top_k: int) -> None:
    """Protects: no token, one token (most experts empty), one expert a token and all of them."""
    _check(_arrays(tokens, top_k, D, False, True), lowering, True)


@pytest.mark.parametrize("lowering", [name for name in LOWERINGS if name != "moe_op"])
def test_unused_slots_and_another_width(lowering: Lowering) -> None:
    """Protects: a slot of id -1 adds nothing whatever its weight, one expert may get all tokens, and N may differ."""
    arrays = _arrays(13, 3, 19, False, True)
    arrays["ids"] = np.where(arrays["weights"] < 0.8, -1, arrays["ids"])
    arrays["ids"][0] = -1
    _check(arrays, lowering, False)
    arrays["ids"] = np.full((13, 1), 3)
    arrays["weights"] = arrays["weights"][:, :1]
    _check(arrays, lowering, False)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_is_the_layer_with_all_experts_on(gated: bool, bias: bool) -> None:
    """Protects: every expert counts once, with its biases, whatever the router chose."""
    arrays = _arrays(7, E, D + 2, gated, bias)
    expected = _expected(arrays, True)
    chosen = arrays | {"ids": arrays["ids"][:, :2], "weights": arrays["weights"][:, :2]}
    y = _run(chosen, "dense", True)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_expert_that_was_not_chosen_does_not_show() -> None:
    """Protects: in float16, where neurons may overflow, those of other experts count as zeros, not as 0 * inf."""
    arrays = _arrays(4, 1, D, False, False)
    arrays["ids"][:] = 1
    arrays["up_proj"][0] = 6e4
    half = {name: array if name == "ids" else array.astype(np.float16) for name, array in arrays.items()}
    # onnxruntime computes float16 in float32 on most CPUs, where nothing overflows.
    evaluator = ReferenceEvaluator(_lowered(half, "dense_masked", True))
    with np.errstate(over="ignore"):
        outputs: Any = evaluator.run(None, {name: half[name] for name in ("x", "ids", "weights")})
    expected = _expected(half, True)
    np.testing.assert_allclose(outputs[0], expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("lowering", [name for name in LOWERINGS if name != "moe_op"])
def test_stores_every_weight_once(lowering: Lowering) -> None:
    """Protects: the file is no larger than the weights, whatever their order in it."""
    arrays = _arrays(3, 2, D, True, True)
    model = _model(arrays, True)
    lower_layer(find_regions(model.graph)[0], lowering)
    lower_placeholders(model)
    constants = [value.const_value for value in model.graph.initializers.values() if value.const_value]
    stored = sum(
        constant.nbytes for constant in constants if constant.dtype == ir.DataType.FLOAT and constant.shape.rank()
    )
    assert stored == sum(array.nbytes for name, array in arrays.items() if "proj" in name)


def test_skips_what_was_not_chosen() -> None:
    """Protects: a chain computes T*K rows and no more; expert rows are counted in the run itself."""
    arrays = _arrays(13, 2, D, False, True)
    model = _model(arrays, True)
    lower_layer(find_regions(model.graph)[0], "expert_chain")
    lower_placeholders(model)
    hidden = [node.outputs[0] for node in model.graph if node.op_type == "Relu"]
    assert len(hidden) == E
    proto = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(str(value.name), 1, None) for value in hidden)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [str(value.name) for value in hidden]
    rows = session.run(names, {name: arrays[name] for name in ("x", "ids", "weights")})
    assert [len(np.asarray(part)) for part in rows] == [int((arrays["ids"] == e).sum()) for e in range(E)]


def _executed(path: Path, tokens: int, folder: Path) -> int:
    """Multiplications in the experts of one call, by the shapes in the profile of onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.random.default_rng(0).standard_normal((1, tokens, 16)).astype(np.float32)})
    count = 0
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time") and "/experts" in event["name"] and "Gemm" in event["name"]:
            (rows, features), neurons = _sizes(event["args"]["input_type_shape"], event["args"]["output_type_shape"])
            count += rows * features * neurons
    return count


def _sizes(inputs: list[dict[str, list[int]]], outputs: list[dict[str, list[int]]]) -> tuple[list[int], int]:
    return inputs[0]["float"], outputs[0]["float"][1]


@pytest.mark.parametrize("lowering", ["expert_chain", "sorted_split", "dense_masked"])
def test_more_experts_cost_no_more(sparse_layer: Any, tmp_path: Path, lowering: Lowering) -> None:
    """Protects: with four times the experts, and as many chosen, a file computes as much as before.

    `dense_masked`, which skips nothing, shows that the count would tell.
    """
    found: list[int] = []
    for num_experts in (8, 32):
        path = tmp_path / f"{num_experts}.onnx"
        export_onnx(sparse_layer(num_experts=num_experts), path, lowering=lowering, verify=False)
        found.append(_executed(path, 50, tmp_path))
    skipping = 50 * 2 * 2 * 16 * 8  # tokens, slots, products, D, M
    assert found == ([skipping, skipping] if lowering != "dense_masked" else [4 * skipping, 16 * skipping])


def test_times_every_lowering_and_changes_nothing() -> None:
    """Protects: each lowering gets a time at each number of tokens, and the layer can still be lowered."""
    arrays = _arrays(3, 2, D, True, True)
    model = _model(arrays, True)
    before = [node.op_type for node in model.graph]
    times = measure_lowerings(find_regions(model.graph)[0], 20, LOWERINGS, (1, 5))
    assert [len(found) for found in times if found] == [2] * len(LOWERINGS)
    assert all(0 < seconds < 1 for found in times if found for seconds in found)
    assert [node.op_type for node in model.graph] == before


def test_a_layer_that_reads_other_values_is_not_timed() -> None:
    """Protects: a value that the rest of the model computes cannot be made up, so the prediction stands."""
    model = _model(_arrays(3, 2, D, False, False), True)
    relu = next(node for node in model.graph if node.op_type == "Relu")
    scale = ir.Value(name="scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    model.graph.inputs.append(scale)
    product = ir.node("Mul", [relu.outputs[0], scale])
    ir.convenience.replace_all_uses_with(relu.outputs[0], product.outputs[0])
    product.replace_input_with(0, relu.outputs[0])
    model.graph.insert_after(relu, product)
    assert measure_lowerings(find_regions(model.graph)[0], 20, ("expert_chain",), (1,)) == [None]
