# SPDX-License-Identifier: Apache-2.0
"""One tiny random model of every family whose attention differs in something that matters here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_model import MAX_TOKENS, VOCABULARY, save_tokenizer


@dataclass(frozen=True)
class Family:
    """A model to make and how to serve it.

    Args:
        model_type: name of the configuration in ``transformers``.
        head_dim: channels of a head; decides how vLLM packs pages on CPU (80 is no multiple of 32).
        config: what differs from :meth:`settings`.
        engine: arguments of the engine (block size, dtype).
        kv_heads: of 4 heads.
    """

    model_type: str
    head_dim: int
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    kv_heads: int = 2

    def settings(self) -> dict[str, Any]:
        width = 4 * self.head_dim
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": MAX_TOKENS,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **self.config,
        }


def rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=256,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=1024)
LONG_ROPE = rope(
    "longrope",
    short_factor=[1.0] * 16,
    long_factor=[1.0 + i / 16 for i in range(16)],
    original_max_position_embeddings=1024,
)
GEMMA3_ROPES = {
    "sliding_attention": rope(),
    "full_attention": rope("linear", factor=8.0, rope_theta=1000000.0),
}
WINDOWED = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Cohere 2 does not rotate in layers of full attention.
FULL_FIRST = {
    "sliding_window": 64,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}

FAMILIES = {
    "llama3 scaling": Family("llama", 64, {"head_dim": 64, "rope_parameters": LLAMA3}),
    "yarn, float32": Family(
        "llama", 96, {"head_dim": 96, "rope_parameters": YARN}, {"dtype": "float32"}
    ),
    "long rope": Family(
        "phi3", 32, {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 1024}
    ),
    "qwen2, pages of 128": Family("qwen2", 64, engine={"block_size": 128}),
    "qwen3, float16": Family("qwen3", 128, {"head_dim": 128}, {"dtype": "float16"}),
    "partial, head of 80": Family(
        "stablelm", 80, {"rope_parameters": rope(partial_rotary_factor=0.4)}
    ),
    "gpt-j pairs": Family(
        "gptj",
        64,
        {"rotary_dim": 32, "n_positions": MAX_TOKENS, "n_embd": 256, "n_layer": 3, "n_head": 4},
        kv_heads=4,
    ),
    "gemma3 two ropes": Family(
        "gemma3_text",
        32,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": GEMMA3_ROPES, **WINDOWED},
    ),
    "cohere2 no rope first": Family("cohere2", 64, {"tie_word_embeddings": True, **FULL_FIRST}),
    "qwen3-moe": Family(
        "qwen3_moe",
        64,
        {"head_dim": 64, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        {"dtype": "float32"},
    ),
    "mixtral": Family(
        "mixtral",
        64,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"dtype": "float32"},
    ),
    "gpt-oss, sinks": Family(
        "gpt_oss",
        64,
        {
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": rope(
                "yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=1024,
            ),
            **WINDOWED,
        },
    ),
    "granite scales": Family(
        "granite",
        64,
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "glm4 partial": Family(
        "glm4", 64, {"head_dim": 64, "rope_parameters": rope(partial_rotary_factor=0.5)}
    ),
    "bloom alibi": Family(
        "bloom", 64, {"n_layer": 3, "n_head": 4, "tie_word_embeddings": True}, kv_heads=4
    ),
}

# Families with which reuse is off, and why; vLLM takes Olmo 3 from transformers as it is.
REFUSED = {
    "olmo3": (Family("olmo3", 64, {"rope_parameters": rope(), **WINDOWED}), "rope_unsupported"),
}


def save_family(family: Family, folder: Path) -> None:
    """Write model and tokenizer; the same weights every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.model_type, **family.settings())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                _spread(name, weight)
        dtype = getattr(torch, family.engine.get("dtype", "bfloat16"))
        model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)


def _spread(name: str, weight: Any) -> None:
    """Weights that matter: attention that is picky, norms and biases that are not the identity."""
    if weight.ndim > 1:
        weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
    elif name.endswith("bias"):
        weight.normal_(0.0, 0.3)
    else:
        weight.add_(0.3 * weight.new_empty(weight.shape).normal_())
