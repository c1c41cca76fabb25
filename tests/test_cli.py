"""The commands as a user types them: what they write, print and return, and how they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from sparsify import SparsifyConfig, bench
from sparsify.cli import app
from sparsify.cli_steps import convert_model
from sparsify.console import show_stages
from sparsify.models.dense_model import DenseModel
from sparsify.sparse_model import SparseModel

ROOT = Path(__file__).parent.parent
FILES = {
    "conversion.json",
    "graph.json",
    "model.dense.onnx",
    "model.onnx",
    "model.safetensors",
    "report.html",
    "report.json",
}
FACTORY = """
import pathlib, sys

import torch
from torch import nn


def model():
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    batches = [torch.randn(4, 8, 16) for _ in range(3)]
    pathlib.Path("loaded").touch()
    return ffn, (torch.randn(2, 4, 16),), {}, batches


def wide():
    ffn = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    return ffn, (torch.randn(2, 4, 64),)


def labelled():
    labels = {"expert_labels": torch.tensor([1, 0])}
    ffn, args, _, batches = model()
    return ffn, args, labels, [((batch[:2],), labels) for batch in batches]
"""
OPTIONS = ("--experts", "4", "--top-k", "2", "--select", "all")
# The program as installed, without the need to install it.
PROGRAM = "import sys; from sparsify.cli import app; sys.argv[0] = 'sparsify'; app()"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working folder with the factory; small matrices are quicker on one thread."""
    place = tmp_path_factory.mktemp("cli")
    (place / "tiny_factory.py").write_text(FACTORY)
    before, threads, path = Path.cwd(), torch.get_num_threads(), list(sys.path)
    os.chdir(place)
    torch.set_num_threads(1)
    yield place
    torch.set_num_threads(threads)
    os.chdir(before)
    sys.path[:] = path


