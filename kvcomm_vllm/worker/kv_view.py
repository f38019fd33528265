# SPDX-License-Identifier: Apache-2.0
"""The KV view: which layers' pages can be read and written as token slots, and how.

vLLM 0.28+ gives every attention layer a logical ``[pages, kv_heads, tokens, 2 * head_dim]`` cache.
Which backend uses it says what is in there, not the device: K and V as the strides tell, or, with
vLLM's CPU attention, packed inside each page for the instruction set in use. MLA stores one row for
all heads instead: a latent from which keys and values are made, and a key that is rotated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvcomm_vllm.compat.layers import (
    PACKING_BACKEND,
    cache_of,
    cpu_isa,
    is_drafters,
    latent_dim,
    picks_tokens,
)
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
# Rows of MLA, written by ``do_kv_cache_update``; their formats of bytes differ in width.
LATENT_BACKENDS = {
    "AMX_MLA",
    "CPU_MLA",
    "CUTLASS_MLA",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN_MLA",
    "TOKENSPEED_MLA",
    "TRITON_MLA",
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
    module), same block tables (``number``: vLLM's KV cache group).
    """

    layers: tuple[Any, ...]
    pages: PageGroup
    rope: Rope
    rotary: Any | None
    number: int = 0


def part_layers(
    layers: dict[str, Any], drafter: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's own layers, and those that the drafter is known to have by these names.

    Raises:
        Unsupported: vLLM says of another layer that a drafter owns it.
    """
    own = {name: layer for name, layer in layers.items() if name not in drafter}
    for name, layer in own.items():
        if is_drafters(layer):
            raise Unsupported(Reason.SPEC_DECODE, name)
    return own, {name: layer for name, layer in layers.items() if name in drafter}


def build_groups(
    layers: dict[str, Any],
    model: torch.nn.Module,
    unrotated: Collection[str] = (),
    positions: int | None = None,
    numbers: Mapping[str, int] | None = None,
) -> list[LayerGroup]:
    """Groups of all attention layers that own a cache, in model order.

    Args:
        unrotated: names of layers that are known not to use the rotary embedding they have.
        positions: that tokens can have.
        numbers: of vLLM's KV cache groups, by layer; None where there is one.

    Raises:
        Unsupported: if any of them is not understood; reuse is then off for all.
    """
    ropes: dict[Any, Rope] = {}
    members: dict[tuple[Any, ...], list[Any]] = {}
    traits: dict[tuple[Any, ...], tuple[Packing, Rope, Any, int]] = {}
    for name, layer in layers.items():
        if not hasattr(layer, "kv_cache") or getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        module = None if name in unrotated else rope_module(model, layer)
        packing = packing_of(name, layer)
        cache = cache_of(layer)
        if module not in ropes:
            ropes[module] = no_rope(cache.device) if module is None else rope_of(module, positions)
        rope = ropes[module]
        number = 0 if numbers is None else numbers[name]
        key = (
            *(number, packing, latent_dim(layer), id(rope)),
            *(cache.shape, cache.stride(), cache.dtype, layer.kv_cache_dtype),
        )
        members.setdefault(key, []).append(layer)
        traits[key] = (packing, rope, module, number)
    if not members:
        raise Unsupported(Reason.UNKNOWN_LAYOUT, "the model has no attention layer with a KV cache")
    return [_group(members[key], *traits[key]) for key in members]


def packing_of(name: str, layer: Any) -> Packing:
    """How this layer's pages are packed.

    Raises:
        Unsupported: unknown backend, shape or quantisation.
    """
    cache, latent = cache_of(layer), latent_dim(layer)
    impl = getattr(layer, "impl", None)
    if picks_tokens(layer):
        raise Unsupported(Reason.SPARSE_ATTENTION, name)
    if not hasattr(impl, "do_kv_cache_update"):
        raise Unsupported(Reason.UNKNOWN_BACKEND, f"{name} ({type(impl).__name__})")
    quantised = layer.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32")
    if not _fits(layer, cache):
        reason = Reason.KV_QUANTISED if quantised else Reason.UNKNOWN_LAYOUT
        raise Unsupported(
            reason, f"{name}: cache of shape {tuple(cache.shape)}, head size {layer.head_size}"
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
    if backend not in (LATENT_BACKENDS if latent else STRIDED_BACKENDS):
        raise Unsupported(Reason.UNKNOWN_BACKEND, f"{name}: attention backend {backend}")
    if quantised and layer.kv_cache_dtype not in FP8_DTYPES:
        raise Unsupported(Reason.KV_QUANTISED, f"{name}: --kv-cache-dtype {layer.kv_cache_dtype}")
    if quantised and not layer._k_scale.numel() == layer._v_scale.numel() == 1:
        raise Unsupported(Reason.KV_QUANTISED, f"{name}: a scale for each head")
    return Packing.LATENT if latent else Packing.STRIDED


def _fits(layer: Any, cache: torch.Tensor) -> bool:
    """Whether a row of the cache is as wide as what the layer stores of a token in a head."""
    size, latent = int(layer.head_size), latent_dim(layer)
    if cache.ndim != 4:
        return False
    if latent:
        return cache.shape[1] == 1 and cache.shape[3] == size > latent
    return cache.shape[3] == 2 * size and layer.head_size_v == size


def _group(layers: list[Any], packing: Packing, rope: Rope, rotary: Any, number: int) -> LayerGroup:
    first, latent = layers[0], latent_dim(layers[0])
    fp8 = FP8_DTYPES.get(first.kv_cache_dtype)
    caches = [cache_of(layer).view(fp8) if fp8 else cache_of(layer) for layer in layers]
    of_values = "_k_scale" if latent else "_v_scale"  # a row has one
    pages = PageGroup(
        layers=tuple(caches),
        packing=packing,
        head_dim=int(first.head_size) - latent,
        rotary_dim=rope.rotary_dim,
        interleaved=rope.interleaved,
        k_scales=tuple(float(layer._k_scale) for layer in layers) if fp8 else None,
        v_scales=tuple(float(getattr(layer, of_values)) for layer in layers) if fp8 else None,
    )
    return LayerGroup(tuple(layers), pages, rope, rotary, number)


def layers_of(groups: list[LayerGroup]) -> Iterator[tuple[PageGroup, int]]:
    """Each layer as the pages of its group and its index in it."""
    return ((group.pages, index) for group in groups for index in range(len(group.layers)))
