"""Hugging Face text encoders: two layers of 32 features, or the least that the architecture allows."""

from __future__ import annotations

from typing import Any

from coverage_models.building import Builder, hugging_face, text

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_XLM = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
_DISTILBERT = {
    "vocab_size": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "max_position_embeddings": 32,
}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}


def _bert(model: str, **config: Any) -> Builder:
    """A model whose configuration has the names that BERT's has."""
    return hugging_face(model, text, **{**_SIZES, **config})


def _without_cache() -> dict[str, Any]:
    """Outputs that are tensors only."""
    return {**text(), "use_cache": False}


TEXT_ENCODERS: dict[str, Builder] = {
    "bert": _bert("BertModel"),
    "bert_chunked": _bert("BertModel", chunk_size_feed_forward=4),
    "bert_masked_lm": _bert("BertForMaskedLM"),
    "roberta": _bert("RobertaModel"),
    "roberta_classifier": _bert("RobertaForSequenceClassification"),
    "distilbert": hugging_face("DistilBertModel", text, **_DISTILBERT),
    "distilbert_classifier": hugging_face("DistilBertForSequenceClassification", text, **_DISTILBERT),
    "albert": _bert("AlbertModel", embedding_size=16),
    "electra": _bert("ElectraModel", embedding_size=16),
    "electra_pretraining": _bert("ElectraForPreTraining", embedding_size=16),
    "deberta": _bert("DebertaModel", **_RELATIVE),
    "deberta_v2": _bert("DebertaV2Model", **_RELATIVE, position_buckets=4, share_att_key=True),
    "mpnet": _bert("MPNetModel"),
    "modernbert": _bert(
        "ModernBertModel", local_attention=8, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2
    ),
    "eurobert": _bert("EuroBertModel", num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
    "nomic_bert": _bert("NomicBertModel"),
    "gte": _bert("GteModel"),
    "xlnet": hugging_face("XLNetModel", text, vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64),
    "xlm": hugging_face("XLMModel", text, **_XLM),
    "funnel": hugging_face(
        "FunnelModel",
        text,
        vocab_size=64,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=2,
        d_head=16,
        d_inner=64,
    ),
    "squeezebert": _bert("SqueezeBertModel", embedding_size=32, intermediate_groups=1, output_groups=1),
    "squeezebert_grouped": _bert("SqueezeBertModel", embedding_size=32),
    "convbert": _bert("ConvBertModel", embedding_size=16),
    "fnet": _bert("FNetModel", use_tpu_fourier_optimizations=False),
    "nystromformer": _bert("NystromformerModel", num_landmarks=12, segment_means_seq_len=12),
    "big_bird": _bert("BigBirdModel", attention_type="original_full"),
    "longformer": _bert("LongformerModel", attention_window=4, onnx_export=True),
    "roformer": _bert("RoFormerModel"),
    "mobilebert": _bert(
        "MobileBertModel",
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
        num_feedforward_networks=2,
    ),
    "ibert": _bert("IBertModel"),
    "markuplm": _bert("MarkupLMModel", xpath_unit_hidden_size=8, max_depth=4),
    "xmod": _bert("XmodModel", languages=["en_XX"], default_language="en_XX"),
    "esm": _bert("EsmModel", pad_token_id=1, mask_token_id=2, position_embedding_type="rotary"),
    "canine": _bert("CanineModel", num_hash_buckets=64, local_attention_window=4),
    "luke": _bert("LukeModel", entity_vocab_size=16, entity_emb_size=8),
    "reformer": hugging_face(
        "ReformerModel",
        _without_cache,
        vocab_size=64,
        attn_layers=["local", "local"],
        hidden_size=32,
        num_attention_heads=2,
        feed_forward_size=64,
        axial_pos_embds=False,
        max_position_embeddings=32,
        local_attn_chunk_length=4,
        is_decoder=False,
    ),
}