def run(*arguments: object, code: int = 0):
    """Runs a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def start(*arguments: object, program: str = PROGRAM, **options) -> subprocess.Popen:
    """Starts a command as a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def refusal(*arguments: object) -> str:
    """The message of a command that is refused: on stderr, with code 2, and nothing else anywhere."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def converted(folder):
    """A conversion with everything, and what it printed."""
    out = folder / "out"
    result = run("convert", "tiny_factory:model", "-o", out, *OPTIONS, "--json")
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


def test_inspect_lists_what_can_be_converted():
    """As a table and as JSON."""
    assert "1 FFNs can be converted, 0 cannot." in run("inspect", "tiny_factory:model").stdout
    printed = json.loads(run("inspect", "tiny_factory:model", "--json").stdout)
    [ffn] = printed["ffns"]
    assert (ffn["kind"], ffn["activation"], ffn["intermediate_size"]) == ("plain", "relu", 64)
    assert printed["rejected"] == []


def test_verify_finds_the_promises_kept(converted):
    """An untouched conversion passes."""
    out, _ = converted
    result = run("verify", out)
    assert result.stdout.count("pass") == 2
    assert "FAIL" not in result.stdout
    assert json.loads(run("verify", out, "--json").stdout)["kept"] is True


def test_verify_finds_a_file_of_another_model(copy):
    """A weight that changed by a little is seen, and the exit code tells scripts."""
    model = onnx.load(copy / "model.onnx")
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            changed = np.array(numpy_helper.to_array(weight)) * np.float32(1.01)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, copy / "model.onnx")
    result = run("verify", copy, code=1)
    assert result.stdout.count("FAIL") == 1


def test_verify_finds_a_missing_file(copy):
    """The record says that there was one."""
    (copy / "model.onnx").unlink()
    assert "model.onnx is gone" in run("verify", copy, code=1).stdout


@pytest.mark.parametrize("receipt", [2e-5, None, float("nan")])
def test_verify_finds_a_receipt_above_the_bound(copy, receipt):
    """A split that is not exact breaks the promise; a receipt that is no number proves nothing."""
    report = json.loads((copy / "report.json").read_text())
    report["ffns"][0]["receipt"] = receipt
    (copy / "report.json").write_text(json.dumps(report))
    printed = json.loads(run("verify", copy, "--json", code=1).stdout)
    assert [promise["kept"] for promise in printed["promises"]] == [False, True]


@pytest.mark.parametrize("name", ["conversion.json", "report.json", "graph.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_verify_refuses_a_damaged_folder(copy, name, content):
    """A file that is missing or cut is named in one line."""
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    assert name in refusal("verify", copy)


def test_bench_times_the_sizes_asked_for(converted, monkeypatch):
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
def test_bench_refuses_sizes_that_do_not_fit(converted, size):
    """The message shows what was given."""
    assert size in refusal("bench", converted[0], "--size", size)


def test_a_second_conversion_leaves_no_file_of_the_first(copy, monkeypatch):
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
def test_selection_and_overrides_reach_the_conversion(tmp_path, select):
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


def test_widths_reach_the_conversion(tmp_path):
    """Of the whole model, and of some FFNs."""
    widths = ("--widths", "16,16,32", "--override", "ffn?:expert_widths=32+16+16,top_k=2")
    options = ("--top-k", "1", "--select", "all", "--no-onnx", "--no-calibration")
    result = run("convert", "tiny_factory:model", "-o", tmp_path / "out", *options, *widths, "--json")
    [ffn] = json.loads(result.stdout)["report"]["ffns"]
    assert (ffn["expert_widths"], ffn["top_k"], ffn["num_shared_experts"]) == ([32, 16, 16], 2, 1)
    assert "pass" in run("verify", tmp_path / "out").stdout


def test_labels_and_routes_of_a_file(tmp_path):
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


def test_a_file_with_our_op(tmp_path):
    """It is written, checked and timed with its library registered; the report says what sessions need."""
    out = tmp_path / "out"
    options = (*OPTIONS, "--fused-op", "--no-calibration")
    printed = json.loads(run("convert", "tiny_factory:wide", "-o", out, *options, "--bench", "--json").stdout)
    [layer] = printed["export"]["layers"]
    assert layer["lowering"] == "fused_op"
    assert "sessions need onnx_ops_library()" in layer["reason"]
    assert "ai.sparsify" in [entry.domain for entry in onnx.load(out / "model.onnx").opset_import]
    assert "pass" in run("verify", out).stdout


def test_target_tokens_reach_plan_and_export(tmp_path):
    """Both are made for the sizes that calls will have, and the report says how long an FFN takes there."""
    options = ("--experts", "4", "--top-k", "2", "--select", "all", "--target-tokens", "3", "--target-tokens", "40")
    out = tmp_path / "out"
    result = json.loads(run("convert", "tiny_factory:model", "-o", out, *options, "--no-calibration", "--json").stdout)
    [ffn] = result["report"]["ffns"]
    assert [time["tokens"] for time in ffn["times"]] == [3, 40]
    assert result["export"]["target_tokens"] == [3, 40]


@pytest.mark.parametrize("budget", ["0.5", "error<=0.9", "60000ms"])
def test_a_budget_reaches_the_conversion(tmp_path, budget):
    """Each form is read, spent, reported, and written down as a config that can be read again."""
    options = ("--budget", budget, "--experts", "4", "--select", "all", "--target-tokens", "8", "--no-onnx", "--json")
    result = json.loads(run("convert", "tiny_factory:model", "-o", tmp_path / "out", *options).stdout)
    [ffn] = result["report"]["ffns"]
    assert "budget=" in ffn["reason"]
    assert any(note.startswith("budget=") for note in result["report"]["notes"])
    config = SparsifyConfig(**json.loads((tmp_path / "out" / "conversion.json").read_text())["config"])
    assert config.budget == budget


def test_a_trained_conversion_says_so_and_keeps_its_promises(tmp_path):
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


def test_files_of_others_are_not_overwritten(tmp_path):
    """The weights of the dense model have the same name, and -o with its folder is a slip of the hand."""
    (tmp_path / "model.safetensors").write_text("precious")
    assert "no conversion wrote" in refusal("convert", "tiny_factory:model", "-o", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["minilmm"],
            "'minilmm' is neither minilm, smollm2, an existing Hugging Face folder nor package.module:factory",
        ),
        (["nosuchmodule:f"], "No module named 'nosuchmodule'"),
        (["tiny_factory:nosuch"], "no function 'nosuch'"),
        (
            ["tiny_factory:model", "--experts", "4", "--top-k", "5"],
            "top_k must be between 1 and num_experts (4), got 5",
        ),
        (["tiny_factory:model", "--shared", "5"], "num_shared_experts must be between 0 and top_k (4)"),
        (["tiny_factory:model", "--calibration", "nosuch.txt"], "no calibration text at nosuch.txt"),
        (["minilm", "--no-calibration", "--calibration", "x"], "contradict each other"),
        (["tiny_factory:model", "--select", "nosuch.*", "--experts", "4"], "nosuch.*"),
        (["tiny_factory:model", "--select", "every-second", "--experts", "4"], "every-other, every-fourth, last-half"),
        (["tiny_factory:model", "--select", "0"], "select as a number of FFNs must be at least 1, got 0"),
        (["tiny_factory:model", "--select", "1.5"], "above 0 and at most 1, got 1.5"),
        (["tiny_factory:model", "--select", "2", "--experts", "2", "--top-k", "1"], "asks for the last 2 FFNs"),
        (["tiny_factory:model", "--override", "*:top_k"], "such as '*.11.*:num_experts=8,top_k=2'"),
        (["tiny_factory:model", "--override", "*:k=2"], "some of num_experts, top_k, num_shared_experts"),
        (["tiny_factory:model", "--widths", "32;32"], "such as 768,384,384, got '32;32'"),
        (["tiny_factory:model", "--widths", "32,16", "--top-k", "1", "--select", "all"], "[32, 16] add up to 48"),
        (["tiny_factory:model", "--override", "*:top_k=1+2"], "top_k must be a whole number, got [1, 2]"),
        (["tiny_factory:model", "--override", "*:top_k=0"], "top_k must be at least 1, got 0"),
        (["tiny_factory:model", "--override", "nosuch.*:top_k=1"], "matches none of the 1 FFNs"),
        (["tiny_factory:model", "--target-tokens", "0"], "target_tokens must be at least 1, got 0"),
        (["tiny_factory:model", "--target", "tpu"], "ort-cpu"),
        (["tiny_factory:model", "--ids-input", "x"], "ids_input='x' is for routers that read ids, labels or"),
        (["tiny_factory:model", "--routing-outputs", "--no-onnx"], "which --no-onnx leaves out; give one of them"),
        (["tiny_factory:model", "--fused-op", "--no-onnx"], "which --no-onnx leaves out; give one of them"),
        (["tiny_factory:model", "--fused-op", "--target", "portable"], "leave it out for --target portable"),
        (["tiny_factory:model", "--budget", "12"], "budget='12ms'"),
        (["tiny_factory:model", "--budget", "12ms"], "such as target_tokens=512"),
        (["tiny_factory:model", "--budget", "0.5", "--top-k", "2"], "give one or the other"),
        (["tiny_factory:model", "--budget", "0.5", "--no-calibration"], "leave out --no-calibration"),
        (["tiny_factory:model", "--distill", "5", "--no-calibration"], "leave out --no-calibration"),
        (["tiny_factory:model", "--distill", "5", "--router", "top-k"], "teaches the router mlp"),
        (["tiny_factory:model", "--budget", "1%", "--select", "all"], "Raise the budget to 6.25% or more"),
    ],
)
def test_bad_input_is_refused_with_one_message(tmp_path, arguments, message):
    """What was given and what is allowed, code 2, no traceback, and no folder."""
    assert message in refusal("convert", *arguments, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_folder_without_a_conversion_is_refused(tmp_path, command):
    """The message says what to give instead."""
    assert "Give a folder that `sparsify convert` wrote" in refusal(command, tmp_path)


def test_an_output_folder_below_a_file_is_refused_before_the_work(tmp_path):
    """The model is not even looked for."""
    (tmp_path / "file").touch()
    message = refusal("convert", "nosuchmodule:f", "-o", tmp_path / "file" / "out")
    assert "cannot be written: it is a file" in message or "cannot be written: Not a directory" in message


# The other user may be unable to read Python's own modules, so the first, likewise refused, run loads all of them.
AS_NOBODY = """
import os, sys
from typer.testing import CliRunner
from sparsify.cli import app

