"""What every text encoder shares: sentences in batches, and how well its sentence embeddings keep their geometry.

Shapes: B sentences, S tokens, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from sparsify.models.dense_model import Batch, DenseModel, Metric, call, output_tensor
from sparsify.models.text import corpus, sentences_from_file

_CALIBRATION_SENTENCES = 1800
_HELD_OUT_SENTENCES = 400
_BATCH = 32
_MAX_TOKENS = 128
_EXAMPLE_TOKENS = 16

Tokenizer = Callable[..., Any]


def text_encoder(name: str, model: nn.Module, tokenizer: Tokenizer, calibration_text: Path | None) -> DenseModel:
    """Returns an encoder with sentences to calibrate on and other sentences to compare embeddings of.

    Args:
        name: name of the result.
        model: returns `last_hidden_state` [B, S, D] for `input_ids` and `attention_mask`, both int64 [B, S].
        tokenizer: the Hugging Face tokenizer of the model.
        calibration_text: text file to calibrate on; None for the text of `sparsify.models.text`.
    """
    texts = corpus()
    sources = ", ".join(texts.sources)
    if calibration_text is None:
        calibration, origin = texts.sentences(_CALIBRATION_SENTENCES), sources
    else:
        calibration, origin = sentences_from_file(calibration_text), calibration_text.name
    known = set(calibration)
    unseen = [sentence for sentence in texts.sentences(_HELD_OUT_SENTENCES, split="held_out") if sentence not in known]
    held_out = list(sentence_batches(tokenizer, unseen))
    example = _encode(tokenizer, calibration[:1] * 2, padding="max_length", max_length=_EXAMPLE_TOKENS)
    return DenseModel(
        name=name,
        model=model.eval(),
        args=(),
        kwargs=example,
        calibration=lambda: sentence_batches(tokenizer, calibration),
        held_out=held_out,
        metric=embedding_spearman(model, held_out),
        data=f"{len(calibration):,} sentences to calibrate ({origin}), {len(unseen):,} held out ({sources})",
        loss=embedding_loss,
    )


def embedding_loss(ours: Any, theirs: Any, batch: Batch) -> Tensor:
    """Mean squared distance of the sentence embeddings that two models give, whose length is 1; `[]`.

    Args:
        ours: with `last_hidden_state` [B, S, D].
        theirs: the same of the other model.
        batch: with `attention_mask` [B, S].
    """
    a, b = (_embedding(outputs["last_hidden_state"], batch) for outputs in (ours, theirs))
    return (a - b).square().sum(dim=1).mean()


def embedding_spearman(dense: Callable[..., Any], batches: list[Batch]) -> Metric:
    """Rank correlation of the cosine similarities of all pairs of sentences with those the dense model gives.

    The embedding of a sentence is the mean of its token vectors, as sentence encoders are trained.

    Args:
        dense: the model to compare with; it is run at each evaluation.
        batches: `input_ids` and `attention_mask`, both int64 [B, S], in each.
    """

    def evaluate(function: Callable[..., Any]) -> float:
        result: Any = spearmanr(_similarities(function, batches), _similarities(dense, batches))
        return float(result.statistic)

    return Metric("Spearman correlation of embedding similarities with the dense model", True, evaluate)


def retrieval_agreement(dense: Callable[..., Any], batches: list[Batch], k: int) -> Metric:
    """Share of the k nearest sentences, by cosine similarity, of each sentence that the dense model finds too.

    Args:
        dense: the model to compare with; it is run at each evaluation.
        batches: `input_ids` and `attention_mask`, both int64 [B, S], in each; more than k sentences in all.
        k: how many neighbours count.
    """

    def evaluate(function: Callable[..., Any]) -> float:
        ours, wanted = _nearest(function, batches, k), _nearest(dense, batches, k)
        return float((ours.unsqueeze(2) == wanted.unsqueeze(1)).any(2).double().mean())

    return Metric(f"top-{k} retrieval agreement with the dense model", True, evaluate)


def _nearest(function: Callable[..., Any], batches: list[Batch], k: int) -> Tensor:
    embeddings = torch.cat([_embed(function, batch) for batch in batches])  # [N, D]
    similarities = (embeddings @ embeddings.T).fill_diagonal_(-2.0)  # a sentence is no neighbour of itself
    return similarities.topk(k, dim=1).indices  # [N, k]


def _similarities(function: Callable[..., Any], batches: list[Batch]) -> Any:
    embeddings = torch.cat([_embed(function, batch) for batch in batches])  # [N, D]
    similarities = embeddings @ embeddings.T  # [N, N]
    row, column = torch.triu_indices(*similarities.shape, offset=1)
    return similarities[row, column].numpy()  # [N * (N - 1) / 2]


def _embed(function: Callable[..., Any], batch: Batch) -> Tensor:
    return _embedding(output_tensor(call(function, batch), "last_hidden_state").cpu(), batch)


def _embedding(hidden: Tensor, batch: Batch) -> Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)  # [B, S, 1]
    # A sum, for normalising makes the division of a mean irrelevant.
    return nn.functional.normalize((hidden.float() * mask).sum(dim=1), dim=-1)  # [B, D]


def sentence_batches(tokenizer: Tokenizer, sentences: list[str]) -> Iterator[Batch]:
    """Sentences of like length share a batch, for padding costs time and is no text; batches come in random order."""
    by_length = sorted(sentences, key=lambda sentence: len(tokenizer(sentence)["input_ids"]))
    starts = range(0, len(by_length), _BATCH)
    for start in random.Random(0).sample(starts, len(starts)):
        yield _encode(tokenizer, by_length[start : start + _BATCH], padding=True, max_length=_MAX_TOKENS)


def _encode(tokenizer: Tokenizer, sentences: list[str], *, padding: bool | str, max_length: int) -> dict[str, Tensor]:
    encoded = tokenizer(sentences, padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}
