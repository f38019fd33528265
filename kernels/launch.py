# SPDX-License-Identifier: Apache-2.0
"""From a page group to kernel arguments: address tables, fp8 kinds, tile sizes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels.contract import check_group, require
from kvcomm_vllm.kernels.pages import ROWS, Packing, PageGroup

ELEMENTS = {
    torch.float16: (tl.float16, 0),
    torch.bfloat16: (tl.bfloat16, 0),
    torch.float32: (tl.float32, 0),
    torch.float8_e4m3fn: (tl.uint8, 4),
    torch.float8_e5m2: (tl.uint8, 5),
}

# Bytes of the cache in a program's block of K or of V, whichever is wider: 32 for each of 128
# threads, so that each half of a key as wide as V still gives every thread a 16-byte access.
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class GroupArguments:
    """What every kernel needs to address one page group on its device."""

    pointers: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    strides: tuple[int, int, int]
    constants: dict[str, Any]


_cache: weakref.WeakKeyDictionary[PageGroup, GroupArguments] = weakref.WeakKeyDictionary()


def next_power(n: int) -> int:
    """Smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def shape_constants(
    *,
    head_dim: int,
    value_dim: int,
    rotary_dim: int,
    interleaved: bool,
    heads: int,
    page: int,
    dtype: torch.dtype,
    latent: bool = False,
) -> dict[str, Any]:
    """Compile-time constants of a page group's shape."""
    element, fp8 = ELEMENTS[dtype]
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    return {
        "H": heads,
        "PAGE": page,
        "K_AT": value_dim if latent else 0,
        "V_AT": 0 if latent else head_dim,
        "V": value_dim,
        "V_P": next_power(value_dim),
        "HALF": half,
        "HALF_P": next_power(half),
        "REST": rest,
        "REST_P": next_power(rest),
        "INTERLEAVED": interleaved,
        "ELEMENT": element,
        "FP8": fp8,
    }


def tokens_per_block(channels: int, itemsize: int) -> int:
    """Tokens of one program's block, a power of two; fp32 takes as many as 16-bit types.

    Args:
        channels: of K or of V, whichever has more.
    """
    return max(1, BLOCK_BYTES // (min(itemsize, 2) * next_power(channels)))


def block_tokens_of(group: PageGroup) -> int:
    """The same for a group."""
    return tokens_per_block(group.widest, group.layers[0].dtype.itemsize)


def group_arguments(group: PageGroup) -> GroupArguments:
    """Tables and constants of a group, built once: its caches live as long as the engine."""
    found = _cache.get(group)
    if found is not None:
        return found
    check_group(group)
    require(
        group.packing in ROWS,
        f"Triton kernels need strided pages, not {group.packing.value}: "
        "the packed CPU caches are served by the CPU path",
    )
    first = group.layers[0]
    device, count = first.device, len(group.layers)
    addresses = [layer.data_ptr() for layer in group.layers]
    require(all(address % 16 == 0 for address in addresses), "layer caches must be 16-byte aligned")

    def scales(values: tuple[float, ...] | None) -> torch.Tensor:
        return torch.tensor(values or (1.0,) * count, dtype=torch.float32, device=device)

    page, head, token, _ = first.stride()
    made = GroupArguments(
        pointers=torch.tensor(addresses, dtype=torch.int64, device=device),
        k_scales=scales(group.k_scales),
        v_scales=scales(group.v_scales),
        strides=(page, head, token),
        constants=shape_constants(
            head_dim=group.head_dim,
            value_dim=group.value_dim,
            rotary_dim=group.rotary_dim,
            interleaved=group.interleaved,
            heads=group.kv_heads,
            page=group.tokens_per_page,
            dtype=first.dtype,
            latent=group.packing is Packing.LATENT,
        ),
    )
    _cache[group] = made
    return made


def layers_per_program(heads: int, layers: int) -> int:
    """Layers one program walks through: rotation factors are read once for that many layers' heads.

    At 16 (layer, head) rows per program the factors are under 7% of a load's traffic.
    """
    return max(1, min(layers, cdiv(16, heads)))


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return triton.cdiv(a, b)  # type: ignore[no-any-return]
