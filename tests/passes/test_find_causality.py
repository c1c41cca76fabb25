"""Which FFNs stand on causal tokens: decoders, encoders, both in one model, tokens that never mix; and the refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import inspect, sparsify
from sparsify.errors import CausalityError
from sparsify.models.bert import Bert, BertConfig
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.models.vit import ViT, ViTConfig
from sparsify.passes.capture_parts import capture_parts
from sparsify.passes.find_causality import causal_ffns
from sparsify.passes.find_ffns import find_ffns
from sparsify.routers import ROUTERS, TopKRouter

IDS = torch.arange(14).reshape(2, 7)


class EncoderDecoder(nn.Module):
    """One layer of each, sequence first, as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.triu(torch.ones(len(target), len(target), dtype=torch.bool), diagonal=1)
        return self.decoder(target, self.encoder(source), tgt_mask=mask)


def found(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[list[str], list[str]]:
    """The causal FFNs, and all."""
    (part,) = find_ffns(model, capture_parts(model.eval(), args, kwargs), args, kwargs).parts
    names = [match.name for match in part.matches]
    return list(causal_ffns(part.graph_module, part.matches, part.example)), names


@pytest.mark.parametrize("model", [GPT(GPTConfig()), Llama(LlamaConfig())], ids=["gpt", "llama"])
def test_decoders_are_causal(model: nn.Module) -> None:
    """Protects: every FFN of a causal language model counts."""
    causal, names = found(model, IDS)
    assert causal == names != []


def test_encoders_and_images_are_not() -> None:
    """Protects: a non-causal router is not refused where nothing is causal, with a mask or without."""
    assert found(Bert(BertConfig()), IDS, torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))[0] == []
    assert found(ViT(ViTConfig()), torch.randn(2, 3, 32, 32))[0] == []


def test_tokens_that_never_mix_are_not() -> None:
    """Protects: an MLP has no order to break, along no axis."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    assert found(model, torch.randn(4, 16))[0] == []
    assert found(model, torch.randn(4, 5, 16))[0] == []


def test_an_encoder_decoder_is_causal_in_its_decoder() -> None:
    """Protects: one input may be causal and another one not; the sequence may come first."""
    causal, names = found(EncoderDecoder(), torch.randn(6, 3, 16), torch.randn(5, 3, 16))
    assert causal == ["decoder"]
    assert names == ["encoder", "decoder"]


class Peeking(TopKRouter):
    """Looks at later tokens, as it says."""

    @property
    def causal(self) -> bool:
        return False


@pytest.fixture
def peeking(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a conversion with a non-causal router."""
    monkeypatch.setattr(Peeking, "system", TopKRouter.system.__class__("peeking", "", "", "top-k"))
    monkeypatch.setattr("sparsify.routers.catalogue.ROUTERS", (*ROUTERS, Peeking))
    return {"router": "peeking", "start": "upcycle", "num_experts": 4, "top_k": 2, "select": "all"}


def test_refuses_a_router_that_sees_later_tokens(peeking: dict[str, Any]) -> None:
    """Protects: a causal model is never made non-causal in silence; the layers and the way out are named."""
    model = GPT(GPTConfig()).eval()
    with pytest.raises(CausalityError, match=r"router='peeking' chooses .* in h\.0\.mlp, h\.1"):
        sparsify(model, (IDS,), **peeking)
    assert sparsify(model, (IDS,), allow_non_causal=True, **peeking).routers.keys() == {"h.0.mlp", "h.1.mlp"}


def test_takes_it_where_nothing_is_causal(peeking: dict[str, Any]) -> None:
    """Protects: encoders are converted with it, and decoders whose FFNs stay dense."""
    model = Bert(BertConfig()).eval()
    mask = torch.ones_like(IDS)
    assert len(inspect(model, (IDS, mask)).ffns) == len(sparsify(model, (IDS, mask), **peeking).routers)
