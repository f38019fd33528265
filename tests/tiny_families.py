# SPDX-License-Identifier: Apache-2.0
"""One tiny random model of every family whose attention differs in something that matters here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from built_models import built
from tiny_model import MARKERS, MAX_TOKENS, VOCABULARY, save_tokenizer


@dataclass(frozen=True)
class Family:
    """A model to make and how to serve it.

    Args:
        model_type: name of the configuration in ``transformers``.
        head_dim: channels of a head; decides how vLLM packs pages on CPU (80 is no multiple of 32).
        config: what differs from :meth:`settings`.
        engine: arguments of the engine (block size, dtype).
        kv_heads: of 4 heads.
        vision: configuration of what sees images; the tokens that stand for them are there then.
        vision_class: class and module in ``vllm.model_executor.models`` of a model that sees them.
        since: version of vLLM that runs it on a CPU as it is made here, and what older ones lack;
            None: the oldest that is accepted does.
    """

    model_type: str
    head_dim: int
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    kv_heads: int = 2
    vision: dict[str, Any] | None = None
    vision_class: tuple[str, str] | None = None
    since: tuple[str, str] | None = None

    def settings(self) -> dict[str, Any]:
        width, ends = 4 * self.head_dim, {"tie_word_embeddings": False, "eos_token_id": 1}
        text = self._text_settings(width)
        if self.vision is None:
            return text
        vision = {"depth": 2, "num_heads": 2, "hidden_size": 64, "out_hidden_size": width}
        return {**MARKERS, **ends, "text_config": text, "vision_config": {**vision, **self.vision}}

    def _text_settings(self, width: int) -> dict[str, Any]:
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
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWED = {"sliding_window": 64, "layer_types": [SLIDING, FULL, SLIDING]}
# Which of a token's positions, in time, height and width, turns which pairs of channels.
SECTIONS = rope(mrope_section=[8, 12, 12])
INTERLEAVED = rope(mrope_section=[12, 10, 10], mrope_interleaved=True)
# Cohere 2 does not rotate in layers of full attention.
FULL_FIRST = {"sliding_window": 64, "layer_types": [FULL, SLIDING, SLIDING]}

# Widths of a row are DeepSeek's own: vLLM's attention on CPU takes no other.
MLA = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
AS_V3 = {
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
ON_CPU = {"dtype": "float32", "attention_backend": "CPU_MLA"}
MLA_ON_CPU = ("0.30", "MLA on a CPU")
WITHOUT_TORCHVISION = ("0.32", "Qwen2-VL without torchvision")

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
    "gemma4, heads of two sizes": Family(
        "gemma4_text",
        32,
        {
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 64,
            "layer_types": [SLIDING, SLIDING, FULL],
            "rope_parameters": {
                SLIDING: rope(),
                FULL: rope("proportional", partial_rotary_factor=0.25, rope_theta=1000000.0),
            },
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
        },
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
    "llama4, chunks": Family(
        "llama4_text",
        64,
        {
            "head_dim": 64,
            "rope_parameters": rope(),
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0, 1],
            "interleave_moe_layer_step": 1,
            "num_local_experts": 2,
            "intermediate_size_mlp": 256,
        },
        {"dtype": "float32"},
    ),
    "glm4 partial": Family(
        "glm4", 64, {"head_dim": 64, "rope_parameters": rope(partial_rotary_factor=0.5)}
    ),
    "olmo3": Family("olmo3", 64, {"rope_parameters": rope(), **WINDOWED}),
    "smollm3, no rope in a layer": Family(
        "smollm3",
        64,
        {"no_rope_layers": [1, 0, 1]},
        since=("0.30", "code of transformers that turns keys itself"),
    ),
    "bloom alibi": Family(
        "bloom", 64, {"n_layer": 3, "n_head": 4, "tie_word_embeddings": True}, kv_heads=4
    ),
    "qwen2-vl, m-rope": Family(
        "qwen2_vl",
        64,
        {"rope_parameters": SECTIONS},
        vision={"embed_dim": 64, "hidden_size": 256, "mlp_ratio": 2},
        vision_class=("Qwen2VLForConditionalGeneration", "qwen2_vl"),
        since=WITHOUT_TORCHVISION,
    ),
    "qwen2.5-vl, m-rope, float32": Family(
        "qwen2_5_vl",
        64,
        {"rope_parameters": SECTIONS},
        {"dtype": "float32"},
        vision={"intermediate_size": 128, "fullatt_block_indexes": [1]},
        vision_class=("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
        since=WITHOUT_TORCHVISION,
    ),
    "qwen3-vl, interleaved m-rope": Family(
        "qwen3_vl",
        64,
        {"rope_parameters": INTERLEAVED, "head_dim": 64},
        vision={"intermediate_size": 128, "deepstack_visual_indexes": [0, 1]},
        vision_class=("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        since=("0.30", "Qwen3-VL on a CPU"),
    ),
    "glm-4v, m-rope in gpt-j pairs": Family(
        "glm4v",
        64,
        {"rope_parameters": {**rope(mrope_section=[4, 6, 6]), "partial_rotary_factor": 0.5}},
        vision={"intermediate_size": 128},
        vision_class=("Glm4vForConditionalGeneration", "glm4_1v"),
    ),
    "deepseek v2 lite": Family(
        "deepseek_v2", 32, {"q_lora_rank": None, **MLA}, ON_CPU, since=MLA_ON_CPU
    ),
    "deepseek v2": Family("deepseek_v2", 32, {"q_lora_rank": 64, **MLA}, ON_CPU, since=MLA_ON_CPU),
    "deepseek v3": Family(
        "deepseek_v3", 32, {"q_lora_rank": 64, **MLA, **AS_V3}, ON_CPU, since=MLA_ON_CPU
    ),
}


def hybrid(name: str, *layer_types: str, since: tuple[str, str] | None = None) -> dict[str, Family]:
    """A family in fp32 with such layers, served with vLLM's hybrid KV cache manager; by its row in
    docs/support.md.
    """
    family = replace(FAMILIES[name], since=since)
    layers = {"layer_types": list(layer_types), "num_hidden_layers": len(layer_types)}
    config = {**family.config, **layers}
    engine = {**family.engine, "dtype": "float32"}
    return {f"{name}, hybrid_kv_cache": replace(family, config=config, engine=engine)}


# vLLM makes groups of as many layers each: from two to four of them.
HYBRID = {
    **hybrid("gemma3 two ropes", *[*[SLIDING] * 3, FULL] * 2),
    **hybrid("cohere2 no rope first", FULL, SLIDING, SLIDING),
    **hybrid("gpt-oss, sinks", *[SLIDING, FULL] * 3, since=("0.32", "sinks in float32 on a CPU")),
    **hybrid("olmo3", SLIDING, SLIDING, FULL),
}

# Families with which reuse is off, and why.
REFUSED = {
    "olmo2, dynamic rope": (
        Family("olmo2", 64, {"rope_parameters": rope("dynamic", factor=2.0)}),
        "rope_unsupported",
    ),
}


def save_family(family: Family, folder: Path) -> None:
    """Write model and tokenizer; the same weights every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText
    config = AutoConfig.for_model(family.model_type, **family.settings())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = built(auto, config, torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                _spread(name, weight)
        dtype = getattr(torch, family.engine.get("dtype", "bfloat16"))
        model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder, markers=family.vision is not None)


def _spread(name: str, weight: Any) -> None:
    """Weights that matter: attention that is picky, norms and biases that are not the identity."""
    if weight.ndim > 1:
        weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
    elif name.endswith("bias"):
        weight.normal_(0.0, 0.3)
    else:
        weight.add_(0.3 * weight.new_empty(weight.shape).normal_())
