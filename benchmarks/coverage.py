"""Convert architectures of many kinds, and compare what is found with what their configurations say they hold.

    python benchmarks/coverage.py                       # all of them, to out/coverage; goes on where it was stopped
    python benchmarks/coverage.py --only 'timm/*' --only bert --fresh

Every architecture (`coverage_models`) is small, has random weights and gets a process of its own. It passes when

1. as many FFNs are matched as `coverage_expected.json` says there are, and at least as many near misses are refused;
2. every one of them becomes 4 experts of which 2 run, with a receipt of at most 1e-5;
3. with 4 of 4 experts the outputs are those of the dense model (relative difference at most 1e-4);
4. the ONNX file of the converted model computes the same in onnxruntime (checked by `export_onnx`).

The expectations were written by reading the code of the models. Where the matcher disagreed, that code was read again.
"""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from coverage_check import HERE, Expectation, Row, read_expectations, write

_LIBRARIES = ("torch", "transformers", "timm", "torchvision")
_HEADER = (
    "| architecture | expected | matched | refused | converted | receipt | all experts | ONNX | s | why |",
    "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
)


def run(name: str, expected: Expectation, timeout: float) -> Row:
    """One architecture in a process of its own; a crash or a timeout becomes a row with its reason."""
    start = time.perf_counter()
    row = Row.empty(name, expected)
    with tempfile.TemporaryDirectory(prefix="sparsify-coverage-") as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, "-W", "ignore", str(HERE / "coverage_check.py"), name, str(result)]
        try:
            done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
            end = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            reason = f"the process ended with {done.returncode}: {' '.join(end)}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:.0f} s"
        if result.exists():
            return Row(**json.loads(result.read_text(encoding="utf-8")))
    row.failures["matched"] = reason
    row.seconds = time.perf_counter() - start
    return row


def describe_machine() -> str:
    """What the table was measured on."""
    import onnxruntime

    libraries = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    return f"{os.cpu_count()} CPUs ({platform.machine()}), {libraries}, onnxruntime {onnxruntime.__version__}"


def to_page(families: Mapping[str, Sequence[Row]], expectations: Mapping[str, Expectation], machine: str) -> str:
    """The Markdown page."""
    rows = [row for members in families.values() for row in members]
    failed = [row for row in rows if not row.passes]
    lines = [
        "# Architectures",
        "",
        f"{len(rows)} architectures, {len(rows) - len(failed)} pass in every column. {machine}.",
        "",
        "Small models with random weights, converted as they are, without their names being known to the compiler:",
        "`python benchmarks/coverage.py`. *Expected* counts the FFNs of the blocks and other subgraphs of that shape",
        "(heads, squeeze-excitation, projectors) by the configuration and the code of the model; *refused* are near",
        "misses, left dense with a reason. *Receipt*, *all experts* (4 of 4, against the dense model) and *ONNX* (2 of",
        "4, in onnxruntime, at several shapes) are the largest relative differences.",
    ]
    for family, members in families.items():
        lines += ["", f"## {family}", "", *_HEADER, *(_table_row(row, expectations[row.name].why) for row in members)]
    if failed:
        lines += ["", "## What fails, and why", ""]
        lines += [f"- {row.name}, {column}: {_one_line(why)}" for row in failed for column, why in row.failures.items()]
    return "\n".join(lines) + "\n"


def _table_row(row: Row, why: str) -> str:
    name = row.name if row.passes else f"**{row.name}**"
    counts = [f"{value}" if value is not None else "" for value in (row.matched, row.refused, row.converted)]
    errors = [f"{value:.0e}" if value is not None else "" for value in (row.receipt, row.output_error, row.onnx_error)]
    return f"| {' | '.join((name, str(row.expected), *counts, *errors, f'{row.seconds:.0f}', why))} |"


def _one_line(text: str) -> str:
    """Short, and without the places of files on this machine."""
    flat = " ".join(text.split())
    for place in (sys.prefix, str(HERE.parent)):
        flat = flat.replace(f"{place}/", "")
    return flat if len(flat) <= 400 else f"{flat[:400]} ..."


def _read_rows(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {entry["name"]: Row(**entry) for entry in entries}


def _write_all(output: Path, rows: Mapping[str, Row], names: Mapping[str, Sequence[str]], machine: str) -> None:
    families = {family: [rows[name] for name in members if name in rows] for family, members in names.items()}
    families = {family: members for family, members in families.items() if members}
    document = {"machine": machine, "rows": [asdict(row) for members in families.values() for row in members]}
    write(output / "coverage.json", json.dumps(document, indent=1) + "\n")
    write(output / "coverage.md", to_page(families, read_expectations(), machine))


def _stands(row: Row | None, expected: Expectation, retry: bool) -> bool:
    """There is a row, it was held against the expectation of today, and it passed or is not to be tried again."""
    if row is None or (row.expected, row.must_refuse) != (expected.ffns + expected.other, expected.refused):
        return False
    return row.passes or not retry


def _names() -> dict[str, list[str]]:
    """All architectures, by family."""
    from coverage_models import FAMILIES

    names = {family: list(builders) for family, builders in FAMILIES.items()}
    odd = {name for members in names.values() for name in members} ^ read_expectations().keys()
    if odd:
        raise typer.BadParameter(f"these have no builder, or no entry in coverage_expected.json: {sorted(odd)}")
    return names


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Names; repeat it for several.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of coverage.json and coverage.md.")] = Path("out/coverage"),
    timeout: Annotated[float, typer.Option(help="Seconds that one architecture may take.")] = 600.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what has a row already.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed.")] = False,
) -> None:
    """Run the architectures one after the other; the files are written after each, so a second run goes on there."""
    names, expectations = _names(), read_expectations()
    rows, machine = _read_rows(output / "coverage.json"), describe_machine()
    everyone = [name for members in names.values() for name in members]
    chosen = [name for name in everyone if not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)]
    for name in chosen:
        if not fresh and _stands(rows.get(name), expectations[name], retry):
            continue
        row = rows[name] = run(name, expectations[name], timeout)
        verdict = (
            "ok" if row.passes else "; ".join(f"{column}: {_one_line(why)}" for column, why in row.failures.items())
        )
        print(f"{name}: {verdict} ({row.seconds:.0f} s)", flush=True)
        _write_all(output, rows, names, machine)
    _write_all(output, rows, names, machine)
    print(f"{len(chosen)} architectures, {sum(rows[name].passes for name in chosen)} pass in every column")


if __name__ == "__main__":
    typer.run(main)
