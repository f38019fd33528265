# SPDX-License-Identifier: Apache-2.0
"""Corrected load on the CPU: same signature and contract as ``reference.load_corrected``.

The ridge map is a matrix product per layer and head and goes to torch (oneDNN), in chunks of tokens
whose input and output stay in the last-level cache; everything around it is compiled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from kvcomm_vllm.kernels import cpu_load, cpu_tables, reference
from kvcomm_vllm.kernels.contract import (
    check_deviation,
    check_group,
    check_rotation,
    check_slots,
)
from kvcomm_vllm.kernels.cpu_load import KINDS
from kvcomm_vllm.kernels.cpu_runs import Tokens, split
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

_CHUNK_BYTES = 4 << 20  # input of the map per chunk; its output is as large


def supports(group: PageGroup) -> bool:
    """True if compiled kernels serve this group; the others work too, only slower."""
    whole_lanes = group.packing is Packing.VEC and group.head_dim % 16 == 0
    return whole_lanes and cpu_load.supports(group)


def map_dtype(group: PageGroup) -> torch.dtype:
    """In what the map is multiplied (sums are fp32): bf16 for a bf16 cache if the CPU has it.

    That rounds a deviation to about 2^-9 of itself; storing the result rounds all of K and V so.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and group.layers[0].dtype is torch.bfloat16 else torch.float32


def warm_up(group: PageGroup, deviation: Deviation) -> None:
    """Compile what ``load_corrected`` needs for this group and this kind of deviation (seconds)."""
    cpu_load.warm_up(group)
    if supports(group):
        _finish_kernel(group, deviation)
        if isinstance(deviation, MeanMap) and deviation.map is not None:
            _input_kernel(group)


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
    if skip:
        plain = dataclasses.replace(group, layers=group.layers[:skip])
        cpu_load.move(plain, tokens, undo.then(redo))
    if skip < len(group.layers):
        group = dataclasses.replace(group, layers=group.layers[skip:])
        _Correction(group, tokens, undo, redo).apply(deviation)


def _finish_kernel(group: PageGroup, deviation: Deviation) -> Any:
    from kvcomm_vllm.kernels.cpu_correct_kernels import finish_kernel

    kind = KINDS[group.layers[0].dtype]
    if isinstance(deviation, AnchorSum):
        return finish_kernel(kind, ("anchors", KINDS[deviation.dk.dtype], deviation.per_channel))
    return finish_kernel(kind, ("mean", KINDS[map_dtype(group)] if _mapped(deviation) else None))


def _mapped(deviation: MeanMap) -> bool:
    return deviation.map is not None


def _input_kernel(group: PageGroup) -> Any:
    from kvcomm_vllm.kernels.cpu_correct_kernels import input_kernel

    return input_kernel(KINDS[group.layers[0].dtype], KINDS[map_dtype(group)])


