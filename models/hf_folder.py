"""A model in a local Hugging Face folder: a causal language model or a text encoder, by what its configuration says."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsify.models.dense_model import DenseModel
from sparsify.models.installed import quiet_transformers
from sparsify.models.language_model import language_model
from sparsify.models.text_encoder import text_encoder

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load(folder: Path, *, name: str | None = None, calibration_text: Path | None = None) -> DenseModel:
    """Loads a folder with `config.json`, safetensors and a tokenizer, in fp32. Runs no code from the folder.

    Args:
        folder: the folder.
        name: name of the result; None for that of the folder.
        calibration_text: text file to calibrate on; None for the text of `sparsify.models.text`.

    Raises:
        ImportError: `transformers` is missing; the message has the command that installs it.
        ValueError: the folder lacks one of the three, or holds an encoder-decoder.
    """
    _check(folder)
    with quiet_transformers():
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise ValueError(
                f"{folder} holds an encoder-decoder ({config.model_type}), for which there is no metric here; "
                "write a factory that returns (model, args, kwargs) and give it as package.module:factory"
            )
        is_causal = any(architecture.endswith(_CAUSAL) for architecture in config.architectures or ())
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = (AutoModelForCausalLM if is_causal else AutoModel).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    if not is_causal:
        return text_encoder(name or folder.name, model, tokenizer, calibration_text)
    model.config.use_cache = False
    return language_model(name or folder.name, model, tokenizer, calibration_text)


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder written by save_pretrained()")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has no *.safetensors; other weight files are not read, for unpickling can run code. "
            "Write the model again with save_pretrained()"
        )
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}), so text cannot be fed to the model; "
            "add it with tokenizer.save_pretrained(), or write a factory and give it as package.module:factory"
        )
