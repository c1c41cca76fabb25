"""A folder that receives several files at once: all of them, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from sparsify.errors import OutputError

# What the machine refuses, whichever file of the folder is being written.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_REMEDIES = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota or choose a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or choose a folder on another disk",
    errno.EROFS: "choose a folder on a disk that is not mounted read-only",
    errno.EACCES: "choose a folder that you may write to, or have its permissions changed",
    errno.EPERM: "choose a folder that you may write to, or have its permissions changed",
    errno.ENOTDIR: "choose another folder, or move that file away",
}


@contextlib.contextmanager
def output_folder(path: Path) -> Generator[Path]:
    """Yields an empty staging folder, whose entries move into `path` if the body succeeds.

    Whether `path` can be written is checked before the body runs. If the body raises anything, Ctrl-C included, the
    staging folder is removed and `path` is left as it was. What `path` already holds stays, but for entries of the same
    names.

    The staging folder lies beside a `path` that is new, which then appears by a single rename, and inside one that
    exists, which may be a mount point: only there is a rename within one disk.

    Args:
        path: the folder; missing parents are made.

    Raises:
        OutputError: `path` cannot be written, before or after the work.
    """
    target = Path(os.path.realpath(path))
    made = [parent for parent in reversed(target.parents) if not parent.exists()]
    outer: Path | None = None
    finished = False
    try:
        with _refusals(path):
            _check_folder(target)
            for parent in made:
                parent.mkdir()
            outer = _make_staging(target)
            (outer / "probe").write_bytes(b"probe")
            (outer / "probe").unlink()
            # A folder of its own, as the mode of a temporary folder would keep others from reading the result.
            staging = outer / "new"
            staging.mkdir()
        with _refusals(path, staging):
            yield staging
        with _refusals(path):
            _publish(staging, target, outer / "old")
        finished = True
    finally:
        if outer is not None:
            shutil.rmtree(outer, ignore_errors=True)
        if not finished:
            _remove_empty(made)


def require_space(path: Path, needed_bytes: int) -> None:
    """Refuses to go on where a disk has too little room.

    Args:
        path: an existing folder.
        needed_bytes: what will be written there.

    Raises:
        OutputError: less is free.
    """
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise OutputError(
            f"{path} cannot be written: about {needed_bytes / 1e6:,.0f} MB are needed, but only {free / 1e6:,.0f} MB "
            f"are free there; {_REMEDIES[errno.ENOSPC]}"
        )


def _check_folder(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(target))
    if target.exists():
        # A folder can allow new entries but no changes to them; only a full turn tells.
        with tempfile.TemporaryDirectory(prefix=".sparsify-probe-", dir=target) as probe:
            (Path(probe) / "probe").write_bytes(b"probe")


def _make_staging(target: Path) -> Path:
    if target.exists():
        return Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-", dir=target))
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}-", dir=target.parent))


def _publish(staging: Path, target: Path, replaced: Path) -> None:
    """Moves the entries of `staging` into `target`; an entry that cannot be moved brings those before it back."""
    if not target.exists():
        os.rename(staging, target)
        return
    replaced.mkdir()
    moves = [move for entry in sorted(staging.iterdir()) for move in _moves(entry, target / entry.name, replaced)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.replace(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


def _moves(entry: Path, place: Path, replaced: Path) -> list[tuple[Path, Path]]:
    """What lies at `place` goes first: a folder that is not empty cannot be overwritten."""
    aside = [(place, replaced / place.name)] if os.path.lexists(place) else []
    return [*aside, (entry, place)]


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # another program has put something there
            folder.rmdir()


@contextlib.contextmanager
def _refusals(path: Path, staging: Path | None = None) -> Generator[None]:
    """Turns the refusals of the file system into OutputError; with `staging`, those that do not concern it pass."""
    try:
        yield
    except OutputError as error:
        if staging is None:
            raise
        # Whoever wrote there knows the staging folder only, which is gone when the user reads the message.
        raise OutputError(str(error).replace(str(staging), str(path))) from error
    except OSError as error:
        if staging is not None and not _concerns(error, staging):
            raise
        cause = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename and staging is None else ""
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
        raise OutputError(f"{path} cannot be written: {cause}{where}; {remedy}") from error


def _concerns(error: OSError, staging: Path) -> bool:
    return error.errno in _REFUSALS or str(error.filename).startswith(str(staging))
