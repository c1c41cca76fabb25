"""A `Report` as tables of plain text, for terminals and `print`.

D hidden_size, F intermediate_size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import Box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from sparsify.report import FFNReport, Report

# A rule below the header and nothing else, in characters that every terminal and log has.
PLAIN_BOX = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
# To measure how wide a table would like to be.
_ENDLESS = Console(file=io.StringIO(), width=100_000)
# The name, the experts and the error of an FFN are shown however narrow the terminal is.
_LEAST_COLUMNS = 3


@dataclass(frozen=True)
class Column:
    """One figure of an FFN: its heading, its text, and whether text or number decides the alignment."""

    heading: str
    text: Callable[[FFNReport], str]
    is_number: bool = True


def render(report: Report, width: int) -> str:
    """Draws the report without colour codes.

    Args:
        report: what to draw.
        width: of the lines, in characters. Names are never cut, so a line may be longer.

    Returns:
        Several lines, the last one with its end.
    """
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, color_system=None, legacy_windows=False))
    lines = stream.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def print_report(report: Report, console: Console) -> None:
    """Draws the report on a rich console.

    Figures for which there is no room are left out, least important ones first, and named below the table.
    """
    for part in _parts(report, console.width):
        # Names are not cut: a table that is too wide is left to the terminal to break.
        needed = _measure(part) if isinstance(part, Table) else 0
        options = console.options.update(width=max(console.width, needed))
        console.print(Segments(console.render(part, options)), crop=False)


def _parts(report: Report, width: int) -> Iterator[RenderableType]:
    if report.converted:
        yield from _converted_table(report.converted, width)
        yield ""
    for title, action in (("Converted", "converted"), ("Left dense", "dense"), ("Cannot be split", "rejected")):
        group = [ffn for ffn in report.ffns if ffn.action == action]
        for names, reason in grouped_reasons(group):
            yield Text.assemble((title, "bold"), f": {names}: {reason}")
    yield ""
    yield _facts_table(report)
    for note in report.notes:
        yield Text.assemble(("Note", "bold"), f": {note}")


def size(ffn: FFNReport) -> str:
    """D x F, or nothing where they are not known."""
    return f"{ffn.hidden_size}x{ffn.intermediate_size}" if ffn.hidden_size else ""


def kind(ffn: FFNReport) -> str:
    """The shape of the FFN and its activation."""
    return f"{ffn.kind} {ffn.activation}".strip()


def experts(ffn: FFNReport) -> str:
    """How many experts run for a token, of how many."""
    shared = f", {ffn.num_shared_experts} shared" if ffn.num_shared_experts else ""
    return f"{ffn.top_k} of {ffn.num_experts}{shared}"


def error(ffn: FFNReport) -> str:
    """The relative error before and after the refit."""
    if ffn.error is None:
        return ""
    after = _fraction(ffn.error)
    return after if ffn.error_before_refit is None else f"{_fraction(ffn.error_before_refit)} -> {after}"


def receipt(ffn: FFNReport) -> str:
    """The relative difference to the dense FFN with all experts on."""
    return "" if ffn.receipt is None else f"{ffn.receipt:.1e}"


def load(ffn: FFNReport) -> str:
    """The fewest, the mean and the most tokens of an expert, and how many got none."""
    tokens = ffn.tokens_per_expert
    if not tokens:
        return ""
    dead = f", {tokens.count(0)} DEAD" if 0 in tokens else ""
    return f"{short(min(tokens))}/{short(sum(tokens) / len(tokens))}/{short(max(tokens))}{dead}"


def flops(ffn: FFNReport) -> str:
    """FLOPs per token before and after."""
    return f"{short(ffn.flops_before)} -> {short(ffn.flops_after)}"


def parameters(ffn: FFNReport) -> str:
    """Parameters before and after."""
    return f"{short(ffn.parameters_before)} -> {short(ffn.parameters_after)}"


def short(number: float) -> str:
    """A number in three digits and a unit: 1536 is 1.54k."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def change(before: float, after: float) -> str:
    """Two numbers and by how much the second differs."""
    percent = f" ({after / before - 1:+.1%})" if before else ""
    return f"{short(before)} -> {short(after)}{percent}"


