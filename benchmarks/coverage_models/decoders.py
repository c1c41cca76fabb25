"""Hugging Face decoders: two layers of 32 features, without a cache, as one forward pass over the prompt."""

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
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Experts are exported as batched products; the default loops over the experts that tokens happened to choose.
_MOE = {
    **_GROUPED,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
}
_SHARED_MOE = {
    **_MOE,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
_FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "use_cache": False}


def _gpt(model: str, **config: Any) -> Builder:
    return hugging_face(model, text, **{**_GPT, **config})


def _plain(model: str, **config: Any) -> Builder:
    """As many keys as queries."""
    return hugging_face(model, text, **{**_SIZES, **config})


def _llama(model: str, **config: Any) -> Builder:
    """Grouped queries."""
    return hugging_face(model, text, **{**_GROUPED, **config})


def _moe(model: str, **config: Any) -> Builder:
    return hugging_face(model, text, **{**_MOE, **config})


DECODERS: dict[str, Builder] = {
    "gpt2": _gpt("GPT2Model"),
    "gpt_neo": hugging_face(
        "GPTNeoModel",
        text,
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        intermediate_size=64,
        max_position_embeddings=32,
        use_cache=False,
    ),
    "gpt_neox": _plain("GPTNeoXModel"),
    "gptj": _gpt("GPTJModel", rotary_dim=8),
    "gpt_bigcode": _gpt("GPTBigCodeModel"),
    "imagegpt": _gpt("ImageGPTModel"),
    "codegen": _gpt("CodeGenModel", rotary_dim=8, n_ctx=32, n_head=4),
    "opt": _plain("OPTModel", word_embed_proj_dim=32, ffn_dim=64),
    "bloom": hugging_face("BloomModel", text, vocab_size=64, hidden_size=32, n_layer=2, n_head=2, use_cache=False),
    "falcon": hugging_face("FalconModel", text, **_FALCON, ffn_hidden_size=64),
    "falcon_new": hugging_face(
        "FalconModel", text, **_FALCON, alibi=True, new_decoder_architecture=True, num_kv_heads=1, bias=True
    ),
    "mpt": hugging_face(
        "MptModel", text, vocab_size=64, d_model=32, n_layers=2, n_heads=2, max_seq_len=32, use_cache=False
    ),
    "xglm": hugging_face(
        "XGLMModel",
        text,
        vocab_size=64,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    ),
    "biogpt": _plain("BioGptModel"),
    "persimmon": _plain("PersimmonModel"),
    "phi": _plain("PhiModel"),
    "llama": _llama("LlamaModel"),
    "llama_causal_lm": _llama("LlamaForCausalLM"),
    "mistral": _llama("MistralModel", sliding_window=6),
    "qwen2": _llama("Qwen2Model"),
    "qwen3": _llama("Qwen3Model", head_dim=16),
    "gemma": _llama("GemmaModel", head_dim=16),
    "gemma2": _llama("Gemma2Model", head_dim=16, sliding_window=6),
    "gemma3": _llama("Gemma3TextModel", head_dim=16, sliding_window=6),
    "phi3": _llama("Phi3Model"),
    "stablelm": _llama("StableLmModel"),
    "starcoder2": _llama("Starcoder2Model", sliding_window=6),
    "cohere": _llama("CohereModel"),
    "olmo": _llama("OlmoModel"),
    "olmo2": _llama("Olmo2Model"),
    "granite": _llama("GraniteModel"),
    "smollm3": _llama("SmolLM3Model"),
    "nemotron": _llama("NemotronModel"),
    "glm": _llama("GlmModel", head_dim=16),
    "glm4": _llama("Glm4Model", head_dim=16),
    "arcee": _llama("ArceeModel"),
    "apertus": _llama("ApertusModel"),
    "doge": _llama("DogeModel"),
    "bitnet": _llama("BitNetModel"),
    "lfm2": _llama("Lfm2Model", full_attn_idxs=[1], block_multiple_of=8),
    "recurrent_gemma": _llama(
        "RecurrentGemmaModel", lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
    ),
    "falcon_h1": _llama(
        "FalconH1Model",
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=4,
    ),
    "mixtral": _moe("MixtralModel"),
    "qwen2_moe": _moe("Qwen2MoeModel", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64),
    "deepseek_v3": hugging_face("DeepseekV3Model", text, **_SHARED_MOE),
    "gpt_oss": _moe("GptOssModel", head_dim=16),
    "granitemoe_shared": _moe("GraniteMoeSharedModel", shared_intermediate_size=64),
    "jamba": _moe(
        "JambaModel",
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "mamba": hugging_face(
        "MambaModel",
        text,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        time_step_rank=4,
        use_cache=False,
    ),
    "mamba2": hugging_face(
        "Mamba2Model",
        text,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=4,
        use_cache=False,
    ),
    "rwkv": hugging_face(
        "RwkvModel",
        text,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        context_length=32,
        attention_hidden_size=32,
        intermediate_size=64,
        use_cache=False,
    ),
}
