"""The commands as a user types them: what they write, print and return."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify import SparsifyConfig, bench
from sparsify.cli_steps import convert_model
from sparsify.console import show_stages
from sparsify.models.dense_model import DenseModel
from sparsify.sparse_model import SparseModel

FILES = {
    "conversion.json",
    "graph.json",
    "model.dense.onnx",
    "model.onnx",
    "model.safetensors",
    "report.html",
    "report.json",
}


@pytest.fixture(scope="module")
def converted(folder, run, options):
    """A conversion with everything, and what it printed."""
    out = folder / "out"
    result = run("convert", "tiny_factory:model", "-o", out, *options, "--json")
    return out, result


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of the conversion to damage."""
    return Path(shutil.copytree(converted[0], tmp_path / "copy"))


def test_convert_writes_all_files_and_no_others(converted, folder):
    """What the manual promises is there, and no staging folder is left."""
    out, _ = converted
    assert {file.name for file in out.iterdir()} == FILES
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_convert_prints_one_json_object(converted):
    """A script reads stdout; bars and tables must not be there."""
    out, result = converted
    printed = json.loads(result.stdout)
    assert printed["out"] == str(out)
    assert set(printed["files"]) == FILES
    [ffn] = printed["report"]["ffns"]
    assert ffn["action"] == "converted"
    assert ffn["receipt"] <= 1e-5
    assert printed["export"]["path"] == str(out / "model.onnx")
    assert printed["export"]["dense_path"] == str(out / "model.dense.onnx")
    assert printed["bench"] is None
    assert "FFNs converted" in result.stderr


def test_the_files_hold_what_verify_and_bench_need(converted):
    """The record names the dense model and the options; the report is the printed one; the model loads."""
    out, result = converted
    record = json.loads((out / "conversion.json").read_text())
    assert record["model"] == "tiny_factory:model"
    assert record["config"]["num_experts"] == 4
    assert record["target"] == "ort-cpu"
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads((out / "report.json").read_text()) == json.loads(result.stdout)["report"]
    assert len(SparseModel.load(out).routers) == 1
    assert "partial" not in (out / "report.html").read_text()


def test_inspect_lists_what_can_be_converted(run):
    """As a table and as JSON."""
    assert "1 FFNs can be converted, 0 cannot." in run("inspect", "tiny_factory:model").stdout
    printed = json.loads(run("inspect", "tiny_factory:model", "--json").stdout)
    [ffn] = printed["ffns"]
    assert (ffn["kind"], ffn["activation"], ffn["intermediate_size"]) == ("plain", "relu", 64)
    assert printed["rejected"] == []


def test_verify_finds_the_promises_kept(converted, run):
    """An untouched conversion passes."""
    out, _ = converted
    result = run("verify", out)
    assert result.stdout.count("pass") == 2
    assert "FAIL" not in result.stdout
    assert json.loads(run("verify", out, "--json").stdout)["kept"] is True


def test_verify_finds_a_file_of_another_model(copy, run):
    """A weight that changed by a little is seen, and the exit code tells scripts."""
    model = onnx.load(copy / "model.onnx")
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            changed = np.array(numpy_helper.to_array(weight)) * np.float32(1.01)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, copy / "model.onnx")
    result = run("verify", copy, code=1)
    assert result.stdout.count("FAIL") == 1


def test_verify_finds_a_missing_file(copy, run):
    """The record says that there was one."""
    (copy / "model.onnx").unlink()
    assert "model.onnx is gone" in run("verify", copy, code=1).stdout


@pytest.mark.parametrize("receipt", [2e-5, None, float("nan")])
def test_verify_finds_a_receipt_above_the_bound(copy, receipt, run):
    """A split that is not exact breaks the promise; a receipt that is no number proves nothing."""
    report = json.loads((copy / "report.json").read_text())
    report["ffns"][0]["receipt"] = receipt
    (copy / "report.json").write_text(json.dumps(report))
    printed = json.loads(run("verify", copy, "--json", code=1).stdout)
    assert [promise["kept"] for promise in printed["promises"]] == [False, True]


