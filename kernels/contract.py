# SPDX-License-Identifier: Apache-2.0
"""The contract of every kernel, checked before anything is read or written.

Shapes, dtypes and strides are always checked (no device work). The values of slots are checked when
they lie in host memory; on a device that would cost a synchronisation, so the caller checks the
lists it built them from with :func:`check_slots`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvcomm_vllm.kernels.deviation import AnchorSum, CodeMaps, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import ROWS, Packing, PageGroup, Rotation

Ints = npt.NDArray[np.int64]

CACHE_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class ContractError(ValueError):
    """A kernel was called with arguments it is not defined for; nothing was read or written."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ContractError` with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)


def check_group(group: PageGroup) -> None:
    """All layers of one shape, dtype, stride and device, and a packing that fits the shape."""
    require(len(group.layers) > 0, "a page group needs at least one layer")
    first, dim = group.layers[0], group.head_dim
    if group.packing is Packing.LATENT:
        require(
            first.ndim == 4 and first.shape[1] == 1 and first.shape[3] > dim > 0,
            f"a latent layer's cache is [pages, 1, tokens, latent + head_dim={dim}], "
            f"got {list(first.shape)}",
        )
    else:
        require(
            first.ndim == 4 and first.shape[3] == 2 * dim,
            f"a layer's cache is [pages, heads, tokens, 2 * head_dim={2 * dim}], "
            f"got {list(first.shape)}",
        )
    require(
        first.dtype in CACHE_DTYPES,
        f"cache dtype {first.dtype} is not one of fp16, bf16, fp32, fp8 e4m3, fp8 e5m2; "
        "view an fp8 cache that vLLM keeps as uint8 with its float8 dtype first",
    )
    for layer in group.layers:
        require(
            (layer.shape, layer.dtype, layer.stride(), layer.device)
            == (first.shape, first.dtype, first.stride(), first.device),
            "layers of one group share shape, dtype, strides and device; split the group",
        )
    require(
        0 <= group.rotary_dim <= dim and group.rotary_dim % 2 == 0,
        f"rotary_dim {group.rotary_dim} is not an even number in 0..{dim}",
    )
    for scales in (group.k_scales, group.v_scales):
        require(
            scales is None or len(scales) == len(group.layers),
            "k_scales and v_scales hold one factor per layer",
        )
    if group.packing in ROWS:
        require(
            first.stride(3) == 1, f"channels of a {group.packing.value} cache must be contiguous"
        )
        return
    require(first.is_contiguous(), f"a cache packed as {group.packing.value} must be contiguous")
    if group.packing is Packing.AMX:
        require(
            dim % 16 == 0 and group.tokens_per_page % 16 == 0,
            "amx packing needs head_dim and tokens per page in multiples of 16",
        )


