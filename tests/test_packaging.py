"""The folders `passes` and `models` lie beside `sparsify`, but are packages inside it: what keeps that true."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparsify.cpu.build import SOURCES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]  # pytest brings it where it is needed

ROOT = Path(__file__).parent.parent


def setuptools_config() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def modules_on_disk() -> set[str]:
    """Paths in the wheel of all modules in the tree, each folder read where it really lies."""
    found = set()
    for package, folder in setuptools_config()["package-dir"].items():
        for file in (ROOT / folder).rglob("*.py"):
            inside = file.relative_to(ROOT / folder)
            through_link = inside.parts[0] in ("passes", "models") and folder == "sparsify"
            if not through_link:
                found.add("/".join([*package.split("."), *inside.parts]))
    return found


def test_package_list_is_complete():
    """A wheel lacks a package that is not listed; an editable installation would not show it."""
    on_disk = {path.removesuffix("/__init__.py").replace("/", ".") for path in modules_on_disk() if "__init__" in path}
    assert set(setuptools_config()["packages"]) == on_disk


def test_every_folder_with_modules_is_a_package():
    """A folder without __init__.py would be missing from the list and from the wheel alike."""
    modules = modules_on_disk()
    folders = {path.rpartition("/")[0] for path in modules}
    assert {f"{folder}/__init__.py" for folder in folders} <= modules


@pytest.mark.parametrize("folder", ["passes", "models"])
def test_the_folders_cannot_be_imported_by_themselves(folder):
    """From the root `import passes` would load every module a second time."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"ImportError: import sparsify.{folder}, not the folder {folder}" in result.stderr


def test_wheel_holds_every_module_under_one_name(tmp_path):
    """The built wheel is what users get: all modules, the type marker, and no name but ours."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("sparsify", "passes", "models"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    # In isolation setuptools would be downloaded; the environment has it.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == modules_on_disk()
    assert "sparsify/py.typed" in names
    assert {f"sparsify/cpu/{name}" for name in SOURCES} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sparsify"}
