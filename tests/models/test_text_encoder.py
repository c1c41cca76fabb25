from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsify.models.text_encoder import embedding_loss, retrieval_agreement, sentence_batches


def batch(rows: int) -> dict[str, Tensor]:
    """Sentences of three tokens, the last of them padding."""
    ids = torch.arange(3 * rows).view(rows, 3)
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]]).expand(rows, 3)}


def model(table: Tensor) -> Any:
    return lambda input_ids, attention_mask: {"last_hidden_state": table[input_ids]}


def test_retrieval_agreement_is_one_for_the_model_itself_and_chance_for_another():
    """Neighbours of a sentence are other sentences; padding and scale do not count."""
    generator = torch.Generator().manual_seed(0)
    table, other = (torch.randn(300, 16, generator=generator) for _ in range(2))
    noise_in_padding = table.clone()
    noise_in_padding[2::3] = 100
    metric = retrieval_agreement(model(table), [batch(100)], 10)
    assert metric.evaluate(model(3 * table)) == 1
    assert metric.evaluate(model(noise_in_padding)) == 1
    assert 0.02 < metric.evaluate(model(other)) < 0.25  # 10 of 99 by chance


def test_embedding_loss_is_the_squared_distance_of_unit_vectors():
    """Padding and scale do not count, and its gradient is that of the first model."""
    hidden = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    moved = (3 * hidden).index_fill(1, torch.tensor([2]), 100.0).requires_grad_()
    loss = embedding_loss({"last_hidden_state": moved}, {"last_hidden_state": hidden}, batch(4))
    assert abs(float(loss)) < 1e-6
    opposite = embedding_loss({"last_hidden_state": -hidden}, {"last_hidden_state": hidden}, batch(4))
    assert abs(float(opposite) - 4) < 1e-5
    loss = embedding_loss({"last_hidden_state": moved}, {"last_hidden_state": hidden.flip(0)}, batch(4))
    (gradient,) = torch.autograd.grad(loss, moved)
    assert gradient[:, :2].any(dim=2).all()
    assert not gradient[:, 2].any()


def test_batches_hold_sentences_of_as_many_tokens():
    """Padding costs time; sentences of as many letters differ in tokens by a half."""
    sentences = ["a" * 60, *["a b " * count for count in range(1, 128)]]

    def tokenizer(texts: Any, **options: Any) -> Any:
        counts = [len(text.split()) for text in ([texts] if isinstance(texts, str) else texts)]
        if isinstance(texts, str):
            return {"input_ids": [1] * counts[0]}
        mask = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        return {"input_ids": mask.long(), "attention_mask": mask.long()}

    masks = [batch["attention_mask"] for batch in sentence_batches(tokenizer, sentences)]
    masks.sort(key=lambda mask: mask.numel())
    assert [mask.shape for mask in masks] == [(32, 62), (32, 126), (32, 190), (32, 254)]
    assert all(longer.sum(1).min() >= shorter.sum(1).max() for shorter, longer in pairwise(masks))
