# SPDX-License-Identifier: Apache-2.0
"""Attention layers: where they are, and how they write their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

PACKING_BACKEND = "CPU_ATTN"  # the one that packs K and V inside pages


def attention_layers(config: VllmConfig) -> dict[str, Any]:
    """Layer name -> attention layer of this rank, in model order."""
    return dict(config.compilation_config.static_forward_context)


def latent_dim(layer: Any) -> int:
    """Channels of what MLA makes keys and values from, which is what such a layer stores beside one
    rotated key; 0 for layers that store K and V.
    """
    return int(getattr(layer, "kv_lora_rank", None) or 0)


def picks_tokens(layer: Any) -> bool:
    """Whether the layer attends to tokens that an indexer picks, by a cache of its own."""
    return bool(getattr(layer, "use_sparse", False)) or getattr(layer, "indexer", None) is not None


def cache_of(layer: Any) -> torch.Tensor:
    """The layer's pages: ``[pages, kv_heads, tokens, channels]``. vLLM leaves out the one head of
    MLA.
    """
    cache: torch.Tensor = layer.kv_cache
    return cache.unsqueeze(1) if latent_dim(layer) and cache.ndim == 3 else cache


def is_drafters(layer: Any) -> bool:
    """Whether a drafter owns the layer, as vLLM 0.33 says of each."""
    return bool(getattr(layer, "is_draft_layer", False))


def cpu_isa(layer: Any) -> str:
    """Instruction set the CPU backend packs pages for; set on layers by its metadata builder, or
    by their own half of it (vLLM 0.28).
    """
    return str(getattr(layer, "isa", None) or getattr(layer.impl, "isa", ""))


def write_kv(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """The backend's own write: ``key``, ``value`` ``[tokens, kv_heads, channels]`` into slots,
    packed and quantised.
    """
    write = layer.impl.do_kv_cache_update
    if latent_dim(layer):
        dtype = layer.kv_cache_dtype
        write(value.squeeze(1), key, layer.kv_cache, slots, dtype, layer._k_scale)
    else:
        write(layer, key, value, layer.kv_cache, slots)
