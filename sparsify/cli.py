"""The command `sparsify`: inspect, convert, verify, bench."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsify import conversion_folder as files
from sparsify.api import Inspection
from sparsify.api import inspect as inspect_model
from sparsify.bench import BenchReport
from sparsify.cli_refusals import refuse_contradiction, refuse_distill, refuse_options_of_file
from sparsify.cli_steps import (
    FileOptions,
    convert_model,
    export_model,
    load_model,
    model_bytes,
    time_models,
    write_reports,
)
from sparsify.config import Select, SparsifyConfig
from sparsify.console import BROKEN_PROMISE, bad_input, exit_codes, make_console, nothing_written, show_stages
from sparsify.output_folder import output_folder, require_space
from sparsify.passes.select_ffns import PRESETS
from sparsify.passes.thread_ids import own_inputs
from sparsify.promises import Promise, check_onnx, check_split
from sparsify.report import Report
from sparsify.report_text import PLAIN_BOX, print_report, short
from sparsify.routers import describe_routers
from sparsify.sparse_model import SparseModel

if TYPE_CHECKING:
    from sparsify.passes.export_onnx import ExportReport

app = typer.Typer(
    help="Rewrite the feed-forward layers (FFNs) of a trained model into routed experts; export ONNX that skips them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_DEFAULTS = SparsifyConfig()


class StartName(str, Enum):
    """How experts are made of an FFN."""

    SPLIT = "split"
    UPCYCLE = "upcycle"
    SHARED = "shared"


class TargetName(str, Enum):
    """What will run the ONNX file."""

    ORT_CPU = "ort-cpu"
    ORT_CUDA = "ort-cuda"
    PORTABLE = "portable"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="minilm, smollm2, a local Hugging Face folder, or package.module:factory, a function without arguments "
        "that returns (model, args, kwargs, calibration batches); the last two may be left out.",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `sparsify convert` wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


@dataclasses.dataclass(frozen=True)
class Results:
    """What `convert` prints."""

    out: Path
    report: Report
    export: ExportReport | None
    bench: BenchReport | None
    files: Sequence[str]
    page_left_out: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "out": str(self.out),
            "files": list(self.files),
            "report": self.report.to_json(),
            "export": self.export.to_json() if self.export else None,
            "bench": self.bench.to_json() if self.bench else None,
        }


@app.command("inspect")
def inspect_command(model: Model, as_json: AsJson = False) -> None:
    """List the FFNs of a model: which can be converted, and why others cannot."""
    with exit_codes():
        with show_stages() as stages:
            dense = load_model(model, None, stages)
            with stages.running("inspect"):
                found = inspect_model(dense.model, dense.args, own_inputs(dense.model, dense.kwargs))
        if as_json:
            typer.echo(files.to_json({"model": model, **_inspection_json(found)}))
            return
        _print_inspection(found, make_console(stderr=False))


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; all of them appear, or none.")],
    start: Annotated[
        StartName, typer.Option(help="Divide the neurons, copy the FFN, or keep it beside new experts.")
    ] = StartName.SPLIT,
    router: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="See `sparsify routers`.", show_default="mlp for split, else top-k"),
    ] = None,
    router_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the router; repeat it for several.")
    ] = None,
    ids_input: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Input that the router reads beside the tokens, an integer or embedding for each; one that the model "
            "does not have is added to the result if the factory gives an example.",
            show_default="token ids, expert_labels or expert_embedding",
        ),
    ] = None,
    exact_start: Annotated[
        bool, typer.Option("--exact-start", help="Routing weights that leave the dense model unchanged at first.")
    ] = False,
    allow_non_causal: Annotated[
        bool, typer.Option("--allow-non-causal", help="Convert a causal model with a router that sees later tokens.")
    ] = False,
    experts: Annotated[
        int, typer.Option(help="Equal parts that the neurons of an FFN are divided into.")
    ] = _DEFAULTS.num_experts,
    top_k: Annotated[
        int | None, typer.Option(help="Parts that run for a token.", show_default=str(_DEFAULTS.top_k))
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(help="Parts among the top-k that run for every token.", show_default="top-k squared over experts"),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,..",
            help="Neurons of each part, shared ones first, such as 768,384,192,192, in place of --experts; their sum "
            "is that of the FFN.",
            show_default="equal parts",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BOUND",
            help="In the place of top-k, chosen for each FFN by measured error: 0.5 or 50%, of the multiply-adds of "
            "the FFNs; 12ms, of their calls with as many tokens as --target-tokens says; 'error<=0.1', relative L2 "
            "difference of the outputs to those of the dense model.",
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(PRESETS)}; a number (4: the last four FFNs that auto takes), a fraction (0.5: the last "
            "half of them), or a glob pattern on names, which can be repeated.",
            show_default="auto",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN:FIELDS",
            help="Numbers of the FFNs whose names match, such as '*.11.*:num_experts=8,top_k=2'; fields are "
            "num_experts, top_k, num_shared_experts and expert_widths (768+384+384). Repeat it for several; later ones "
            "win.",
        ),
    ] = None,
    target_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a call: auto leaves dense what is not faster there, as measured. Repeat it for several.",
        ),
    ] = None,
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="Convert from the weights alone.")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to calibrate on.", show_default="text that comes with the model"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the clustering and the training of routers.")] = _DEFAULTS.seed,
    target: Annotated[TargetName, typer.Option(help="What will run the ONNX file.")] = TargetName.ORT_CPU,
    no_refit: Annotated[bool, typer.Option("--no-refit", help="Leave down_proj as it is.")] = False,
    distill: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Train experts and routers so long, through the whole model, to give the hidden states and outputs of "
            "the dense one; needs no labels.",
        ),
    ] = 0,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Export ONNX files and check them.")] = True,
    routing_outputs: Annotated[
        bool,
        typer.Option("--routing-outputs", help="Outputs of the ONNX file for the experts of every token and weights."),
    ] = False,
    fused_op: Annotated[
        bool,
        typer.Option(
            "--fused-op",
            help="Write a layer as one op of ours where that is faster; sessions must register its library "
            "(sparsify.onnx_ops_library()).",
        ),
    ] = False,
    bench: Annotated[bool, typer.Option("--bench", help="Time dense against sparse at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a model, check it, export it to ONNX, and write a report."""
    with exit_codes():
        with bad_input():
            config = SparsifyConfig(
                start=start.value,
                router=router,
                router_options=dict(map(_router_option, router_option or ())),
                ids_input=ids_input,
                exact_start=exact_start,
                allow_non_causal=allow_non_causal,
                num_experts=experts,
                top_k=_DEFAULTS.top_k if top_k is None else top_k,
                num_shared_experts=shared,
                expert_widths=None if widths is None else _widths(widths),
                budget=budget,
                select=_select(select),
                overrides=tuple(map(_override, override or ())),
                target_tokens=tuple(target_tokens or ()),
                refit=not no_refit,
                seed=seed,
            )
            refuse_contradiction(no_calibration, calibration, budget, top_k if shared is None else shared)
            refuse_distill(distill, no_calibration, config)
            refuse_options_of_file(onnx, target.value, routing_outputs=routing_outputs, fused_op=fused_op)
        files.refuse_foreign_files(out)
        with nothing_written(), show_stages() as stages, output_folder(out) as staging:
            dense = load_model(model, calibration, stages)
            require_space(staging, model_bytes(dense.model) * (3 if onnx else 1))
            sparse, report = convert_model(dense, config, distill, calibrates=not no_calibration, stages=stages)
            with stages.running("save"):
                sparse.save(staging)
            options = FileOptions(target.value, config.tokens, routing_outputs, fused_op)
            export = export_model(sparse, dense, staging, options, stages) if onnx else None
            onnx_folder = staging if onnx else None
            timed = time_models(dense.model, sparse, onnx_folder, target.value, stages) if bench else None
            left_out = write_reports(staging, report, _moved(export, out), timed)
            names = [file.name for file in staging.iterdir()]
            record = files.describe(model, config, target.value if onnx else "", names)
            files.write_conversion(staging, record)
        files.remove_stale_files(out, record)
        results = Results(out, report, _moved(export, out), timed, record.files, left_out)
        if as_json:
            typer.echo(files.to_json(results.to_json()))
        _print_results(results, make_console(stderr=as_json))


