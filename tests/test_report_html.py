"""The report as a web page: complete, safe to open, and dependent on nothing."""

from __future__ import annotations

import base64
import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest

from sparsify.bench import BenchReport, Machine, Timing
from sparsify.errors import OutputError
from sparsify.passes.export_onnx import ExportReport, LayerExport
from sparsify.report import FFNReport, MetricReport, Report
from sparsify.report_html import write_html

FFN = FFNReport(
    name="layers.0",
    kind="plain",
    activation="gelu",
    hidden_size=384,
    intermediate_size=1536,
    action="converted",
    reason="maps the hidden size to itself",
    num_experts=5,
    top_k=2,
    num_shared_experts=1,
    receipt=2e-7,
    error=0.18,
    error_before_refit=0.24,
    tokens_per_expert=(10, 0, 30, 20),
)
LEFT = FFNReport("pooler", "plain", "tanh", 384, 384, "dense", "too narrow to pay")
REPORT = Report(
    ffns=(FFN, dataclasses.replace(FFN, name="layers.1", tokens_per_expert=(1, 2, 3)), LEFT),
    notes=("input `x` is fixed",),
    calibration_tokens=1000,
    parameters_before=100,
    parameters_after=120,
    output_error=0.08,
    seconds={"capture": 1.0},
    metric=MetricReport("accuracy", True, 0.9, 0.89),
)
EXPORT = ExportReport(
    Path("model.onnx"), "ort-cpu", (1,), 20, (LayerExport("layers.0", "moe_op", "exact"),), None, 1000, None
)
BENCH = BenchReport(Machine("A CPU", 2, 2, "2.14", "1.31"), (Timing("pytorch", {"batch": 8}, (2.0,), (1.0,)),))


class Checker(HTMLParser):
    """Collects open tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(path: Path, *arguments) -> Checker:
    write_html(*arguments)
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.open == []
    return checker


def test_the_page_holds_what_the_text_holds(tmp_path):
    """FFNs, reasons, figures of the model, export and timings are all there, in well-formed HTML."""
    page = written(tmp_path / "r.html", REPORT, tmp_path / "r.html", EXPORT, BENCH)
    for text in (
        "layers.0",
        "2 of 5, 1 shared",
        "0.240 \N{RIGHTWARDS ARROW} 0.180",
        "2.0e-07",
        "1 DEAD",
        "maps the hidden size to itself",
        "pooler",
        "too narrow to pay",
        "accuracy",
        "input `x` is fixed",
        "moe_op",
        "A CPU",
        "2.00x",
    ):
        assert text in page.text


def test_the_page_needs_nothing_else(tmp_path):
    """It is mailed and archived: no script, no link, no address, and the plot inside."""
    path = tmp_path / "r.html"
    page = written(path, REPORT, path, EXPORT, BENCH)
    [source] = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert source is not None
    rest = path.read_text(encoding="utf-8").replace(source, "")
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", rest)
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_every_string_is_escaped(tmp_path):
    """Names and reasons come from models that others made."""
    evil = '"><script>alert(1)</script>'
    path = tmp_path / "r.html"
    ffns = (dataclasses.replace(FFN, name=evil, reason=evil, activation=evil), dataclasses.replace(LEFT, reason=evil))
    report = dataclasses.replace(REPORT, ffns=ffns, notes=(evil,), metric=MetricReport(evil, True, 1, 1))
    export = dataclasses.replace(EXPORT, path=Path(evil), layers=(LayerExport(evil, cast(Any, evil), evil),))
    bench = BenchReport(dataclasses.replace(BENCH.machine, cpu=evil), (Timing(evil, {evil: 1}, (1.0,), (1.0,)),))
    page = written(path, report, path, export, bench)
    assert "<script" not in path.read_text(encoding="utf-8")
    assert page.text.count("<script>") >= 10


def test_the_same_report_gives_the_same_page(tmp_path):
    """A page can be compared with the one before."""
    for name in ("a.html", "b.html"):
        write_html(REPORT, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_report_without_load_has_no_plot(tmp_path):
    """Where nothing was converted there is nothing to draw, and matplotlib is not needed."""
    path = tmp_path / "r.html"
    page = written(path, dataclasses.replace(REPORT, ffns=(LEFT,)), path)
    assert not [tag for tag, _, _ in page.attributes if tag == "img"]


def test_without_matplotlib_the_error_names_the_command(tmp_path, monkeypatch):
    """The plot is an extra; a user without it is told what to type, and finds no half page."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install sparsify-moe\[demo\]"):
        write_html(REPORT, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_says_why(tmp_path):
    """A folder in place of the file is no traceback."""
    with pytest.raises(OutputError, match="Is a directory"):
        write_html(REPORT, tmp_path)
