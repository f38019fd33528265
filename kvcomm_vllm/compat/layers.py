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


def is_drafters(layer: Any) -> bool:
    """Whether a drafter owns the layer, as vLLM 0.33 says of each."""
    return bool(getattr(layer, "is_draft_layer", False))


def cpu_isa(layer: Any) -> str:
    """Instruction set the CPU backend packs pages for; set on layers by its metadata builder, or
    by their own half of it (vLLM 0.28).
    """
    return str(getattr(layer, "isa", None) or getattr(layer.impl, "isa", ""))


def write_kv(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """The backend's own write: ``key``, ``value`` ``[tokens, kv_heads, head_dim]`` into slots,
    packed and quantised.
    """
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
