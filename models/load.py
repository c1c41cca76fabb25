"""One word for every model that the command line and the benchmarks can name."""

from __future__ import annotations

import re
from pathlib import Path

from sparsify.models import factory, hf_folder, minilm, smollm2
from sparsify.models.dense_model import DenseModel

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def load(spec: str, *, calibration_text: Path | None = None) -> DenseModel:
    """Loads a model.

    Args:
        spec: `minilm`, `smollm2`, a Hugging Face folder, or `package.module:factory`.
        calibration_text: UTF-8 text file to calibrate on; None for the text of `sparsify.models.text`.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
        ValueError: `spec` is none of these, or cannot be loaded.
    """
    if calibration_text is not None and not calibration_text.is_file():
        raise ValueError(f"no calibration text at {calibration_text}; give a UTF-8 text file")
    if spec == "minilm":
        return minilm.load(calibration_text)
    if spec == "smollm2":
        return smollm2.load(calibration_text)
    if spec and Path(spec).is_dir():
        return hf_folder.load(Path(spec).resolve(), calibration_text=calibration_text)
    if _FACTORY.fullmatch(spec) is None:
        raise ValueError(
            f"{spec!r} is neither minilm, smollm2, an existing Hugging Face folder nor package.module:factory"
        )
    if calibration_text is not None:
        raise ValueError(f"{spec!r} is a factory, which has no tokenizer for {calibration_text}; return batches too")
    return factory.load(spec)
