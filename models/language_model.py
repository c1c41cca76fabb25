"""What every causal language model shares: running text in chunks of tokens, and perplexity.

Shapes: B chunks, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.models.dense_model import Batch, DenseModel, Metric, call, output_tensor
from sparsify.models.text import corpus

_CHUNK = 256  # tokens
_BATCH = 4  # chunks
_CALIBRATION_CHUNKS = 64
_HELD_OUT_CHUNKS = 16
_PASSAGE = 1500  # characters: more than a chunk of tokens for usual tokenizers
_EXAMPLE_TOKENS = 16

Tokenizer = Callable[..., Any]


def language_model(name: str, model: nn.Module, tokenizer: Tokenizer, calibration_text: Path | None) -> DenseModel:
    """Returns a causal language model with running text to calibrate on and other text to measure perplexity on.

    The attention mask is left out: without it the causal mask follows the traced shapes, whatever they become.

    Args:
        name: name of the result.
        model: returns `logits` [B, S, V] for `input_ids`, int64 [B, S]; its configuration says nothing of a cache.
        tokenizer: the Hugging Face tokenizer of the model.
        calibration_text: text file to calibrate on; None for the text of `sparsify.models.text`.

    Raises:
        ValueError: the calibration text is shorter than a chunk of 256 tokens.
    """
    texts = corpus()
    sources = ", ".join(texts.sources)
    if calibration_text is None:
        calibration = "\n\n".join(texts.passages(_CALIBRATION_CHUNKS, characters=_PASSAGE))
        origin = sources
    else:
        calibration = calibration_text.read_text(encoding="utf-8")
        origin = calibration_text.name
    held_out_text = "\n\n".join(texts.passages(_HELD_OUT_CHUNKS, characters=_PASSAGE, split="held_out"))
    batches = _chunks(tokenizer, calibration, _CALIBRATION_CHUNKS, origin)
    held_out = _chunks(tokenizer, held_out_text, _HELD_OUT_CHUNKS, sources)
    return DenseModel(
        name=name,
        model=model.eval(),
        args=(),
        kwargs={"input_ids": batches[0]["input_ids"][:1, : 2 * _EXAMPLE_TOKENS].reshape(2, _EXAMPLE_TOKENS)},
        calibration=lambda: iter(batches),
        held_out=held_out,
        metric=perplexity(held_out),
        data=f"{_tokens(batches):,} tokens to calibrate ({origin}), {_tokens(held_out):,} held out ({sources})",
    )


def perplexity(batches: list[Batch]) -> Metric:
    """Perplexity of the next token, each chunk read on its own.

    Args:
        batches: `input_ids`, int64 [B, S], in each.
    """

    def evaluate(function: Callable[..., Any]) -> float:
        losses = torch.cat([_losses(function, batch["input_ids"]) for batch in batches])
        return math.exp(losses.mean().item())

    return Metric("perplexity", False, evaluate)


def _losses(function: Callable[..., Any], input_ids: Tensor) -> Tensor:
    logits = output_tensor(call(function, {"input_ids": input_ids}), "logits").float().cpu()  # [B, S, V]
    predicted, following = logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()  # [B * (S - 1), V], [B * (S - 1)]
    return nn.functional.cross_entropy(predicted, following, reduction="none").double()


def _chunks(tokenizer: Tokenizer, text: str, most: int, origin: str) -> list[Batch]:
    token_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]  # [N]
    whole = min(most, len(token_ids) // _CHUNK)
    if whole == 0:
        raise ValueError(f"{origin} holds {len(token_ids)} tokens, fewer than a chunk of {_CHUNK}; give a longer text")
    chunks = token_ids[: whole * _CHUNK].view(whole, _CHUNK)
    return [{"input_ids": batch} for batch in chunks.split(_BATCH)]


def _tokens(batches: list[Batch]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)
