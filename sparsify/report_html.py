"""A `Report` as one HTML page that needs nothing else: no script, no network, the plot inside."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.bench import BenchReport, describe_machine, timing_cells
from sparsify.errors import OutputError
from sparsify.report import FFNReport, Report
from sparsify.report_text import columns, facts, grouped_reasons, kind, size

if TYPE_CHECKING:
    from sparsify.passes.export_onnx import ExportReport

_STYLE = """
:root { color: #1c2330; background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body { max-width: 78rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p, li { max-width: 46rem; } .lead { color: #5a6475; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #5a6475; border-bottom: 1px solid #c9d0da; }
th, td { padding: .3rem 1.1rem .3rem 0; vertical-align: top; white-space: nowrap; }
td { border-bottom: 1px solid #eceff3; } .number { text-align: right; }
td.prose { white-space: normal; min-width: 18rem; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.dead { background: #fff3d6; } .good td:nth-child(5) { color: #14713d; } .bad td:nth-child(5) { color: #b3261e; }
img { max-width: 100%; height: auto; }
"""


def write_html(
    report: Report, path: Path, export: ExportReport | None = None, bench: BenchReport | None = None
) -> None:
    """Writes the report as a web page of one file.

    Args:
        report: what was converted.
        path: the file.
        export: what was exported, to be told as well.
        bench: what was timed, to be told as well.

    Raises:
        ImportError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    page = _page(report, export, bench)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error


def _page(report: Report, export: ExportReport | None, bench: BenchReport | None) -> str:
    converted = report.converted
    left = [ffn for ffn in report.ffns if ffn.action != "converted"]
    sections = [
        ("The whole model", _table((), [(_bold(label), _text(_arrows(text))) for label, text in facts(report)])),
        ("Notes", _list(report.notes) if report.notes else ""),
        ("Converted", (_converted(converted) + _reasons(converted)) if converted else ""),
        ("Load of the experts", _load(converted)),
        ("Left as they were", _left(left) if left else ""),
        ("ONNX", _export(export) if export else ""),
        ("Speed", _bench(bench) if bench else ""),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparsify report</title><style>{_STYLE}</style></head><body>"
        '<h1>sparsify report</h1><p class="lead">What was done to every feed-forward layer (FFN), why, and what it '
        f"costs.</p>{body}</body></html>\n"
    )


def _converted(ffns: Sequence[FFNReport]) -> str:
    shown = columns()
    rows = [
        [_cell(_arrows(column.text(ffn)), number=column.is_number, code=column.heading == "FFN") for column in shown]
        for ffn in ffns
    ]
    heads = [_head(column.heading, number=column.is_number) for column in shown]
    marked = ["dead" if 0 in ffn.tokens_per_expert else "" for ffn in ffns]
    return _raw_table(heads, rows, marked) + (
        "<p>Error: relative L2 error of the output on held-out tokens, before and after the refit. Receipt: largest "
        "relative difference to the dense FFN with all experts on. Tokens per expert: fewest, mean and most.</p>"
    )


def _reasons(ffns: Sequence[FFNReport]) -> str:
    return "".join(f"<p><code>{_text(names)}</code>: {_text(reason)}</p>" for names, reason in grouped_reasons(ffns))


def _left(ffns: Sequence[FFNReport]) -> str:
    rows = [
        [
            _cell(ffn.name, code=True),
            *(_cell(text) for text in (kind(ffn), size(ffn), ffn.action)),
            f'<td class="prose">{_text(ffn.reason)}</td>',
        ]
        for ffn in ffns
    ]
    return _raw_table([_head(head) for head in ("FFN", "kind", "D x F", "left", "reason")], rows)


def _export(export: ExportReport) -> str:
    about = [
        ("File", f"{export.path.name}, {export.file_bytes / 1e6:.1f} MB, opset {export.opset}, for {export.target}"),
        ("Parity with PyTorch", str(export.parity or "not checked")),
        *([] if export.load_seconds is None else [("Loads in", f"{export.load_seconds:.2f} s")]),
        *([("Dense model", export.dense_path.name)] if export.dense_path else []),
    ]
    layers = [(f"<code>{_text(a.name)}</code>", _text(a.lowering), _text(a.reason)) for a in export.layers]
    return _table((), [(_bold(label), _text(text)) for label, text in about]) + _table(
        ("FFN", "lowering", "why"), layers
    )


def _bench(bench: BenchReport) -> str:
    heads = ("runtime", "inputs", "dense ms", "sparse ms", "speedup", "range")
    rows = [[_cell(text, number=i > 1) for i, text in enumerate(timing_cells(timing))] for timing in bench.timings]
    marked = ["good" if timing.speedup >= 1 else "bad" for timing in bench.timings]
    table = _raw_table([_head(head, number=i > 1) for i, head in enumerate(heads)], rows, marked)
    return f"<p>{_text(describe_machine(bench.machine))}</p>{table}"


def _load(ffns: Sequence[FFNReport]) -> str:
    loaded = [ffn for ffn in ffns if sum(ffn.tokens_per_expert)]
    if not loaded:
        return ""
    image = base64.b64encode(_load_plot(loaded)).decode()
    names = "; ".join(f"{ffn.name}: {', '.join(map(str, ffn.tokens_per_expert))}" for ffn in loaded)
    return (
        f'<img alt="Tokens per expert, by FFN: {_text(names)}" src="data:image/png;base64,{image}">'
        "<p>Calibration tokens of every routed expert, relative to an even load. Experts are in the order of their "
        "load. A cross marks an expert that got no token.</p>"
    )


def _load_plot(ffns: Sequence[FFNReport]) -> bytes:
    """A heat map, one row an FFN and one column an expert, as a PNG."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("report.html needs matplotlib: pip install sparsify-moe[demo]") from error
    width = max(len(ffn.tokens_per_expert) for ffn in ffns)
    rows = [_relative_load(ffn.tokens_per_expert, width) for ffn in ffns]
    # A Figure of its own, as pyplot would keep state and choose a window system.
    figure = Figure(figsize=(min(11, 4 + 0.4 * width), 1.3 + 0.28 * len(ffns)), dpi=150, layout="constrained")
    axes = figure.subplots()
    most = max(2.0, *(value for row in rows for value in row if not math.isnan(value)))
    image = axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=most, interpolation="nearest")
    for y, row in enumerate(rows):
        dead = [x for x, value in enumerate(row) if value == 0]
        axes.plot(dead, [y] * len(dead), "x", color="#b3261e", markersize=6)
    axes.set_yticks(range(len(ffns)), [ffn.name for ffn in ffns], fontsize=8)
    axes.set_xlabel("experts, the busiest first")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="tokens / even load")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _relative_load(tokens: Sequence[int], width: int) -> list[float]:
    """Loads, the greatest first, 1 for an even one; NaN where an FFN has fewer experts than others."""
    mean = sum(tokens) / len(tokens)
    return [count / mean for count in sorted(tokens, reverse=True)] + [math.nan] * (width - len(tokens))


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of prose; the cells are HTML."""
    cells = [[f'<td class="prose">{cell}</td>' if i else f"<td>{cell}</td>" for i, cell in enumerate(r)] for r in rows]
    return _raw_table([_head(head) for head in heads], cells) if cells else ""


def _raw_table(heads: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[str] = ()) -> str:
    head = f"<thead><tr>{''.join(heads)}</tr></thead>" if heads else ""
    classes = [f' class="{mark}"' if mark else "" for mark in marked] or [""] * len(rows)
    body = "".join(f"<tr{mark}>{''.join(row)}</tr>" for mark, row in zip(classes, rows, strict=True))
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _head(text: str, *, number: bool = False) -> str:
    return f'<th class="number">{_text(text)}</th>' if number else f"<th>{_text(text)}</th>"


def _cell(text: str, *, number: bool = False, code: bool = False) -> str:
    content = f"<code>{_text(text)}</code>" if code else _text(text)
    return f'<td class="number">{content}</td>' if number else f"<td>{content}</td>"


def _bold(text: str) -> str:
    return f"<strong>{_text(text)}</strong>"


def _text(text: str) -> str:
    return html.escape(text)


def _arrows(text: str) -> str:
    """Terminals get ASCII, a page has better signs."""
    return text.replace("->", "\N{RIGHTWARDS ARROW}")
