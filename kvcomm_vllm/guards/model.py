# SPDX-License-Identifier: Apache-2.0
"""Which models and engine arguments must not be started with our connector at all.

With some of them vLLM stops once a KV connector is configured (``v1/core/sched/scheduler.py``
asserts that the model is no encoder-decoder; Mamba needs the hybrid allocator, which a connector
turns off); with others no layer could ever be reused. Without the connector the same engine serves
exactly, so the caller drops it and says why. What else may rule reuse out is found with the
connector in place, by ``engine_guard.py`` and by the workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

# Their token embeddings carry the position and vLLM's ModelConfig has no flag that says so.
_ABSOLUTE_POSITIONS = frozenset({"gpt2", "gpt_bigcode", "opt"})
# Formats that hold K and V as plain numbers, one scale for the whole layer at most.
_PLAIN_KV = frozenset({"auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"})
_WINDOWED = frozenset({"sliding_attention", "chunked_attention"})


def unsupported_model(model: ModelConfig) -> Reason | None:
    """Why KV of this model can never be reused; None when nothing speaks against it.

    Whether the attention layers can be read and rotated shows only in the worker, once they exist.
    """
    if model.runner_type != "generate":
        return Reason.POOLING
    if model.is_encoder_decoder:
        return Reason.ENCODER_DECODER
    if model.is_attention_free or model.is_hybrid:
        return Reason.MAMBA
    if model.use_mla:
        return Reason.MLA
    if getattr(model, "is_diffusion", False):
        return Reason.DIFFUSION
    if getattr(model.hf_text_config, "model_type", "") in _ABSOLUTE_POSITIONS:
        return Reason.ABSOLUTE_POSITIONS
    return None


def unsupported_engine(args: EngineArgs, model: ModelConfig) -> Reason | None:
    """Why these engine arguments rule reuse out for a model that could do it, or None."""
    if args.kv_offloading_size is not None:
        return Reason.KV_OFFLOADING
    if str(args.kv_cache_dtype) not in _PLAIN_KV:
        return Reason.KV_QUANTISED
    if args.disable_hybrid_kv_cache_manager is False and has_windowed_layers(model):
        return Reason.SLIDING_WINDOW_HYBRID
    return None


def has_windowed_layers(model: ModelConfig) -> bool:
    """Whether some layers attend to a window only (Gemma, Mistral, gpt-oss, Llama 4)."""
    if model.disable_sliding_window:
        return False
    layer_types = getattr(model.hf_text_config, "layer_types", None) or ()
    return (
        bool(_WINDOWED.intersection(layer_types))
        or model.get_sliding_window() is not None
        or getattr(model, "attention_chunk_size", None) is not None
    )
