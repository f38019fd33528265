# SPDX-License-Identifier: Apache-2.0
"""Corrected load on the CPU: same signature and contract as ``reference.load_corrected``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kvcomm_vllm.kernels import reference
from kvcomm_vllm.kernels.contract import (
    check_deviation,
    check_group,
    check_rotation,
    check_slots,
)
from kvcomm_vllm.kernels.cpu import load, tables
from kvcomm_vllm.kernels.cpu.load import KINDS
from kvcomm_vllm.kernels.cpu.runs import Cut, Ints, Tokens, split
from kvcomm_vllm.kernels.cpu.tile_job import TileJob
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

# With codes: factors of so many layers and turns of so many pages share a cache.
_LAYERS_PER_ITEM, _PAGES_PER_ITEM = 2, 8


def supports(group: PageGroup) -> bool:
    """True if compiled kernels serve this group; the others work too, only slower."""
    whole_lanes = group.packing is Packing.VEC and group.head_dim % 16 == 0
    return whole_lanes and load.supports(group)


def warm_up(group: PageGroup, deviation: Deviation) -> None:
    """Compile what ``load_corrected`` needs for this group and this kind of deviation (seconds)."""
    load.warm_up(group)
    if not supports(group):
        return
    if isinstance(deviation, MeanMap) and deviation.code is not None:
        _coded_kernels(group, deviation.rank, deviation.code.dtype)
        return
    _finish_kernel(group, deviation)


def load_corrected(
    group: PageGroup,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    undo: Rotation,
    redo: Rotation,
    deviation: Deviation,
) -> None:
    """``K[dst] = redo * (undo * K[src] + dK)``, ``V[dst] = V[src] + dV``; rounded once.

    Args:
        src_slots, dst_slots: int64 ``[tokens]``; a token with a negative slot is skipped.
        undo, redo: fp32 ``[tokens, rotary_dim / 2]``.
        deviation: see ``deviation.py``; its first ``skip_layers`` layers are only re-rotated.

    Raises:
        ContractError: slots outside the cache, or a source that is another token's destination.
    """
    if not supports(group):
        reference.load_corrected(group, src_slots, dst_slots, undo, redo, deviation)
        return
    check_group(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, undo, len(src_slots))
    check_rotation(group, redo, len(src_slots))
    check_deviation(group, deviation, len(src_slots))
    skip = deviation.skip_layers
    tokens = split(src_slots, dst_slots, group.tokens_per_page)
    if len(tokens.index) == 0:
        return
    tiled = tables.vec_tiles(group, tokens)
    if skip:
        plain = dataclasses.replace(group, layers=group.layers[:skip])
        load.move(plain, tokens, undo.then(redo), tiled)
    if skip < len(group.layers):
        group = dataclasses.replace(group, layers=group.layers[skip:])
        for entry, part in _by_entry(tokens, deviation):
            cut = tiled if part is tokens else tables.vec_tiles(group, part)
            _Correction(group, part, cut, undo, redo).apply(deviation, entry)


def _by_entry(tokens: Tokens, deviation: Deviation) -> Iterator[tuple[int, Tokens]]:
    """Tokens of each entry, negative for those without a code: a kernel works with one factor."""
    if isinstance(deviation, AnchorSum) or deviation.entry is None:
        yield -1, tokens
        return
    entry = deviation.entry.numpy()[tokens.index]
    first = int(entry[0])
    if (entry == first).all():
        yield first, tokens
        return
    for number in np.unique(entry):
        mine = entry == number
        columns = (tokens.src_page, tokens.src_at, tokens.dst_page, tokens.dst_at, tokens.index)
        yield int(number), Tokens(*(column[mine] for column in columns))


def _finish_kernel(group: PageGroup, deviation: Deviation) -> Any:
    from kvcomm_vllm.kernels.cpu.correct_kernels import finish_kernel

    arena_kind = KINDS[deviation.dk.dtype] if isinstance(deviation, AnchorSum) else None
    return finish_kernel(KINDS[group.layers[0].dtype], arena_kind)


def _padded(rank: int) -> int:
    return -(-rank // 16) * 16


def _coded_kernels(group: PageGroup, rank: int, code: torch.dtype) -> tuple[Any, Any]:
    """The kernel, and the one that packs its factors where it needs that."""
    from kvcomm_vllm.kernels.cpu.coded import coded_kernel, pack_kernel, paired

    kind, rank = KINDS[group.layers[0].dtype], _padded(rank)
    pack = pack_kernel(group.head_dim, rank) if paired(kind) else None
    return coded_kernel(kind, KINDS[code], group.head_dim, rank), pack


class _Correction(TileJob):
    """One call."""

    def __init__(
        self,
        group: PageGroup,
        tokens: Tokens,
        tiled: tuple[Cut, Ints],
        undo: Rotation,
        redo: Rotation,
    ) -> None:
        super().__init__(group, tokens, tiled, undo)
        self.job |= {"redo": self.turns(redo), "stream": tables.all_aligned(group)}

    def apply(self, deviation: Deviation, entry: int) -> None:
        """``entry``: whose codes these tokens have; negative = none."""
        if isinstance(deviation, AnchorSum):
            self._finish(deviation, self._anchors(deviation))
        elif entry < 0 or deviation.code is None or deviation.up is None:
            self._finish(deviation, self._means(deviation))
        else:
            self._coded(deviation, deviation.code, deviation.up[entry])

    def _finish(self, deviation: Deviation, fields: dict[str, int]) -> None:
        from kvcomm_vllm.kernels.cpu.correct_kernels import JOB
        from kvcomm_vllm.kernels.cpu.threads import run, share

        groups, layers = len(self.bounds) - 1, self.job["layers"]
        step = share(groups, layers)
        fields = dict.fromkeys((JOB.names or ())[2:], 0) | self.job | fields
        fields |= {"groups": groups, "layer_step": step, "block_bounds": self.keep(self.bounds)}
        kernel = _finish_kernel(self.group, deviation)
        run(kernel, JOB, groups * -(-layers // step), work_bytes=self.work_bytes, **fields)

    def _anchors(self, deviation: AnchorSum) -> dict[str, int]:
        dk, size = deviation.dk, deviation.dk.itemsize
        return {
            "dk": dk.data_ptr(),
            "dv": deviation.dv.data_ptr(),
            "row_stride": dk.stride(0) * size,
            "layer_stride": dk.stride(1) * size,
            "head_stride": dk.stride(2) * size,
            "anchor_rows": self.keep(deviation.rows.numpy()[:, self.index]),
            "wk": self.keep(deviation.wk.numpy()[:, self.index]),
            "wv": self.keep(deviation.wv.numpy()[:, self.index]),
            "anchors": len(deviation.rows),
        }

    def _means(self, deviation: MeanMap) -> dict[str, int]:
        rows, k, v = deviation.row.numpy()[self.index], deviation.mean_k, deviation.mean_v
        if not all(mean.dtype is torch.float32 and mean.is_contiguous() for mean in (k, v)):
            used, rows = np.unique(rows, return_inverse=True)  # the arena may be large
            k, v = (mean[torch.from_numpy(used)].float() for mean in (k, v))
        return {
            "mean_k": self.keep(k.numpy()),
            "mean_v": self.keep(v.numpy()),
            "mean_layers": k.shape[1],
            "rows": self.keep(rows),
        }

    def _coded(self, deviation: MeanMap, code: torch.Tensor, up: torch.Tensor) -> None:
        from kvcomm_vllm.kernels.cpu.coded import JOB
        from kvcomm_vllm.kernels.cpu.threads import run

        kernel, pack = _coded_kernels(self.group, deviation.rank, code.dtype)
        up = up.float()
        wider = _padded(deviation.rank) - deviation.rank
        if wider:
            code = torch.nn.functional.pad(code, (0, wider))
            up = torch.nn.functional.pad(up, (0, 0, 0, wider))
        groups, layers = len(self.bounds) - 1, len(self.group.layers)
        parts = -(-layers // _LAYERS_PER_ITEM)
        pages = max(1, min(_PAGES_PER_ITEM, groups * parts // (4 * torch.get_num_threads())))
        self.kept.append(code)
        self.job |= self._means(deviation) | {
            "code": code.data_ptr(),
            "code_rows": self.keep(self.index),
            "up": self.keep(up.numpy()),
            "groups": groups,
            "group_step": pages,
            "layer_step": _LAYERS_PER_ITEM,
            "block_bounds": self.keep(self.bounds),
            "packed": self.keep(torch.empty(up.numel() // 2).numpy()) if pack else 0,
            "most_tiles": int(np.diff(self.bounds).max()),
        }
        if pack is not None:
            run(pack, JOB, layers * self.group.kv_heads, work_bytes=2 * up.nbytes, **self.job)
        run(kernel, JOB, parts * -(-groups // pages), work_bytes=self.work_bytes, **self.job)
