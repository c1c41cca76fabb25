"""Compiling: once, atomically, with whatever compiler there is, and with a reason where it does not work."""

from __future__ import annotations

import os
import shutil

import pytest

from sparsify.cpu import build


def script(folder, name: str, body: str):
    """An executable in `folder` that runs `body`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparsify"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler that writes its arguments into its target and counts its runs."""
    body = f"""
        [ "$1" = --version ] && echo "fake 1.0" && exit 0
        echo run >> {tmp_path}/runs
        while [ "$1" != -o ]; do shift; done
        echo "$@" > "$2" """
    path = script(tmp_path, "fake-cc", body)
    monkeypatch.setenv("CC", str(path))
    return tmp_path / "runs"


def test_compiles_once(cache, fake):
    """Protects: the second process finds what the first compiled; nothing half-written is left."""
    for _ in range(2):
        with build.library() as path:
            assert path.parent == cache
            assert path.read_text().startswith("-o ")
    assert fake.read_text().count("run") == 1
    assert [file.suffix for file in cache.iterdir()] == [".so"]


def test_another_compiler_or_source_compiles_anew(cache, fake, monkeypatch):
    """Protects: no library of another compiler, flags or processor is loaded."""
    names = set()
    with build.library() as path:
        names.add(path.name)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with build.library() as path:
        names.add(path.name)
    monkeypatch.setattr(build, "processor", lambda: "another")
    with build.library() as path:
        names.add(path.name)
    assert len(names) == 3


def test_every_source_counts(cache, fake, tmp_path, monkeypatch):
    """Protects: no library of older headers is loaded, whichever of them changed."""
    folder = shutil.copytree(build._FOLDER, tmp_path / "sources")
    monkeypatch.setattr(build, "_FOLDER", folder)
    names = []
    for file in (None, *sorted(folder.glob("*.[ch]"))):
        if file is not None:
            file.write_text(file.read_text() + "/* more */\n")
        with build.library() as path:
            names.append(path.name)
    assert len(set(names)) == len(names) > 10


def test_a_cache_that_cannot_be_written(tmp_path, fake, monkeypatch):
    """Protects: a read-only home costs time, not the kernel."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a file in the way: root may write anywhere else
    with build.library() as path:
        assert path.is_file()
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_that_is_read_only(cache, fake):
    """Protects: the same, where permissions are what forbids it."""
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    with build.library() as path:
        assert path.is_file()
        assert path.parent != cache


def test_a_compiler_that_fails(tmp_path, cache, monkeypatch):
    """Protects: what the compiler said is what the user reads."""
    body = '[ "$1" = --version ] && exit 0; echo "out of cheese" >&2; exit 3'
    monkeypatch.setenv("CC", str(script(tmp_path, "broken-cc", body)))
    with pytest.raises(build.BuildError, match="broken-cc failed with status 3: out of cheese"), build.library():
        pass
    assert not list(cache.iterdir())


def test_a_compiler_without_march(tmp_path, cache, monkeypatch):
    """Protects: compilers that do not know -march=native, as on ARM, are asked otherwise."""
    body = """
        [ "$1" = --version ] && exit 0
        for word in "$@"; do [ "$word" = -march=native ] && exit 1; done
        while [ "$1" != -o ]; do shift; done
        echo fine > "$2" """
    monkeypatch.setenv("CC", str(script(tmp_path, "arm-cc", body)))
    with build.library() as path:
        assert path.read_text() == "fine\n"


def test_no_compiler(monkeypatch, tmp_path):
    """Protects: the reason names what was looked for."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C compiler: cc, gcc and clang not found"), build.library():
        pass


def test_switched_off(monkeypatch):
    """Protects: SPARSIFY_NO_COMPILE runs no compiler."""
    monkeypatch.setenv("SPARSIFY_NO_COMPILE", "1")
    with pytest.raises(build.BuildError, match="SPARSIFY_NO_COMPILE is set"), build.library():
        pass
