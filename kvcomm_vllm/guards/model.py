# SPDX-License-Identifier: Apache-2.0
"""Which models must not be started with our connector at all.

With some of them vLLM stops once a KV connector is configured (``v1/core/sched/scheduler.py``
asserts that the model is no encoder-decoder; Mamba needs the hybrid allocator, which a connector
turns off); with others no layer could ever be reused. Without the connector the same engine serves
exactly, so the caller drops it and says why. What else may rule reuse out is found with the
connector in place, by ``engine.py`` and by the workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm_vllm.compat.rules import has_uneven_heads
from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Their token embeddings carry the position and vLLM's ModelConfig has no flag that says so.
_ABSOLUTE_POSITIONS = frozenset({"gpt2", "gpt_bigcode", "opt"})
_UNEVEN_HEADS = frozenset({"gemma4_text"})
_SLIDING = "sliding_attention"


def unsupported_model(model: ModelConfig, copied: bool = False) -> Reason | None:
    """Why KV of this model can never be reused; None when nothing speaks against it.

    Args:
        copied: tiers or other connectors are to copy its pages, too.

    Whether the attention layers can be read and rotated shows only in the worker, once they exist.
    """
    if model.runner_type != "generate":
        return Reason.POOLING
    if model.is_encoder_decoder:
        return Reason.ENCODER_DECODER
    if model.is_attention_free or model.is_hybrid:
        return Reason.MAMBA
    if _picks_tokens(model):
        return Reason.SPARSE_ATTENTION
    if getattr(model, "is_diffusion", False):
        return Reason.DIFFUSION
    if getattr(model.hf_text_config, "model_type", "") in _ABSOLUTE_POSITIONS:
        return Reason.ABSOLUTE_POSITIONS
    if _only_slides(model):
        return Reason.SLIDING_WINDOW_ONLY
    if has_uneven_heads(model) and (copied or not _was_tried(model)):
        return Reason.UNEVEN_HEADS
    return None


def has_windowed_layers(model: ModelConfig) -> bool:
    """Whether some layers attend to a window only (Gemma, Mistral, gpt-oss, Llama 4)."""
    return has_sliding_layers(model) or has_chunked_layers(model)


def has_chunked_layers(model: ModelConfig) -> bool:
    """Whether some layers see their own chunk of the text alone (Llama 4)."""
    if model.disable_sliding_window:
        return False
    return (
        "chunked_attention" in _layer_types(model)
        or getattr(model, "attention_chunk_size", None) is not None
    )


def has_sliding_layers(model: ModelConfig) -> bool:
    """Whether the window of some layers moves on token by token (all of these but Llama 4's)."""
    if model.disable_sliding_window:
        return False
    return _SLIDING in _layer_types(model) or model.get_sliding_window() is not None


def _was_tried(model: ModelConfig) -> bool:
    """Whether a model with uneven heads is known to work without the hybrid KV cache manager; with
    layers that look at the KV of others (small Gemma 4) vLLM 0.32 does not even start.
    """
    config = model.hf_text_config
    shares_kv = bool(getattr(config, "num_kv_shared_layers", 0))
    return getattr(config, "model_type", "") in _UNEVEN_HEADS and not shares_kv


def _picks_tokens(model: ModelConfig) -> bool:
    """vLLM's own rule (``DeepseekV2MLAAttention``, its V4) for MLA with an indexer."""
    config = model.hf_text_config
    return model.use_mla and (hasattr(config, "index_topk") or hasattr(config, "compress_ratios"))


def _only_slides(model: ModelConfig) -> bool:
    """vLLM's own rule (``EngineArgs``) for a window that all layers have."""
    if model.disable_sliding_window or model.get_sliding_window() is None:
        return False
    return all(kind == _SLIDING for kind in _layer_types(model))


def _layer_types(model: ModelConfig) -> tuple[str, ...]:
    return tuple(getattr(model.hf_text_config, "layer_types", None) or ())
