"""Compile the expert kernels ahead of time for cards that are not here, and look at what came out.

    python benchmarks/gpu_compile.py                # every kernel at every tile of the table, for four generations
    python benchmarks/gpu_compile.py --sample       # a part of it, in about a minute

The kernels, their tiles and their arguments are those of real calls: `moe_ffn_triton` and `moe_ffn_backward_triton` run
on small tensors while `launch` writes down what it is asked for. A line of JSON is printed for each compilation.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsify.kernels import common, operands
from sparsify.kernels.moe_triton import moe_ffn_backward_triton, moe_ffn_triton
from sparsify.kernels.reference import ACTIVATIONS

# Bytes of shared memory that a program may use, by compute capability (CUDA programming guide).
SHARED_MEMORY: Mapping[int, int] = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# One m = T K / E in each row of the table of tiles.
TOKENS_PER_EXPERT = (4, 12, 48, 100, 200)
NUM_EXPERTS = 4
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "STL", "LDL")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """What a kernel was asked to do: enough to compile it as a launch on a card would."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class Compiled:
    """One kernel for one card."""

    kernel: str
    case: str
    capability: int
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


@contextmanager
def recorded_launches(shared_memory: int) -> Generator[list[Launch]]:
    """Launches are written down instead of started, for a card with so much shared memory."""
    found: list[Launch] = []

    def record(kernel: Any, programs: int, *args: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
        if programs:
            found.append(_launch(kernel, args, constants, warps, stages))

    with (
        mock.patch.object(common, "launch", record),
        mock.patch.object(operands, "shared_memory_of", return_value=shared_memory),
    ):
        yield found


def _launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> Launch:
    """As the launcher of Triton specialises: 1 and None are constants, multiples of 16 are known to be."""
    signature: dict[str, str] = {}
    constants = dict(constants)
    divisible = []
    for index, name in enumerate(kernel.arg_names):
        value = args[index] if index < len(args) else constants[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible.append(index)
        elif index >= len(args) or value is None or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            divisible += [index] * (value % 16 == 0)
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), warps, stages)


def launches_of(
    tokens: int, top_k: int, dtype: torch.dtype, gated: bool, activation: str, shared_memory: int
) -> list[Launch]:
    """All launches of a forward and a backward with biases, sizes multiples of 16."""
    size, neurons = 512, 256
    x = torch.zeros(tokens, size, dtype=dtype)
    weights, ids = torch.zeros(tokens, top_k), torch.zeros(tokens, top_k, dtype=torch.int64)
    up = torch.zeros(NUM_EXPERTS, neurons, size, dtype=dtype)
    down = torch.zeros(NUM_EXPERTS, size, neurons, dtype=dtype)
    up_bias, down_bias = up[:, :, 0].contiguous(), down[:, :, 0].contiguous()
    gate, gate_bias = (up, up_bias) if gated else (None, None)
    arguments = (x, weights, ids, up, up_bias, gate, gate_bias, down, down_bias, activation)
    with recorded_launches(shared_memory) as found:
        moe_ffn_triton(*arguments)
        moe_ffn_backward_triton(x, *arguments, [True] * 9)
    return list(dict.fromkeys(found))


