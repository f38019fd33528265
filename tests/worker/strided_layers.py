# SPDX-License-Identifier: Apache-2.0
"""Attention layers with pages as on a GPU, in this machine's memory: K and V of a token side by
side, in any order of heads and tokens, written as vLLM's kernels write them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from strided_writes import write_pages

from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.worker.kv_view import FP8_DTYPES, LayerGroup
from kvcomm_vllm.worker.rope import no_rope, rope_of

Write = Callable[..., None]


def layer(
    name: str,
    cache: torch.Tensor,
    kv_dtype: str,
    scales: tuple[float, float] = (1.0, 1.0),
    write: Write = write_pages,
) -> Any:
    """A layer over ``cache`` ``[pages, heads, tokens, 2 * head_size]``."""
    return SimpleNamespace(
        layer_name=name,
        kv_cache=cache,
        kv_cache_dtype=kv_dtype,
        head_size=cache.shape[-1] // 2,
        impl=SimpleNamespace(do_kv_cache_update=write),
        _k_scale=torch.tensor(scales[0]),
        _v_scale=torch.tensor(scales[1]),
    )


def group_of(layers: list[Any], rotary: Any | None = None) -> LayerGroup:
    """The layers, of one kind, as a group."""
    first = layers[0]
    fp8 = FP8_DTYPES.get(first.kv_cache_dtype)
    rope = no_rope(first.kv_cache.device) if rotary is None else rope_of(rotary)
    pages = PageGroup(
        layers=tuple(each.kv_cache.view(fp8) if fp8 else each.kv_cache for each in layers),
        packing=Packing.STRIDED,
        head_dim=first.head_size,
        rotary_dim=rope.rotary_dim,
        interleaved=rope.interleaved,
        k_scales=tuple(float(each._k_scale) for each in layers) if fp8 else None,
        v_scales=tuple(float(each._v_scale) for each in layers) if fp8 else None,
    )
    return LayerGroup(tuple(layers), pages, rope, rotary)
