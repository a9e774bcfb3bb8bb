"""The real shapes of the tutorials' models, as their config.json on the hub has them."""

from __future__ import annotations

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA3_8B = {
    **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3_1_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIGS = {
    "smollm2": {**_LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0,
                "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "float32"},
    "llama2": {**_LLAMA, "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
               "num_attention_heads": 40, "num_key_value_heads": 40, "rope_theta": 10000.0,
               "max_position_embeddings": 4096, "torch_dtype": "float16"},
    "llama3": _LLAMA3_8B,
    "llama3_70b": {**_LLAMA3_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                   "num_attention_heads": 64},
    "mistral": {**_LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000,
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "rope_theta": 10000.0, "max_position_embeddings": 32768,
                "sliding_window": 4096},
    "gpt": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 5120,
            "n_inner": 20480, "n_layer": 40, "n_head": 40, "n_positions": 2048, "activation_function": "gelu",
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "torch_dtype": "float32"},
    "qwen3": {**_LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
              "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0,
              "max_position_embeddings": 262144, "tie_word_embeddings": True},
    "llama3_1": {**_LLAMA3_8B, "rope_scaling": _LLAMA3_1_ROPE, "max_position_embeddings": 131072},
}  # fmt: skip


def config_of_kind(kind: str):
    """transformers' config of a tutorial's model."""
    from transformers import AutoConfig

    settings = {**CONFIGS[kind]}
    settings.pop("rope_scaling", None)  # transformers before 4.43 can't read it, and no size depends on it
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except ValueError:  # transformers before 4.51 knows no Qwen3, which has a Llama's weights and two small norms more
        return AutoConfig.for_model("llama", **settings)
