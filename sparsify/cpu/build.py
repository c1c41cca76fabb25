"""Compile `moe_ffn.c` with the compiler found, once per source, compiler and processor, into a cache folder.

`$CC`, cc, gcc and clang are tried in this order. The folder is `$XDG_CACHE_HOME/sparsify` or `~/.cache/sparsify`; where
it cannot be written, the library is compiled anew for each process. `SPARSIFY_NO_COMPILE=1` turns all of it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

_FOLDER = Path(__file__).parent
SOURCES = sorted(path.name for path in _FOLDER.glob("*.[ch]"))  # a change of any makes another library
# -fopenmp is missing on purpose: it would bring a second OpenMP runtime into the process, or that of another compiler.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
# The first that the compiler takes. GCC and Clang name the machine's own processor differently on ARM.
TARGETS = (("-march=native",), ("-mcpu=native",), ())


class BuildError(Exception):
    """The kernel cannot be compiled here; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels and measured costs are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsify"


@contextlib.contextmanager
def library() -> Generator[Path, None, None]:
    """The compiled library, which exists within the block at least.

    Raises:
        BuildError: compiling is switched off, or no compiler was found, or it fails.
    """
    if os.environ.get("SPARSIFY_NO_COMPILE", "") not in ("", "0"):
        raise BuildError("SPARSIFY_NO_COMPILE is set")
    compiler = find_compiler()
    name = f"moe_ffn-{_fingerprint(compiler)}.so"
    kept = cache_folder() / name
    if kept.is_file():
        yield kept
        return
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            os.replace(_compile(compiler, Path(folder) / name), kept)  # two processes may do the same at once
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            yield _compile(compiler, Path(folder) / name)
        return
    yield kept


def find_compiler() -> list[str]:
    """The command of the first compiler that runs.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CC", "").split()
    for command in ([named] if named else [["cc"], ["gcc"], ["clang"]]):
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C compiler: {named[0] if named else 'cc, gcc and clang'} not found")


def processor() -> str:
    """What tells this processor from others: its name and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(kept)) or platform.machine()


def _fingerprint(compiler: list[str]) -> str:
    version = _run([*compiler, "--version"])
    texts = [(_FOLDER / name).read_text() for name in SOURCES]
    parts = [*texts, *compiler, version, *FLAGS, processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], target: Path) -> Path:
    source = _FOLDER / "moe_ffn.c"
    failures: list[str] = []
    for machine in TARGETS:
        try:
            _run([*compiler, *FLAGS, *machine, "-o", str(target), str(source), "-lm"])
        except BuildError as failure:
            failures.append(str(failure))
            continue
        return target
    raise BuildError(failures[0])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise BuildError(f"{command[0]} does not run: {failure}") from failure
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {' / '.join(said[:3])}")
    return done.stdout
