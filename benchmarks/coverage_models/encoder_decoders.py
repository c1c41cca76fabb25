"""Hugging Face encoder-decoders: two layers of 32 features on either side."""

from __future__ import annotations

from typing import Any

import torch

from coverage_models.building import Builder, hugging_face, text_pair

_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
_PROPHETNET = {
    "vocab_size": 64,
    "hidden_size": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
    "ngram": 2,
}


def _bart(model: str, **config: Any) -> Builder:
    return hugging_face(model, text_pair, **{**_BART, **config})


def _t5(model: str, **config: Any) -> Builder:
    return hugging_face(model, text_pair, **{**_T5, **config})


def _masked_pair() -> dict[str, Any]:
    """Without a mask, the decoder would look for padding."""
    return {**text_pair(), "decoder_attention_mask": torch.ones(2, 7, dtype=torch.bool)}


ENCODER_DECODERS: dict[str, Builder] = {
    "t5": _t5("T5Model"),
    "t5_v1_1": _t5("T5Model", feed_forward_proj="gated-gelu"),
    "longt5": _t5("LongT5Model", encoder_attention_type="local", local_radius=4),
    "switch_transformers": _t5(
        "SwitchTransformersModel",
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=16,
    ),
    "bart": _bart("BartModel"),
    "mbart": _bart("MBartModel"),
    "pegasus": _bart("PegasusModel"),
    "marian": _bart("MarianModel"),
    "m2m100": _bart("M2M100Model"),
    "led": _bart(
        "LEDModel",
        attention_window=4,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
        onnx_export=True,
    ),
    "fsmt": hugging_face("FSMTModel", _masked_pair, **_BART, langs=["en", "de"], src_vocab_size=64, tgt_vocab_size=64),
    "prophetnet": hugging_face("ProphetNetModel", text_pair, **_PROPHETNET),
}
