"""How the command line talks: results on stdout, progress and errors on stderr, exit codes."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Generator
from types import FrameType

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sparsify.errors import SparsifyError, VerificationError

BROKEN_PROMISE, BAD_INPUT, INTERRUPTED = 1, 2, 130

# Files and pipes have no width; the tables need this much for all that matters.
_FILE_WIDTH = 120


def make_console(*, stderr: bool) -> Console:
    """A console as wide as the terminal, or 120 characters where there is none."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = shutil.get_terminal_size((_FILE_WIDTH, 24)).columns
    return console


@contextlib.contextmanager
def exit_codes() -> Generator[None]:
    """Turns the errors that a user can cause into one message on stderr and an exit code, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except VerificationError as error:
        _complain(f"Error: {error}")
        raise typer.Exit(BROKEN_PROMISE) from error
    except (SparsifyError, ImportError) as error:
        _complain(f"Error: {error}")
        raise typer.Exit(BAD_INPUT) from error


@contextlib.contextmanager
def nothing_written() -> Generator[None]:
    """Says so when the body, which cleans up after itself, is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("Interrupted. Nothing was written, no partial files were left behind.")
        raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def bad_input() -> Generator[None]:
    """The same for a ValueError, around those calls only that check what the user gave: elsewhere it is a defect."""
    try:
        yield
    except SparsifyError:
        raise
    except ValueError as error:
        _complain(f"Error: {error}")
        raise typer.Exit(BAD_INPUT) from error


class Stages:
    """A progress bar with the time left for each stage, on stderr.

    Call it as `stages(stage, done, total)`, or put a stage that cannot count its steps in `with stages.running(stage)`.
    """

    def __init__(self, progress: Progress, is_interrupted: Callable[[], bool]) -> None:
        self._progress = progress
        self._is_interrupted = is_interrupted
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` steps of a stage are done.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed where the exception got lost, as in a destructor or a callback from C.
        """
        if self._is_interrupted():
            raise KeyboardInterrupt
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage)
        # A single step has no time left to tell: the bar pulses until it is done.
        is_endless = total <= 1 and done < total
        self._progress.update(self._tasks[stage], completed=done, total=None if is_endless else max(total, 1))
        if done >= total:
            self._progress.update(self._tasks[stage], completed=max(total, 1))
            self._progress.stop_task(self._tasks[stage])

    @contextlib.contextmanager
    def running(self, stage: str) -> Generator[None]:
        """Shows a stage of one step."""
        self(stage, 0, 1)
        yield
        self(stage, 1, 1)


@contextlib.contextmanager
def show_stages() -> Generator[Stages]:
    """Shows progress bars while the body runs."""
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with (
        _remember_interrupts() as is_interrupted,
        Progress(*columns, console=make_console(stderr=True)) as progress,
    ):
        yield Stages(progress, is_interrupted)


@contextlib.contextmanager
def _remember_interrupts() -> Generator[Callable[[], bool]]:
    """Raises KeyboardInterrupt on Ctrl-C as Python does, and remembers that it was pressed."""
    interrupts: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, previous)


def _complain(message: str) -> None:
    # Not wrapped, so that paths and commands can be copied.
    make_console(stderr=True).print(Text(message, style="bold red"), soft_wrap=True)
