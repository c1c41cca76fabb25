from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.models.bert import Bert, BertConfig
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.llama import Llama, LlamaConfig
from sparsify.models.vit import ViT, ViTConfig


def tokens(batch: int, sequence: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(256, (batch, sequence))}


def tokens_and_mask(batch: int, sequence: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[0, sequence // 2 :] = 0
    return tokens(batch, sequence) | {"attention_mask": mask}


def images(batch: int, sequence: int) -> dict[str, Tensor]:
    return {"images": torch.randn(batch, 3, 32, 32)}


CASES = {
    "bert": (lambda: Bert(BertConfig()), tokens_and_mask, 64),
    "gpt": (lambda: GPT(GPTConfig()), tokens, 256),
    "llama": (lambda: Llama(LlamaConfig()), tokens, 256),
    "llama_fused": (lambda: Llama(LlamaConfig(fused_gate_up=True)), tokens, 256),
    "vit": (lambda: ViT(ViTConfig()), images, 10),
}


@pytest.mark.parametrize(("build", "inputs", "width"), CASES.values(), ids=CASES.keys())
def test_exports_with_dynamic_batch_and_sequence(
    build: Callable[[], nn.Module], inputs: Callable[[int, int], dict[str, Tensor]], width: int
):
    """The compiler's tests trace these models, and run them at other shapes than the traced ones."""
    model = build().eval()
    example = inputs(2, 16)
    dynamic = {name: dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) for name, value in example.items()}
    exported = torch.export.export(model, (), example, dynamic_shapes=dynamic, strict=False).module()
    for batch, sequence in ((2, 16), (3, 37), (1, 5)):
        other = inputs(batch, sequence)
        expected = model(**other)
        assert expected.shape[0] == batch
        assert expected.shape[-1] == width
        torch.testing.assert_close(exported(**other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [CASES["gpt"][0], CASES["llama"][0]], ids=["gpt", "llama"])
def test_decoders_do_not_look_ahead(build: Callable[[], nn.Module]):
    """A causal model's logits depend on no later token."""
    model = build().eval()
    input_ids = torch.randint(256, (2, 12))
    changed = input_ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 256
    before, after = model(input_ids), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_bert_does_not_read_padding():
    """The mask must keep padded tokens from the others."""
    model = Bert(BertConfig()).eval()
    inputs = tokens_and_mask(2, 12)
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 6:] = (changed["input_ids"][0, 6:] + 1) % 256
    torch.testing.assert_close(model(**inputs)[0, :6], model(**changed)[0, :6])


def test_fused_llama_equals_the_one_with_two_projections():
    """Both spellings are the same function of the same weights."""
    plain, fused = Llama(LlamaConfig()), Llama(LlamaConfig(fused_gate_up=True))
    state = plain.state_dict()
    for layer in ("layers.0.mlp", "layers.1.mlp"):
        gate, up = state.pop(f"{layer}.gate_proj.weight"), state.pop(f"{layer}.up_proj.weight")
        state[f"{layer}.gate_up_proj.weight"] = torch.cat([gate, up])
    fused.load_state_dict(state)
    input_ids = torch.randint(256, (2, 9))
    torch.testing.assert_close(fused(input_ids), plain(input_ids))