class _Correction:
    """One call: the job of its kernels, and the memory that job points to."""

    def __init__(
        self,
        group: PageGroup,
        tokens: Tokens,
        undo: Rotation,
        redo: Rotation,
    ) -> None:
        from kvcomm_vllm.kernels.cpu_correct_kernels import JOB

        self.group, self.kept = group, list[Any]()
        cut, blocks = cpu_tables.vec_tiles(group, tokens)
        self.index = tokens.index
        page = group.layers[0][0]
        self.token_bytes = 2 * len(group.layers) * page.nbytes // group.tokens_per_page
        self.bounds, self.first = cut.bounds, np.append(cut.first, len(tokens.index))
        self.job = dict.fromkeys((JOB.names or ())[2:], 0) | cpu_tables.head_rows(group)
        del self.job["rows"]  # every row is a channel here
        self.job |= {
            "bases": self.keep(np.array([layer.data_ptr() for layer in group.layers])),
            "layers": len(group.layers),
            "head_dim": group.head_dim,
            "stream": cpu_tables.all_aligned(group),
            "blocks": self.keep(blocks),
            "block_count": len(blocks),
            "first_token": self.keep(self.first),
            "token_values": self.keep(cpu_tables.vec_value_places(group, tokens)),
            "tokens": len(tokens.index),
            "undo": self.keep(cpu_tables.vec_factors(tokens, cut, undo)),
            "redo": self.keep(cpu_tables.vec_factors(tokens, cut, redo)),
        }

    def keep(self, memory: Any) -> int:
        """Address of the array or tensor, made contiguous, which lives as long as this call."""
        array = np.ascontiguousarray(memory)
        self.kept.append(array)
        return int(array.ctypes.data)

    def apply(self, deviation: Deviation) -> None:
        finish = _finish_kernel(self.group, deviation)
        if isinstance(deviation, AnchorSum):
            self.job |= self._anchors(deviation)
        else:
            self.job |= self._means(deviation)
            if deviation.map is not None:
                self._map(deviation.map, deviation.x_mean, finish)
                return
        self._launch(finish, 0, len(self.bounds) - 1)

    def _launch(self, kernel: Any, begin: int, end: int) -> None:
        """Run over the groups ``begin..end`` (destination pages) and all layers."""
        from kvcomm_vllm.kernels.cpu_correct_kernels import JOB
        from kvcomm_vllm.kernels.cpu_threads import run, share

        groups, layers = end - begin, self.job["layers"]
        step = share(groups, layers)
        self.job |= {
            "groups": groups,
            "layer_step": step,
            "block_bounds": self.bounds.ctypes.data + begin * self.bounds.itemsize,
        }
        tokens = int(self.first[self.bounds[end]] - self.first[self.bounds[begin]])
        work_bytes = tokens * self.token_bytes
        run(kernel, JOB, groups * -(-layers // step), work_bytes=work_bytes, **self.job)

    def _anchors(self, deviation: AnchorSum) -> dict[str, int]:
        dk, size = deviation.dk, deviation.dk.itemsize
        weights = [deviation.wk.float().numpy(), deviation.wv.float().numpy()]
        if not deviation.per_channel:
            weights = [weight[:, self.index] for weight in weights]
        return {
            "dk": dk.data_ptr(),
            "dv": deviation.dv.data_ptr(),
            "row_stride": dk.stride(0) * size,
            "layer_stride": dk.stride(1) * size,
            "head_stride": dk.stride(2) * size,
            "anchor_rows": self.keep(deviation.rows.numpy()[:, self.index]),
            "wk": self.keep(weights[0]),
            "wv": self.keep(weights[1]),
            "anchors": len(deviation.rows),
        }

    def _means(self, deviation: MeanMap) -> dict[str, int]:
        rows = deviation.mean_k.shape[1]
        index = deviation.index.numpy()[self.index].astype(np.int64).clip(0, rows - 1)
        return {
            "mean_k": self.keep(deviation.mean_k.float().numpy()),
            "mean_v": self.keep(deviation.mean_v.float().numpy()),
            "mean_rows": rows,
            "index": self.keep(index),
        }

    def _map(self, weights: torch.Tensor, x_mean: torch.Tensor | None, finish: Any) -> None:
        group, dtype, width = self.group, map_dtype(self.group), 2 * self.group.head_dim
        matrices = len(group.layers) * group.kv_heads
        weights = weights.reshape(matrices, width, width).to(dtype)
        centre = torch.zeros(matrices, width) if x_mean is None else x_mean.float()
        self.job["x_mean"] = self.keep(centre.numpy())
        inputs = _input_kernel(group)
        limit = max(1, _CHUNK_BYTES // (matrices * width * dtype.itemsize))
        starts = self.first[self.bounds]  # first token of every group
        largest = min(limit + group.tokens_per_page, int(starts[-1]))
        space = torch.empty(2, matrices * largest * width, dtype=dtype)
        begin = 0
        while begin < len(starts) - 1:
            end = int(np.searchsorted(starts, starts[begin] + limit, side="right")) - 1
            end = max(end, begin + 1)
            count = int(starts[end] - starts[begin])
            size = matrices * count * width
            x, y = (part[:size].view(matrices, count, width) for part in space)
            self.job |= {"mapped_start": int(starts[begin]), "mapped_count": count}
            self.job["mapped"] = x.data_ptr()
            self._launch(inputs, begin, end)
            torch.bmm(x, weights, out=y)
            self.job["mapped"] = y.data_ptr()
            self._launch(finish, begin, end)
            begin = end
