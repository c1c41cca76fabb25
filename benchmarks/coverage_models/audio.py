"""Hugging Face models of speech, sound and time series."""

from __future__ import annotations

from typing import Any

import torch

from coverage_models.building import Builder, hugging_face, random, tokens

_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
_SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_target_positions": 16,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_PATCHES = {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4}


def _speech(model: str, **config: Any) -> Builder:
    """Raw audio [B, samples]."""
    return hugging_face(model, random(input_values=(2, 400)), **{**_SPEECH, **config})


def _seq2seq(model: str, features: tuple[int, int, int], **config: Any) -> Builder:
    """Spectrograms and the tokens said so far."""

    def inputs() -> dict[str, Any]:
        return {"input_features": torch.randn(features), "decoder_input_ids": tokens(7)}

    return hugging_face(model, inputs, **{**_SEQ2SEQ, **config})


def _moonshine() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1500), "decoder_input_ids": tokens(7)}


AUDIO: dict[str, Builder] = {
    "wav2vec2": _speech("Wav2Vec2Model"),
    "wav2vec2_conformer": _speech(
        "Wav2Vec2ConformerModel", conv_depthwise_kernel_size=3, position_embeddings_type="relative"
    ),
    "hubert": _speech("HubertModel"),
    "wavlm": _speech("WavLMModel", num_buckets=8, max_bucket_distance=16),
    "data2vec_audio": _speech("Data2VecAudioModel", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    "sew": _speech("SEWModel", squeeze_factor=2),
    "parakeet_encoder": hugging_face(
        "ParakeetEncoder",
        random(input_features=(2, 32, 16)),
        **_ENCODER,
        num_mel_bins=16,
        subsampling_conv_channels=8,
        conv_kernel_size=3,
    ),
    "whisper": _seq2seq(
        "WhisperModel",
        (2, 8, 24),
        num_mel_bins=8,
        max_source_positions=12,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "speech_to_text": _seq2seq(
        "Speech2TextModel",
        (2, 24, 8),
        max_source_positions=32,
        conv_channels=16,
        input_feat_per_channel=8,
        conv_kernel_sizes=[3, 3],
    ),
    "moonshine": hugging_face(
        "MoonshineModel",
        _moonshine,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    ),
    "speecht5": hugging_face(
        "SpeechT5Model",
        random(input_values=(2, 12, 32), decoder_input_values=(2, 7, 32)),
        hidden_size=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        use_cache=False,
    ),
    "ast": hugging_face(
        "ASTModel",
        random(input_values=(2, 24, 8)),
        **_ENCODER,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=8,
    ),
    "patchtst": hugging_face(
        "PatchTSTModel",
        random(past_values=(2, 16, 3)),
        **_PATCHES,
        num_hidden_layers=2,
        d_model=32,
        num_attention_heads=2,
        ffn_dim=64,
    ),
    "patchtsmixer": hugging_face(
        "PatchTSMixerModel", random(past_values=(2, 16, 3)), **_PATCHES, num_layers=2, d_model=16, expansion_factor=2
    ),
}