assert CliRunner().invoke(app, ["convert", "nosuchmodule:f", "-o", os.devnull + "/out"]).exit_code == 2
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix permissions")
def test_a_read_only_folder_is_refused_before_the_work():
    """Permissions do not bind root, so there the program becomes another user, who cannot enter pytest's folders."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        process = start("convert", "nosuchmodule:f", "-o", Path(name) / "out", program=AS_NOBODY)
        output, errors = process.communicate(timeout=60)
        Path(name).chmod(0o755)
    assert (process.returncode, output) == (2, ""), errors
    assert "cannot be written: Permission denied" in errors
    assert "choose a folder that you may write to" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_a_disk_that_fills_up_leaves_nothing(folder, tmp_path):
    """The system refuses to write the weights: one message, code 2, no partial file."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    process = start(
        "convert", "tiny_factory:model", "-o", tmp_path / "out", *OPTIONS, program=limit + PROGRAM, cwd=folder
    )
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    assert f"{tmp_path / 'out'}" in errors
    assert "too large" in errors
    assert "partial" not in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_while_converting_leaves_nothing(folder, tmp_path):
    """No partial file, one line on stderr, and the code that shells expect."""
    (folder / "loaded").unlink(missing_ok=True)
    process = start("convert", "tiny_factory:model", "-o", tmp_path / "out", *OPTIONS, cwd=folder)
    deadline = time.monotonic() + 60
    while not (folder / "loaded").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # the trace of the model takes longer
    assert list(tmp_path.iterdir()), "the conversion has not begun"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "Interrupted. Nothing was written" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