def compile_launch(launch: Launch, capability: int, case: str) -> Compiled:
    """Compile, and read registers and instructions out of the binary."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE))
    constants = dict(launch.constants)
    return Compiled(
        kernel=launch.kernel.__name__,
        case=case,
        capability=capability,
        tile="x".join(str(constants[name]) for name in ("BM", "BR", "BP", "BN", "BK") if name in constants),
        warps=launch.warps,
        stages=launch.stages,
        registers=int(_group(r"REG:(\d+)", usage)),
        stack=int(_group(r"STACK:(\d+)", usage)),
        shared=compiled.metadata.shared,
        instructions={name: opcodes[name] for name in _INSTRUCTIONS},
    )


def _cuobjdump(option: str, file: str) -> str:
    return subprocess.run([str(_CUOBJDUMP), option, file], capture_output=True, text=True, check=True).stdout


def _group(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump printed no {pattern}: {text[:500]}")
    return match.group(1)


def faults(one: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, if anything."""
    found = []
    if one.stack or one.instructions["STL"] or one.instructions["LDL"]:
        found.append(f"spills: stack {one.stack}, {one.instructions['STL']} stores, {one.instructions['LDL']} loads")
    if one.shared > SHARED_MEMORY[one.capability]:
        found.append(f"{one.shared} bytes of shared memory, limit {SHARED_MEMORY[one.capability]}")
    if one.case.startswith("fp32") or one.tile.count("x") != 2:
        return found
    expected = tensor_core_instruction(one)
    if not one.instructions[expected]:
        found.append(f"no {expected}: {one.instructions}")
    if not one.instructions["LDGSTS"]:
        found.append("no asynchronous copies (LDGSTS)")
    return found


def tensor_core_instruction(one: Compiled) -> str:
    """What multiplies matrices on that card at that tile: warp groups need 64 rows and four warps."""
    if int(one.tile.split("x")[0]) < 64:
        return "HMMA"
    return {90: "HGMMA", 100: "UTCHMMA"}.get(one.capability, "HMMA")


def sweep(sample: bool) -> Iterator[Compiled]:
    """Compile without repetition; with `sample` a part that touches every kernel, card and row of the table."""
    seen: set[tuple[Launch, int]] = set()
    for case in SAMPLE if sample else all_cases():
        for launch in case.launches():
            matrix_product = "PRECISION" in dict(launch.constants)
            repeated = (launch, case.capability) in seen or (sample and case.capability != 90 and not matrix_product)
            if not repeated:
                seen.add((launch, case.capability))
                yield compile_launch(launch, case.capability, str(case))


@dataclass(frozen=True)
class Case:
    """A forward and a backward whose kernels are compiled for a card."""

    capability: int
    m: int
    gated: bool
    activation: str = "gelu"
    dtype: torch.dtype = torch.bfloat16
    top_k: int = 2

    def __str__(self) -> str:
        form = "gated" if self.gated else "plain"
        return f"{_POINTERS[self.dtype][1:]} {form} {self.activation} m={self.m} K={self.top_k}"

    def launches(self) -> list[Launch]:
        """See `launches_of`; m = 0 is two tokens, which are not sorted in the forward."""
        tokens = self.m * NUM_EXPERTS // self.top_k or 2
        shared_memory = SHARED_MEMORY[self.capability]
        return launches_of(tokens, self.top_k, self.dtype, self.gated, self.activation, shared_memory)


SAMPLE = (
    Case(80, 48, True, "gelu_tanh"),
    Case(80, 100, False),
    Case(90, 4, False),
    Case(90, 100, True, "silu"),
    Case(90, 0, True, "silu"),
    Case(90, 200, False, top_k=1),
    Case(90, 48, False, dtype=torch.float32),
    Case(100, 12, True),
    Case(100, 200, False),
    Case(120, 48, False),
    Case(120, 100, True, "gelu_tanh"),
)


def all_cases() -> Iterator[Case]:
    """Every card, row of the table, form and activation; fp32 and no sorting where they differ."""
    for capability, gated in itertools.product(SHARED_MEMORY, (False, True)):
        for m, activation in itertools.product(TOKENS_PER_EXPERT, ACTIVATIONS):
            yield Case(capability, m, gated, activation)
        for m in TOKENS_PER_EXPERT:
            yield Case(capability, m, gated, dtype=torch.float32)
        yield Case(capability, 0, gated)
        yield Case(capability, 200, gated, top_k=1)


def main() -> int:
    """Print every compilation; 1 if one has a fault."""
    failed = 0
    for one in sweep(sample="--sample" in sys.argv[1:]):
        wrong = faults(one)
        failed += bool(wrong)
        print(json.dumps({**asdict(one), "faults": wrong}), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
