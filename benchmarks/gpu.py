"""Check and time the expert kernels on the GPU of this machine.

    python benchmarks/gpu.py                    # checks, then every shape, to out/gpu: JSON and Markdown
    python benchmarks/gpu.py --quick            # checks and a few shapes, in some minutes
    python benchmarks/gpu.py --compile-only     # no GPU needed: compile every kernel for four generations of cards
    python benchmarks/gpu.py --interpret        # no GPU needed: the same code at a tiny shape, in Triton's interpreter

Without a GPU and without one of the last two it says so and ends with 2. It ends with 1 if a check fails. Layers take
turns, the L2 cache is overwritten before each run, and the median is reported. A backward is what autograd takes for
all gradients, without a forward. A rate counts 6 T K D I operations forward and twice that backward, in decode the
bytes of the experts that are chosen; for the dense layer all there are. `share` is of the dense bf16 peak, or of the
memory bandwidth, in the card's data sheet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Data sheets: part of the name, dense bf16 TFLOP/s, TB/s. The first that fits.
CARDS = (
    ("H100 PCIe", 756.0, 2.0),
    ("H100 NVL", 835.0, 3.9),
    ("H100", 989.0, 3.35),
    ("H200", 989.0, 4.8),
    ("B200", 2250.0, 8.0),
    ("A100-SXM4-80GB", 312.0, 2.039),
    ("A100 80GB", 312.0, 1.935),
    ("A100", 312.0, 1.555),
    ("RTX 4090", 165.2, 1.008),
    ("L40S", 362.0, 0.864),
    ("L4", 121.0, 0.3),
)


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compile-only", action="store_true")
    only.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if options.compile_only:
        return _compile_all(options.output)
    if not options.interpret and not torch.cuda.is_available():
        print("there is no CUDA device here; --compile-only and --interpret need none", file=sys.stderr)
        return 2
    from gpu_measure import measure

    report = measure(options.dtype, options.quick, options.interpret, options.repeats, CARDS)
    _write(options.output / "gpu.json", json.dumps(report, indent=1) + "\n")
    _write(options.output / "gpu.md", _page(report))
    failed = [check for check in report["checks"] if not check["passed"]]
    print(f"{len(report['checks']) - len(failed)} checks passed, {len(failed)} failed; see {options.output / 'gpu.md'}")
    return 1 if failed else 0


def _compile_all(output: Path) -> int:
    from dataclasses import asdict

    from gpu_compile import faults, sweep

    compiled: list[dict[str, Any]] = []
    for one in sweep(sample=False):
        compiled.append({**asdict(one), "faults": faults(one)})
        print(f"sm{one.capability} {one.kernel} {one.tile} {one.case}: {compiled[-1]['faults'] or 'ok'}", flush=True)
    _write(output / "compiled.json", json.dumps(compiled, indent=1) + "\n")
    lines = ["# Kernels compiled ahead of time, never run", "", f"{len(compiled)} compilations.", ""]
    lines += ["| kernel | case | sm | tile | w/s | registers | shared | spills |", "| --- " * 8 + "|"]
    for one in compiled:
        spills = one["instructions"]["STL"] + one["instructions"]["LDL"]
        cells = (one["kernel"], one["case"], one["capability"], one["tile"], f"{one['warps']}/{one['stages']}")
        lines.append(f"| {' | '.join(map(str, (*cells, one['registers'], one['shared'], spills)))} |")
    _write(output / "compiled.md", "\n".join(lines) + "\n")
    return int(any(one["faults"] for one in compiled))


def _page(report: dict[str, Any]) -> str:
    lines = [f"# Expert kernels on {report['device']}", "", report["software"], "", report["note"], ""]
    failed = [check for check in report["checks"] if not check["passed"]]
    lines += [f"{len(report['checks'])} checks, {len(failed)} failed.", ""]
    lines += [f"- **{check['name']}**: {check['detail']}" for check in failed]
    lines += [f"- {check['name']}: {check['detail']}" for check in report["checks"] if "launches" in check["name"]]
    for title in ("prefill", "decode"):
        lines += ["", f"## {title}", "", "| shape | layer | forward ms | rate | share | backward ms | rate | share |"]
        lines += ["| --- | --- | --: | --: | --: | --: | --: | --: |"]
        lines += [_row(row) for row in report["rows"] if row["kind"] == title]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['shape']} | {row['layer']} | {row['failure']} | | | | | |"
    unit = "GB/s" if row["kind"] == "decode" else "TFLOP/s"
    cells = [row["shape"], row["layer"]]
    for way in ("forward", "backward"):
        seconds, rate, share = (row[f"{way}_{name}"] for name in ("seconds", "rate", "share"))
        cells.append("" if seconds is None else f"{seconds * 1e3:.3f}")
        cells.append("" if rate is None else f"{rate:.3g} {unit}")
        cells.append("" if share is None else f"{share:.0%}")
    return f"| {' | '.join(cells)} |"


def _write(path: Path, text: str) -> None:
    """Under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
