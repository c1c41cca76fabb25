"""Commands that cannot be done: one message with the reason, before any work, and nothing left behind."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest


def test_files_of_others_are_not_overwritten(tmp_path, refusal):
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
def test_bad_input_is_refused_with_one_message(tmp_path, arguments, message, refusal):
    """What was given and what is allowed, code 2, no traceback, and no folder."""
    assert message in refusal("convert", *arguments, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_folder_without_a_conversion_is_refused(tmp_path, command, refusal):
    """The message says what to give instead."""
    assert "Give a folder that `sparsify convert` wrote" in refusal(command, tmp_path)


def test_an_output_folder_below_a_file_is_refused_before_the_work(tmp_path, refusal):
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
def test_a_read_only_folder_is_refused_before_the_work(start):
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
def test_a_disk_that_fills_up_leaves_nothing(folder, tmp_path, start, options):
    """The system refuses to write the weights: one message, code 2, no partial file."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    process = start("convert", "tiny_factory:model", "-o", tmp_path / "out", *options, before=limit, cwd=folder)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    assert f"{tmp_path / 'out'}" in errors
    assert "too large" in errors
    assert "partial" not in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_while_converting_leaves_nothing(folder, tmp_path, start, options):
    """No partial file, one line on stderr, and the code that shells expect."""
    (folder / "loaded").unlink(missing_ok=True)
    process = start("convert", "tiny_factory:model", "-o", tmp_path / "out", *options, cwd=folder)
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
