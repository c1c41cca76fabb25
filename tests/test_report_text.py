"""The report as text: complete, readable without colour, and never with a name cut short."""

from __future__ import annotations

import dataclasses

import pytest

from sparsify.report import FFNReport, MetricReport, Report
from sparsify.report_text import render, short

LONG = "model.vision_tower.encoder.blocks.11.feed_forward_network"


def converted(name: str, **changes) -> FFNReport:
    ffn = FFNReport(
        name=name,
        kind="gated",
        activation="silu",
        hidden_size=384,
        intermediate_size=1536,
        action="converted",
        reason="maps the hidden size to itself",
        num_experts=16,
        top_k=4,
        num_shared_experts=1,
        receipt=2.1e-7,
        error=0.183,
        error_before_refit=0.241,
        tokens_per_expert=(100, 250, 400),
        flops_before=2_359_296,
        flops_after=700_000,
        parameters_before=1_181_568,
        parameters_after=1_206_000,
    )
    return dataclasses.replace(ffn, **changes)


def make_report(*ffns: FFNReport, **changes) -> Report:
    report = Report(
        ffns=ffns,
        notes=("input `x` has a fixed size of 1 in dimension 0",),
        calibration_tokens=65_536,
        parameters_before=22_713_216,
        parameters_after=22_850_000,
        output_error=0.0812,
        seconds={"capture": 2.0, "convert": 8.0},
    )
    return dataclasses.replace(report, **changes)


DENSE = FFNReport("pooler", "plain", "tanh", 384, 384, "dense", "too narrow to pay", flops_before=10, flops_after=10)
REJECTED = FFNReport("head", "", "", 0, 0, "rejected", "`add_3` also reads the intermediate values")


def test_a_wide_report_holds_every_figure():
    """Nothing is silent: each field of the report that a reader needs is printed."""
    metric = MetricReport("perplexity", False, 17.21, 18.9)
    text = render(make_report(converted("layers.0"), DENSE, REJECTED, metric=metric), width=200)
    row = next(line for line in text.splitlines() if line.startswith("layers.0"))
    for figure in (
        "4 of 16, 1 shared",
        "0.241 -> 0.183",
        "2.36M -> 700k",
        "2.1e-07",
        "100/250/400",
        "gated silu",
        "384x1536",
        "1.18M -> 1.21M",
    ):
        assert figure in row
    for line in (
        "Left dense: pooler: too narrow to pay",
        "Cannot be split: head: `add_3` also reads the intermediate values",
        "1 of 3",
        "0.0812",
        "perplexity: 17.21 -> 18.9 (lower is better)",
        "65,536",
        "10.0 (capture 2.0, convert 8.0)",
        "Note: input `x` has a fixed size of 1 in dimension 0",
    ):
        assert line in text


def test_flops_of_the_model_count_what_stayed_dense():
    """A saving is told of all FFNs, not only of those that were converted."""
    text = render(make_report(converted("a", flops_before=90, flops_after=40), DENSE), width=120)
    assert "100 -> 50 (-50.0%)" in text


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_names_are_never_cut_or_wrapped(width):
    """A user copies names from the table into --select."""
    text = render(make_report(converted(LONG), converted(f"{LONG}.second")), width)
    assert [line.split()[0] for line in text.splitlines() if line.startswith(LONG)][:2] == [LONG, f"{LONG}.second"]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_table_says_what_it_leaves_out(width):
    """Figures that do not fit are named, and the lines that remain keep the width."""
    text = render(make_report(converted("layers.0"), DENSE), width)
    assert max(map(len, text.splitlines())) <= width
    hidden = text.partition("(no room for: ")[2].replace("\n", " ").partition(")")[0]
    assert "parameters" in hidden
    assert "FFN" not in hidden.split(", ")


def test_dead_experts_are_flagged():
    """An expert that no token reached is the first thing to look for."""
    text = render(make_report(converted("layers.0", tokens_per_expert=(0, 0, 12))), width=160)
    assert "0/4/12, 2 DEAD" in text


def test_markup_in_names_and_notes_is_text():
    """Rich would take [bold] for a style and swallow it."""
    report = make_report(converted("layers[0]"), notes=("[bold]x[/bold] is odd",))
    text = render(report, width=120)
    assert "layers[0]" in text
    assert "[bold]x[/bold] is odd" in text


def test_the_text_is_plain_ascii_without_colour():
    """It goes to logs and to terminals of every encoding."""
    text = render(make_report(converted("layers.0", tokens_per_expert=(0, 3)), DENSE, REJECTED), width=120)
    assert text.isascii()
    assert "\x1b" not in text
    assert text == "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_equal_reasons_are_told_once():
    """Thirty layers with one reason must not fill the screen."""
    text = render(make_report(*(converted(f"layers.{i}") for i in range(30))), width=120)
    assert text.count("maps the hidden size to itself") == 1
    assert "Converted: layers.0 ... layers.29 (30 FFNs): maps the hidden size to itself" in text


def test_a_report_of_nothing_converted_prints():
    """Not every model has an FFN that pays."""
    text = render(make_report(DENSE, calibration_tokens=0, seconds={}), width=80)
    assert "0 of 1" in text
    assert "none" in text
    assert str(make_report(DENSE)) == render(make_report(DENSE), width=120)


def test_a_tiny_error_is_not_shown_as_zero():
    """With all experts on the error is rounding, not nothing."""
    assert "3e-07" in render(make_report(converted("a", error=3e-7, error_before_refit=None)), width=120)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (1536, "1.54k"), (999_600, "1M"), (2.36e9, "2.36G"), (1e12, "1T")],
)
def test_short_numbers_have_three_digits(number, text):
    """Rounding must not give 1e+03k."""
    assert short(number) == text
