"""All files or none: a folder of results is never half written, and what was there before survives."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparsify import output_folder as module
from sparsify.errors import OutputError
from sparsify.output_folder import output_folder, require_space

ROOT = Path(__file__).parent.parent


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden files included."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "/" for p in sorted(folder.rglob("*"))}


def test_a_new_folder_appears_with_all_files(tmp_path):
    """The files are invisible until the body ends, then all there, parents included, and nothing else is."""
    out = tmp_path / "a" / "b" / "out"
    with output_folder(out) as staging:
        (staging / "x").write_text("1")
        (staging / "sub").mkdir()
        (staging / "sub" / "y").write_text("2")
        assert not out.exists()
        assert f".out.partial-{os.getpid()}" in str(staging)
    assert tree(tmp_path) == {
        "a": "/",
        "a/b": "/",
        "a/b/out": "/",
        "a/b/out/x": "1",
        "a/b/out/sub": "/",
        "a/b/out/sub/y": "2",
    }


def test_others_may_read_the_result(tmp_path):
    """A staging folder made for one user alone must not pass its mode on."""
    (tmp_path / "usual").mkdir()
    with output_folder(tmp_path / "out"):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    """Files of the same names are replaced, folders too; the rest stays."""
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for name in ("mine", "old", "sub/old"):
        (out / name).write_text("before")
    with output_folder(out) as staging:
        (staging / "old").write_text("after")
        (staging / "sub").mkdir()
        (staging / "sub" / "new").write_text("after")
        assert (out / "old").read_text() == "before"
    assert tree(tmp_path) == {
        "out": "/",
        "out/mine": "before",
        "out/old": "after",
        "out/sub": "/",
        "out/sub/new": "after",
    }


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error, exists):
    """Ctrl-C included: no staging folder, no new parents, the old files untouched."""
    out = tmp_path / "parent" / "out"
    if exists:
        out.mkdir(parents=True)
        (out / "x").write_text("before")
    before = tree(tmp_path)

    def work() -> None:
        with output_folder(out) as staging:
            (staging / "x").write_text("after")
            raise error

    with pytest.raises(error):
        work()
    assert tree(tmp_path) == before


def test_a_move_that_fails_brings_the_others_back(tmp_path, monkeypatch):
    """Old and new files must not be mixed, for they belong together."""
    out = tmp_path / "out"
    out.mkdir()
    for name in "ab":
        (out / name).write_text("before")
    replace = os.replace

    def fail_at_b(source, destination):
        if Path(source).parent.name == "new" and Path(source).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(destination))
        replace(source, destination)

    monkeypatch.setattr(module.os, "replace", fail_at_b)

    def work() -> None:
        with output_folder(out) as staging:
            for name in "abc":
                (staging / name).write_text("after")

    with pytest.raises(OutputError, match="Permission denied"):
        work()
    assert tree(tmp_path) == {"out": "/", "out/a": "before", "out/b": "before"}


def test_a_link_to_a_folder_is_followed(tmp_path):
    """The link stays a link, and its folder gets the files."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with output_folder(tmp_path / "link") as staging:
        (staging / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "1"


@pytest.mark.parametrize("place", ["file", "file/out", "file/a/out"])
def test_a_file_in_the_way_is_refused_before_the_work(tmp_path, place):
    """Root can write anywhere, but not below a file."""
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"file.* cannot be written: .*; choose another folder"),
        output_folder(tmp_path / place),
    ):
        pytest.fail("the body ran")
    assert tree(tmp_path) == {"file": "mine"}


def test_errors_of_other_files_pass(tmp_path):
    """A missing calibration file is not the fault of the output folder."""
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out"):
        (tmp_path / "missing").read_text()


def test_messages_name_the_folder_that_the_user_gave(tmp_path):
    """The staging folder is gone when the message is read."""
    out = tmp_path / "out"
    with pytest.raises(OutputError) as info, output_folder(out) as staging:
        raise OutputError(f"the model cannot be saved to {staging}")
    assert str(info.value) == f"the model cannot be saved to {out}"
    with (
        pytest.raises(OutputError, match=f"^{out} cannot be written: No such file") as info,
        output_folder(out) as staging,
    ):
        (staging / "missing" / "x").write_text("1")
    assert "partial" not in str(info.value)


def test_too_little_space_is_refused(tmp_path):
    """The message says how much is needed and how much there is."""
    require_space(tmp_path, 1)
    with pytest.raises(OutputError, match=r"about 1,000,000,000,000 MB are needed, but only .* MB are free"):
        require_space(tmp_path, 10**18)


PROGRAM = """
import os, resource, sys
from pathlib import Path
from sparsify.errors import OutputError
from sparsify.output_folder import output_folder

if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
if sys.argv[2] == "nobody" and os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    with output_folder(Path(sys.argv[1])) as staging:
        print("working")
        (staging / "x").write_bytes(bytes(4096))
except OutputError as error:
    print(error)
"""


def run_program(out: Path, mode: str) -> str:
    command = [sys.executable, "-B", "-c", PROGRAM, str(out), mode]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """A write that the system really refuses: one message with the remedy, and the folder as it was."""
    output = run_program(tmp_path / "out", "limit")
    assert output.startswith(f"working\n{tmp_path / 'out'} cannot be written: File too large")
    assert "ulimit" in output
    assert tree(tmp_path) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix permissions")
@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_is_refused_before_the_work(exists):
    """Permissions do not bind root, so there the program becomes another user, who cannot enter pytest's folders."""
    with tempfile.TemporaryDirectory() as name:
        locked = Path(name) / "locked"
        (locked / "out" if exists else locked).mkdir(parents=True)
        for folder in (locked.parent, locked, *locked.iterdir()):
            folder.chmod(0o555)
        output = run_program(locked / "out", "nobody")
        locked.chmod(0o755)
        locked.parent.chmod(0o755)
    assert output.startswith(f"{locked / 'out'} cannot be written: Permission denied")
    assert "choose a folder that you may write to" in output
    assert "working" not in output