def check_slots(group: PageGroup, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
    """Same length, int64; in host memory also: inside the cache, and safe to run in any order."""
    for name, slots in (("src_slots", src_slots), ("dst_slots", dst_slots)):
        require(
            slots.ndim == 1 and slots.dtype == torch.int64,
            f"{name} is int64 [tokens], got {slots.dtype} {list(slots.shape)}",
        )
    require(
        len(src_slots) == len(dst_slots),
        f"{len(src_slots)} source slots for {len(dst_slots)} destination slots",
    )
    if not src_slots.device.type == dst_slots.device.type == "cpu":
        return
    _check_moves(src_slots.numpy(), dst_slots.numpy(), len(group.layers[0]) * group.tokens_per_page)


def check_read(group: PageGroup, slots: torch.Tensor) -> None:
    """Slots that are only read: int64 ``[tokens]``, any of them several times; in host memory also:
    inside the cache.
    """
    require(
        slots.ndim == 1 and slots.dtype == torch.int64,
        f"slots are int64 [tokens], got {slots.dtype} {list(slots.shape)}",
    )
    if slots.device.type == "cpu" and len(slots):
        top, limit = int(slots.max()), len(group.layers[0]) * group.tokens_per_page
        require(top < limit, f"slot {top} is outside a cache of {limit} slots")


def _check_moves(src: Ints, dst: Ints, limit: int) -> None:
    """Slots in 0..limit, each destination once, no source that another token overwrites."""
    if len(src) == 0:
        return
    # numpy, since torch would wake its threads; a table by slot, since sorting takes far longer
    if min(src.min(), dst.min()) < 0:
        keep = (src >= 0) & (dst >= 0)
        src, dst = src[keep], dst[keep]
    top = max(src.max(initial=-1), dst.max(initial=-1))
    require(top < limit, f"slot {top} is outside a cache of {limit} slots")
    number = np.arange(1, len(dst) + 1, dtype=np.int32)
    written_by = np.zeros(top + 1, dtype=np.int32)  # 0 = nobody; only the pages asked for exist
    written_by[dst] = number
    require(
        bool((written_by[dst] == number).all()),
        "a destination slot occurs twice; which token wins would be undefined",
    )
    writer = written_by[src]
    require(
        bool(((writer == 0) | (writer == number)).all()),
        "a source slot is also another token's destination; tokens are moved in parallel, "
        "so it could be read before or after it is overwritten",
    )


def check_rotation(group: PageGroup, turn: Rotation, tokens: int) -> None:
    """cos and sin are fp32 ``[tokens, rotary_dim / 2]``, contiguous, on the cache's device."""
    shape = (tokens, group.rotary_dim // 2)
    for name, table in (("cos", turn.cos), ("sin", turn.sin)):
        require(
            tuple(table.shape) == shape and table.dtype == torch.float32,
            f"rotation {name} is fp32 {list(shape)}, got {table.dtype} {list(table.shape)}",
        )
        require(
            table.device == group.layers[0].device,
            f"rotation {name} is on {table.device}, the cache on {group.layers[0].device}",
        )
        require(table.is_contiguous() or tokens == 0, f"rotation {name} must be contiguous")


def check_arena(
    group: PageGroup, name: str, k: torch.Tensor, v: torch.Tensor, skip_layers: int
) -> None:
    """K and V of an arena: ``[rows, layers - skip_layers, heads, head_dim]``, V with value_dim."""
    require(
        0 <= skip_layers <= len(group.layers),
        f"skip_layers {skip_layers} is not in 0..{len(group.layers)}",
    )
    heads = (len(group.layers) - skip_layers, group.kv_heads)
    for what, part, dim in (("K", k, group.head_dim), ("V", v, group.value_dim)):
        require(
            tuple(part.shape[1:]) == (*heads, dim) and len(part) == len(k),
            f"{name} is [rows, layers, heads, channels] = [rows, {heads[0]}, {heads[1]}, {dim}] "
            f"for {what}, got {list(part.shape)}",
        )
    require(
        k.dtype == v.dtype and k.dtype in CACHE_DTYPES[:3],
        f"{name} has one dtype of fp16, bf16, fp32 for K and V, got {k.dtype} and {v.dtype}",
    )
    alike = k.stride() == v.stride() or group.head_dim != group.value_dim
    contiguous = all(part.stride(3) == 1 or part.numel() == 0 for part in (k, v))
    require(
        alike and contiguous,
        f"{name}: channels are contiguous, and K and V of one width share strides",
    )
    require(
        k.device == v.device == group.layers[0].device,
        f"{name} is on {k.device}, the cache on {group.layers[0].device}",
    )


def check_rows(name: str, rows: torch.Tensor, tokens: int, arena_rows: int) -> None:
    """int64 ``[anchors, tokens]``; in host memory also: below the arena's end."""
    require(
        rows.ndim == 2 and rows.shape[1] == tokens and rows.dtype == torch.int64,
        f"{name} is int64 [anchors, tokens={tokens}], got {rows.dtype} {list(rows.shape)}",
    )
    if rows.device.type == "cpu" and rows.numel():
        top = int(rows.max())
        require(top < arena_rows, f"{name}: row {top} is outside an arena of {arena_rows} rows")


def check_out(group: PageGroup, k: torch.Tensor, v: torch.Tensor, tokens: int) -> None:
    """Rows for the KV of all layers, one per token."""
    check_arena(group, "out", k, v, 0)
    require(len(k) == tokens, f"{len(k)} output rows for {tokens} slots")


def check_near(
    group: PageGroup, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, tokens: int
) -> None:
    """Arenas of anchors that tokens are compared with, and the row of each."""
    check_arena(group, "anchor arena", k, v, 0)
    check_rows("rows", rows, tokens, len(k))


def check_deviation(group: PageGroup, deviation: Deviation, tokens: int) -> None:
    """All tensors of a deviation fit the group and the tokens."""
    if isinstance(deviation, AnchorSum):
        check_anchor_sum(group, deviation, tokens)
    else:
        check_mean_map(group, deviation, tokens)


def check_anchor_sum(group: PageGroup, deviation: AnchorSum, tokens: int) -> None:
    """Arena, row table and weights fit the group and the tokens."""
    d = deviation
    check_arena(group, "deviation arena", d.dk, d.dv, d.skip_layers)
    check_rows("deviation rows", d.rows, tokens, len(d.dk))
    shape = (len(d.rows), tokens)
    for name, weights in (("wk", d.wk), ("wv", d.wv)):
        require(
            tuple(weights.shape) == shape and weights.dtype == torch.float32,
            f"{name} is fp32 {list(shape)}, got {weights.dtype} {list(weights.shape)}",
        )


def check_mean_map(group: PageGroup, deviation: MeanMap, tokens: int) -> None:
    """Means, codes, their factors and whose they are fit the group and the tokens."""
    d = deviation
    check_arena(group, "mean arena", d.mean_k, d.mean_v, d.skip_layers)
    check_rows("mean rows", d.row[None], tokens, len(d.mean_k))
    if d.row.device.type == "cpu" and tokens:
        require(int(d.row.min()) >= 0, "mean rows: every token has one")
    given = [part is not None for part in (d.code, d.up, d.entry)]
    require(all(given) or not any(given), "code, up and entry are given together")
    if d.code is None or d.up is None or d.entry is None:
        return
    layers, heads = len(group.layers) - d.skip_layers, group.kv_heads
    for name, table, shape in (
        ("code", d.code, (tokens, layers, d.rank)),
        ("up", d.up, (len(d.up), layers, heads, d.rank, group.row_dim)),
    ):
        require(
            tuple(table.shape) == shape
            and table.is_contiguous()
            and table.dtype in CACHE_DTYPES[:3],
            f"{name} is a contiguous float tensor {list(shape)}, "
            f"got {table.dtype} {list(table.shape)}",
        )
        require(
            table.device == group.layers[0].device,
            f"{name} is on {table.device}, the cache on {group.layers[0].device}",
        )
    require(d.rank > 0, "a code has at least one number")
    check_entry(d.entry, tokens, len(d.up))


def check_entry(entry: torch.Tensor, tokens: int, entries: int) -> None:
    """int32 ``[tokens]``; in host memory also: below the number of entries."""
    require(
        entry.shape == (tokens,) and entry.dtype == torch.int32,
        f"entry is int32 [tokens={tokens}], got {entry.dtype} {list(entry.shape)}",
    )
    if entry.device.type == "cpu" and tokens:
        top = int(entry.max())
        require(top < entries, f"entry {top} is none of {entries}")


def check_maps(raw: torch.Tensor, maps: CodeMaps, index: torch.Tensor, entry: torch.Tensor) -> None:
    """Features, the maps of all entries, and tokens' indices fit each other."""
    entries, inputs = maps.offset.shape
    width = inputs + len(maps.decays)
    for name, table, shape in (
        ("raw", raw, (len(index), maps.factor.shape[1])),
        ("factor", maps.factor, (entries, raw.shape[-1])),
        ("offset", maps.offset, (entries, inputs)),
        ("decays", maps.decays, (len(maps.decays),)),
    ):
        require(
            tuple(table.shape) == shape
            and table.dtype == torch.float32
            and table.is_contiguous()
            and table.device == raw.device,
            f"{name} is contiguous fp32 {list(shape)} on {raw.device}, "
            f"got {table.dtype} {list(table.shape)} on {table.device}",
        )
    require(
        maps.down.ndim == 4
        and tuple(maps.down.shape[:2]) == (entries, width)
        and maps.down.is_contiguous()
        and maps.down.dtype in CACHE_DTYPES[:3],
        f"down is a contiguous float tensor [entries={entries}, {width}, layers, rank], "
        f"got {maps.down.dtype} {list(maps.down.shape)}",
    )
    require(
        index.ndim == 1 and index.dtype == torch.int32,
        f"index is int32 [tokens], got {index.dtype} {list(index.shape)}",
    )
    check_entry(entry, len(index), entries)
