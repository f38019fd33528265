# SPDX-License-Identifier: Apache-2.0
"""The KV view: which layers' pages can be read and written as token slots, and how.

vLLM 0.28+ gives every attention layer a logical ``[pages, kv_heads, tokens, 2 * head_dim]`` cache.
Which backend uses it says what is in there, not the device: K and V as the strides tell, or, with
vLLM's CPU attention, packed inside each page for the instruction set in use.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from kvcomm_vllm.compat.layers import PACKING_BACKEND, cpu_isa, is_drafters
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.rope import Rope, no_rope, rope_module, rope_of

CPU_PACKING = {"vec": Packing.VEC, "vec16": Packing.VEC, "amx": Packing.AMX}
# K and V of a head side by side, written by `do_kv_cache_update`; composites write like Triton.
STRIDED_BACKENDS = {
    "FLASH_ATTN",
    "FLASHINFER",
    "FLEX_ATTENTION",
    "TRITON_ATTN",
    "TRITON_FLASH_ATTN",
    "TRITON_FLASHINFER",
}
PLAIN_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose loads share one launch: same pages, same rotary embedding (``rotary``, vLLM's
    module).
    """

    layers: tuple[Any, ...]
    pages: PageGroup
    rope: Rope
    rotary: Any | None


def build_groups(
    layers: dict[str, Any], model: torch.nn.Module, unrotated: Collection[str] = ()
) -> list[LayerGroup]:
    """Groups of all attention layers that own a cache, in model order.

    Args:
        unrotated: names of layers that are known not to use the rotary embedding they have.

    Raises:
        Unsupported: if any of them is not understood; reuse is then off for all.
    """
    ropes: dict[int | None, Rope] = {}
    members: dict[tuple[Any, ...], list[Any]] = {}
    traits: dict[tuple[Any, ...], tuple[Packing, Rope, Any]] = {}
    for name, layer in layers.items():
        if not hasattr(layer, "kv_cache") or getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        if is_drafters(layer):
            raise Unsupported(Reason.SPEC_DECODE, name)
        module = None if name in unrotated else rope_module(model, layer)
        packing = packing_of(name, layer)
        cache = layer.kv_cache
        known = None if module is None else id(module)
        if known not in ropes:
            ropes[known] = no_rope(cache.device) if module is None else rope_of(module)
        rope = ropes[known]
        key = (packing, id(rope), cache.shape, cache.stride(), cache.dtype, layer.kv_cache_dtype)
        members.setdefault(key, []).append(layer)
        traits[key] = (packing, rope, module)
    if not members:
        raise Unsupported(Reason.UNKNOWN_LAYOUT, "the model has no attention layer with a KV cache")
    return [_group(members[key], *traits[key]) for key in members]


def packing_of(name: str, layer: Any) -> Packing:
    """How this layer's pages are packed.

    Raises:
        Unsupported: unknown backend, shape or quantisation.
    """
    cache = layer.kv_cache
    head_dim = int(layer.head_size)
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise Unsupported(Reason.UNKNOWN_BACKEND, f"{name} ({type(layer.impl).__name__})")
    quantised = layer.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32")
    if cache.ndim != 4 or cache.shape[-1] != 2 * head_dim or layer.head_size_v != head_dim:
        reason = Reason.KV_QUANTISED if quantised else Reason.UNKNOWN_LAYOUT
        raise Unsupported(
            reason, f"{name}: cache of shape {tuple(cache.shape)}, head size {head_dim}"
        )
    backend = layer.attn_backend.get_name()
    if backend == PACKING_BACKEND:
        isa = cpu_isa(layer)
        if isa not in CPU_PACKING:
            raise Unsupported(Reason.UNKNOWN_BACKEND, f"{name}: CPU pages packed for '{isa}'")
        if quantised or cache.dtype not in PLAIN_DTYPES:
            raise Unsupported(Reason.KV_QUANTISED, f"{name}: {layer.kv_cache_dtype} on CPU")
        if not cache.is_contiguous():
            raise Unsupported(Reason.UNKNOWN_LAYOUT, f"{name}: CPU pages are not contiguous")
        return CPU_PACKING[isa]
    if backend not in STRIDED_BACKENDS:
        raise Unsupported(Reason.UNKNOWN_BACKEND, f"{name}: attention backend {backend}")
    if quantised and layer.kv_cache_dtype not in FP8_DTYPES:
        raise Unsupported(Reason.KV_QUANTISED, f"{name}: --kv-cache-dtype {layer.kv_cache_dtype}")
    if quantised and not layer._k_scale.numel() == layer._v_scale.numel() == 1:
        raise Unsupported(Reason.KV_QUANTISED, f"{name}: a scale for each head")
    return Packing.STRIDED


def _group(layers: list[Any], packing: Packing, rope: Rope, rotary: Any) -> LayerGroup:
    first = layers[0]
    fp8 = FP8_DTYPES.get(first.kv_cache_dtype)
    caches = [layer.kv_cache.view(fp8) if fp8 else layer.kv_cache for layer in layers]
    pages = PageGroup(
        layers=tuple(caches),
        packing=packing,
        head_dim=int(first.head_size),
        rotary_dim=rope.rotary_dim,
        interleaved=rope.interleaved,
        k_scales=tuple(float(layer._k_scale) for layer in layers) if fp8 else None,
        v_scales=tuple(float(layer._v_scale) for layer in layers) if fp8 else None,
    )
    return LayerGroup(tuple(layers), pages, rope, rotary)
