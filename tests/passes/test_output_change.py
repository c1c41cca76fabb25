"""`output_change` and `find_logits`: what a change of the outputs is worth, and which of them are logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.passes.capture import capture
from sparsify.passes.output_change import find_logits, output_change


@pytest.mark.parametrize("rows", [1, 7, 500])
def test_logits_move_by_their_divergence(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the mean over rows of KL(p || q), in pieces and as a whole; a common shift and other outputs are 0."""
    monkeypatch.setattr("sparsify.passes.output_change._AT_ONCE", 70)  # 6 rows
    a, b = torch.randn(2, rows, 11)
    p, q = a.double().softmax(1), b.double().softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    found = output_change([a, a], [b + 3, b], [True, False])
    assert found == pytest.approx(expected, rel=1e-4)


def test_other_outputs_move_by_their_squares() -> None:
    """Protects: one relative difference over all of them; outputs that say nothing give none."""
    a, b = torch.randn(3, 4), torch.randn(2, 5)
    found = output_change([a, b], [a + 1, b], [False, False])
    assert found == pytest.approx(12 / float(a.square().sum() + b.square().sum()))
    assert output_change([torch.zeros(3, 4)], [torch.ones(3, 4)], [False]) is None
    assert output_change([torch.zeros(0, 4)], [torch.zeros(0, 4)], [True]) is None


class _Named(nn.Module):
    def __init__(self, keys: tuple[str, ...] | None) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, x: Tensor) -> object:
        outputs = (x.argmax(-1), x + 1, x * 2)
        return outputs if self.keys is None else dict(zip(self.keys, outputs, strict=True))


def test_finds_logits_by_name() -> None:
    """Protects: floating outputs alone are counted, in the order in which a run returns them."""
    x = torch.randn(3, 4)
    for keys, expected in (
        (None, [False, False]),
        (("ids", "logits", "hidden"), [True, False]),
        (("logits", "hidden", "scores"), [False, False]),
    ):
        assert find_logits(capture(_Named(keys).eval(), (x,), {})) == expected


def test_finds_those_of_transformers() -> None:
    """Protects: the names of a real language model are read off its output class."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    model = transformers.LlamaForCausalLM(config).eval()
    captured = capture(model, (), {"input_ids": torch.randint(0, 40, (2, 5)), "use_cache": False})
    assert find_logits(captured) == [True]
