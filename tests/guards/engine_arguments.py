# SPDX-License-Identifier: Apache-2.0
"""Configurations of tiny models, and engine arguments for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

DECODER: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
UNEVEN = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 64}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 16},
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": 64},
    "Gemma3ForCausalLM": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma4ForCausalLM": {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention"],
        **UNEVEN,
    },
    "Llama4ForCausalLM": {
        "model_type": "llama4_text",
        "head_dim": 16,
        "attention_chunk_size": 64,
        "no_rope_layers": [1, 0],
    },
    "DeepseekV2ForCausalLM": {"model_type": "deepseek_v2", "q_lora_rank": None, **MLA},
    "DeepseekV32ForCausalLM": {
        "model_type": "deepseek_v32",
        "q_lora_rank": 32,
        "index_topk": 64,
        "index_n_heads": 4,
        "index_head_dim": 32,
        **MLA,
    },
    "Mamba2ForCausalLM": {"model_type": "mamba2", "num_heads": 8, "head_dim": 16},
    "JambaForCausalLM": {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1},
    "WhisperForConditionalGeneration": {"model_type": "whisper", "d_model": 64},
    "OPTForCausalLM": {"model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64},
    "BertModel": {"model_type": "bert"},
}

MakeArgs = Callable[..., EngineArgs]