@pytest.mark.parametrize("name", ["conversion.json", "report.json", "graph.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_verify_refuses_a_damaged_folder(copy, name, content, refusal):
    """A file that is missing or cut is named in one line."""
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    assert name in refusal("verify", copy)


def test_bench_times_the_sizes_asked_for(converted, monkeypatch, run):
    """Both runtimes, in JSON."""
    monkeypatch.setattr(bench, "_MIN_SECONDS", 0)
    out, _ = converted
    printed = json.loads(run("bench", out, "--size", "1x3", "--size", "5x2", "--json").stdout)
    assert [(timing["runtime"], *timing["sizes"].values()) for timing in printed["timings"]] == [
        ("pytorch", 1, 3),
        ("pytorch", 5, 2),
        ("onnxruntime cpu", 1, 3),
        ("onnxruntime cpu", 5, 2),
    ]


@pytest.mark.parametrize("size", ["8", "1x2x3", "0x4", "axb", "8x", ""])
def test_bench_refuses_sizes_that_do_not_fit(converted, size, refusal):
    """The message shows what was given."""
    assert size in refusal("bench", converted[0], "--size", size)


def test_a_second_conversion_leaves_no_file_of_the_first(copy, monkeypatch, run):
    """An old ONNX file beside a new model would be deployed by mistake; files of the user stay.

    Without matplotlib the page is left out, which is said, and all else works.
    """
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (copy / "notes.txt").write_text("mine")
    before = (copy / "model.safetensors").read_bytes()
    options = ("--experts", "8", "--no-onnx", "--no-calibration", "--no-refit", "--seed", "1")
    result = run(
        "convert", "tiny_factory:model", "-o", copy, *options, "--top-k", "2", "--select", "*", "--select", "ffn?"
    )
    assert {file.name for file in copy.iterdir()} == FILES - {"model.onnx", "model.dense.onnx", "report.html"} | {
        "notes.txt"
    }
    assert (copy / "model.safetensors").read_bytes() != before
    assert "report.html was left out: report.html needs matplotlib: pip install" in result.stdout
    assert "not checked: converted with --no-onnx" in " ".join(run("verify", copy).stdout.split())


@pytest.mark.parametrize("select", ["1", "0.5", "last-half", "later", "ffn*"])
def test_selection_and_overrides_reach_the_conversion(tmp_path, select, run):
    """A number, a fraction, a preset and a pattern; the numbers of an override are used, reported and written down."""
    numbers = ("--override", "[!:]*:num_experts=8,top_k=3", "--override", "ffn?:num_experts=2,top_k=1")
    options = ("--experts", "4", "--top-k", "2", "--select", select, "--no-onnx", "--no-calibration")
    result = run("convert", "tiny_factory:model", "-o", tmp_path / "out", *options, *numbers, "--json")
    [ffn] = json.loads(result.stdout)["report"]["ffns"]
    assert (ffn["action"], ffn["num_experts"], ffn["top_k"]) == ("converted", 2, 1)
    config = SparsifyConfig(**json.loads((tmp_path / "out" / "conversion.json").read_text())["config"])
    assert config.select == {"1": 1, "0.5": 0.5}.get(select, select)
    assert config.for_layer("ffn0").num_experts == 2
    assert config.for_layer("other").num_experts == 8


def test_widths_reach_the_conversion(tmp_path, run):
    """Of the whole model, and of some FFNs."""
    widths = ("--widths", "16,16,32", "--override", "ffn?:expert_widths=32+16+16,top_k=2")
    options = ("--top-k", "1", "--select", "all", "--no-onnx", "--no-calibration")
    result = run("convert", "tiny_factory:model", "-o", tmp_path / "out", *options, *widths, "--json")
    [ffn] = json.loads(result.stdout)["report"]["ffns"]
    assert (ffn["expert_widths"], ffn["top_k"], ffn["num_shared_experts"]) == ([32, 16, 16], 2, 1)
    assert "pass" in run("verify", tmp_path / "out").stdout


def test_labels_and_routes_of_a_file(tmp_path, run):
    """A label of the factory reaches the router and the file, which returns routes; the dense model needs none."""
    out, given = tmp_path / "out", ("tiny_factory:labelled", "--start", "upcycle", "--router", "demix")
    numbers = ("--experts", "2", "--top-k", "1", "--select", "all")
    options = ("--routing-outputs", "--ids-input", "expert_labels", "--no-calibration")
    result = run("convert", *given, *numbers, *options, "-o", out, "--json")
    assert json.loads(result.stdout)["report"]["output_error"] < 1e-5
    proto = onnx.load(out / "model.onnx")
    assert "expert_labels" in [value.name for value in proto.graph.input]
    assert [value.name.rpartition(".")[2] for value in proto.graph.output][1:] == ["expert_ids", "routing_weights"]
    assert "expert_labels" not in [value.name for value in onnx.load(out / "model.dense.onnx").graph.input]
    assert run("verify", out).exit_code == 0
    assert "1 FFNs can be converted" in run("inspect", "tiny_factory:labelled").stdout


def test_a_file_with_our_op(tmp_path, run, options):
    """It is written, checked and timed with its library registered; the report says what sessions need."""
    out = tmp_path / "out"
    options = (*options, "--fused-op", "--no-calibration")
    printed = json.loads(run("convert", "tiny_factory:wide", "-o", out, *options, "--bench", "--json").stdout)
    [layer] = printed["export"]["layers"]
    assert layer["lowering"] == "fused_op"
    assert "sessions need onnx_ops_library()" in layer["reason"]
    assert "ai.sparsify" in [entry.domain for entry in onnx.load(out / "model.onnx").opset_import]
    assert "pass" in run("verify", out).stdout


def test_target_tokens_reach_plan_and_export(tmp_path, run):
    """Both are made for the sizes that calls will have, and the report says how long an FFN takes there."""
    options = ("--experts", "4", "--top-k", "2", "--select", "all", "--target-tokens", "3", "--target-tokens", "40")
    out = tmp_path / "out"
    result = json.loads(run("convert", "tiny_factory:model", "-o", out, *options, "--no-calibration", "--json").stdout)
    [ffn] = result["report"]["ffns"]
    assert [time["tokens"] for time in ffn["times"]] == [3, 40]
    assert result["export"]["target_tokens"] == [3, 40]


@pytest.mark.parametrize("budget", ["0.5", "error<=0.9", "60000ms"])
def test_a_budget_reaches_the_conversion(tmp_path, budget, run):
    """Each form is read, spent, reported, and written down as a config that can be read again."""
    options = ("--budget", budget, "--experts", "4", "--select", "all", "--target-tokens", "8", "--no-onnx", "--json")
    result = json.loads(run("convert", "tiny_factory:model", "-o", tmp_path / "out", *options).stdout)
    [ffn] = result["report"]["ffns"]
    assert "budget=" in ffn["reason"]
    assert any(note.startswith("budget=") for note in result["report"]["notes"])
    config = SparsifyConfig(**json.loads((tmp_path / "out" / "conversion.json").read_text())["config"])
    assert config.budget == budget


def test_a_trained_conversion_says_so_and_keeps_its_promises(tmp_path, run):
    """The training is in the report, in the saved model and in its ONNX file."""
    options = ("--experts", "4", "--top-k", "1", "--select", "all", "--json")
    plain = json.loads(run("convert", "tiny_factory:model", "-o", tmp_path / "plain", *options).stdout)
    out = tmp_path / "trained"
    result = json.loads(run("convert", "tiny_factory:model", "-o", out, *options, "--distill", "3").stdout)
    assert [note for note in result["report"]["notes"] if note.startswith("then trained as a whole: 3 steps in ")]
    assert not [note for note in plain["report"]["notes"] if "trained as a whole" in note]
    weights, trained = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", out))
    assert any(not torch.equal(weights[name], trained[name]) for name in weights)
    assert json.loads(run("verify", out, "--json").stdout)["kept"]


def test_training_follows_the_loss_of_the_model():
    """What is read off the outputs of a model is what its conversion is trained to keep."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    batches = [torch.randn(4, 8, 16) for _ in range(3)]
    seen: list[Tensor] = []

    def loss(ours: Tensor, theirs: Tensor, batch: Tensor) -> Tensor:
        seen.append(batch)
        return (ours - theirs).square().mean()

    dense = DenseModel("tiny", ffn, (batches[0],), {}, lambda: iter(batches), [], None, "", loss)
    config = SparsifyConfig(num_experts=4, top_k=1, select="all")
    with show_stages() as stages:
        convert_model(dense, config, 2, calibrates=True, stages=stages)
    assert len(seen) == 2
    assert all(any(batch is each for each in batches) for batch in seen)