def facts(report: Report) -> list[tuple[str, str]]:
    """What there is to say of the whole model: labels and texts."""
    legal = [ffn for ffn in report.ffns if ffn.action != "rejected"]
    before = sum(ffn.flops_before for ffn in legal)
    after = sum(ffn.flops_after if ffn.action == "converted" else ffn.flops_before for ffn in legal)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    seconds = f"{sum(report.seconds.values()):.1f} ({stages})"
    return [
        ("FFNs converted", f"{len(report.converted)} of {len(report.ffns)}"),
        ("FFN FLOPs per token", change(before, after)),
        ("Parameters", change(report.parameters_before, report.parameters_after)),
        ("Worst receipt", f"{report.max_receipt:.1e} (relative, all experts on)"),
        ("Output error", f"{report.output_error:.4f} (relative L2, example inputs)"),
        *_metric(report),
        ("Calibration tokens", f"{report.calibration_tokens:,}" if report.calibration_tokens else "none"),
        *_times(report),
        *([("Seconds", seconds)] if report.seconds else []),
    ]


def grouped_reasons(ffns: Iterable[FFNReport]) -> list[tuple[str, str]]:
    """Each reason once, with the names it holds for, in order: pairs of names and reason."""
    return _grouped((ffn.name, ffn.reason) for ffn in ffns)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, text in pairs:
        names.setdefault(text, []).append(name)
    return [(_span(group), text) for text, group in names.items()]


def _times(report: Report) -> list[tuple[str, str]]:
    pairs = ((ffn.name, str(time)) for ffn in report.ffns for time in ffn.times)
    return [("Time of an FFN", f"{names}: {text}") for names, text in _grouped(pairs)]


def columns() -> list[Column]:
    """The figures of a converted FFN, the most important ones first."""
    return [
        Column("FFN", lambda ffn: ffn.name, is_number=False),
        Column("experts run", experts, is_number=False),
        Column("error", error),
        Column("FLOPs/token", flops),
        Column("receipt", receipt),
        Column("tokens/expert", load),
        Column("kind", kind, is_number=False),
        Column("D x F", size),
        Column("parameters", parameters),
    ]


def _fraction(value: float) -> str:
    return f"{value:.3f}" if value == 0 or value >= 5e-4 else f"{value:.0e}"


def _metric(report: Report) -> list[tuple[str, str]]:
    metric = report.metric
    if metric is None:
        return []
    direction = "higher" if metric.higher_is_better else "lower"
    return [("Metric", f"{metric.name}: {metric.before:.4g} -> {metric.after:.4g} ({direction} is better)")]


def _span(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} ... {names[-1]} ({len(names)} FFNs)"


def _converted_table(ffns: Sequence[FFNReport], width: int) -> Iterator[RenderableType]:
    chosen = columns()
    while len(chosen) > _LEAST_COLUMNS and _measure(_table(chosen, ffns)) > width:
        chosen.pop()
    yield _table(chosen, ffns)
    if left_out := [column.heading for column in columns()[len(chosen) :]]:
        yield Text(f"(no room for: {', '.join(left_out)})", style="dim")


def _table(chosen: Sequence[Column], ffns: Sequence[FFNReport]) -> Table:
    table = Table(box=PLAIN_BOX, show_edge=False, padding=(0, 1, 0, 0))
    for column in chosen:
        table.add_column(column.heading, justify="right" if column.is_number else "left", no_wrap=True)
    for ffn in ffns:
        style = "yellow" if 0 in ffn.tokens_per_expert else ""
        table.add_row(*(Text(column.text(ffn), style=style) for column in chosen))
    return table


def _measure(table: Table) -> int:
    return Measurement.get(_ENDLESS, _ENDLESS.options, table).maximum


def _facts_table(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column("fact", no_wrap=True)
    table.add_column("text", overflow="fold")
    for label, text in facts(report):
        table.add_row(Text(label, style="bold"), Text(text))
    return table