@app.command()
def verify(out: Folder, as_json: AsJson = False) -> None:
    """Check the promises of a conversion: exact splits, and an ONNX file that computes what the saved model does."""
    with exit_codes():
        record = files.read_conversion(out)
        with show_stages() as stages:
            with stages.running("load"):
                sparse = SparseModel.load(out)
            with stages.running("verify"):
                promises = [check_split(out), check_onnx(sparse, out, record)]
        is_kept = all(promise.kept is not False for promise in promises)
        if as_json:
            typer.echo(files.to_json({"kept": is_kept, "promises": list(map(dataclasses.asdict, promises))}))
        _print_promises(promises, make_console(stderr=as_json))
        if not is_kept:
            raise typer.Exit(BROKEN_PROMISE)


@app.command("bench")
def bench_command(
    out: Folder,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxS", help="Batch x sequence, such as 8x128; repeat it.", show_default="a few usual ones"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the dense model against the converted one, in PyTorch and in onnxruntime."""
    with exit_codes():
        with bad_input():
            sizes = [_size(text) for text in size or ()]
        record = files.read_conversion(out)
        with show_stages() as stages:
            sparse = SparseModel.load(out)
            dense = load_model(record.model, None, stages)
            onnx_folder = out if files.ONNX in record.files else None
            report = time_models(dense.model, sparse, onnx_folder, record.target, stages, sizes)
        if as_json:
            typer.echo(files.to_json(report.to_json()))
            return
        typer.echo(str(report))


@app.command("routers")
def routers_command(as_json: AsJson = False) -> None:
    """List the routers: each with its paper, mechanism, properties, export form and needs."""
    found = describe_routers()
    if as_json:
        typer.echo(files.to_json(found))
        return
    table = Table(box=PLAIN_BOX, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("router", no_wrap=True)
    for heading in ("mechanism", "paper", "properties", "export", "needs"):
        table.add_column(heading, overflow="fold")
    for entry in found:
        properties = ", ".join(name for name in ("causal", "batch_invariant", "exact_at_init") if entry[name])
        needs = ", ".join(entry["needs"]) or "-"
        table.add_row(
            *map(Text, (entry["name"], entry["mechanism"], entry["paper"], properties, entry["export_form"], needs))
        )
    make_console(stderr=False).print(table)


def _router_option(text: str) -> tuple[str, str | int | float | bool]:
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise ValueError(f"--router-option takes NAME=VALUE, such as capacity_factor=1.25, got {text!r}")
    return name, {"true": True, "false": False}.get(value.lower(), _number_or_text(value))


def _select(patterns: Sequence[str] | None) -> Select:
    if not patterns:
        return _DEFAULTS.select
    return _number_or_text(patterns[0]) if len(patterns) == 1 else tuple(patterns)


def _number_or_text(text: str) -> str | int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _widths(text: str) -> list[int]:
    if re.fullmatch(r"\d+(,\d+)*", text) is None:
        raise ValueError(f"--widths takes numbers of neurons joined by commas, such as 768,384,384, got {text!r}")
    return [int(width) for width in text.split(",")]


def _override(text: str) -> tuple[str, dict[str, Any]]:
    if re.fullmatch(r".+:\w+=-?\d+(\+\d+)*(,\w+=-?\d+(\+\d+)*)*", text) is None:
        raise ValueError(
            "--override takes a pattern and numbers, such as '*.11.*:num_experts=8,top_k=2' for the FFNs with .11. in "
            f"their names, got {text!r}"
        )
    pattern, _, numbers = text.rpartition(":")
    pairs = (number.split("=") for number in numbers.split(","))
    return pattern, {name: _one_or_several(name, value) for name, value in pairs}


def _one_or_several(name: str, text: str) -> int | list[int]:
    numbers = [int(number) for number in text.split("+")]
    return numbers if name == "expert_widths" or len(numbers) > 1 else numbers[0]


def _size(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"\d+(x\d+)*", text) is None:
        raise ValueError(f"--size takes numbers joined by x, such as 8x128 for 8 sequences of 128 tokens, got {text!r}")
    return tuple(int(number) for number in text.split("x"))


def _moved(export: ExportReport | None, out: Path) -> ExportReport | None:
    """The report with the places that the files have once the staging folder is gone."""
    if export is None:
        return None
    dense_path = out / export.dense_path.name if export.dense_path else None
    return dataclasses.replace(export, path=out / export.path.name, dense_path=dense_path)


def _inspection_json(found: Inspection) -> dict[str, Any]:
    fields = ("name", "kind", "activation", "hidden_size", "intermediate_size", "flops_per_token", "num_parameters")
    return {
        "ffns": [{field: getattr(ffn, field) for field in fields} for ffn in found.ffns],
        "rejected": [dataclasses.asdict(rejection) for rejection in found.rejected],
        "skipped": [dataclasses.asdict(part) for part in found.skipped],
    }


def _print_inspection(found: Inspection, console: Console) -> None:
    table = Table(box=PLAIN_BOX, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("FFN", "kind", "activation", "D x F", "FLOPs/token", "parameters"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("FLOPs/token", "parameters") else "left")
    for ffn in found.ffns:
        size = f"{ffn.hidden_size}x{ffn.intermediate_size}"
        table.add_row(
            Text(ffn.name), ffn.kind, ffn.activation, size, short(ffn.flops_per_token), short(ffn.num_parameters)
        )
    if found.ffns:
        console.print(table)
    console.print(f"{len(found.ffns)} FFNs can be converted, {len(found.rejected)} cannot.")
    for rejection in found.rejected:
        console.print(Text(f"- {rejection}"))
    if found.skipped:
        console.print("The model cannot be traced as a whole, so these are FFNs of its parts. Not traced:")
    for part in found.skipped:
        console.print(Text(f"- {part}"))


def _print_results(results: Results, console: Console) -> None:
    print_report(results.report, console)
    for part in (results.export, results.bench):
        if part is not None:
            console.print()
            console.print(Text(str(part)), soft_wrap=True)
    console.print()
    if results.page_left_out:
        console.print(Text(f"Note: {results.page_left_out}"), soft_wrap=True)
    console.print(Text(f"Written to {results.out}: {', '.join(results.files)}"), soft_wrap=True)


def _print_promises(promises: Sequence[Promise], console: Console) -> None:
    words = {True: Text("pass", style="green"), False: Text("FAIL", style="bold red"), None: Text("-")}
    table = Table(box=PLAIN_BOX, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("promise", "found"):
        table.add_column(heading, overflow="fold")
    for promise in promises:
        table.add_row(words[promise.kept], Text(promise.promise), Text(promise.found))
    console.print(table)
