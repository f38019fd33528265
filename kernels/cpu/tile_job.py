# SPDX-License-Identifier: Apache-2.0
"""What kernels are told that work on the VEC packing by tiles of 16 tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcomm_vllm.kernels.cpu import tables
from kvcomm_vllm.kernels.cpu.runs import Cut, Ints, Tokens
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


class TileJob:
    """The job of one call, and the memory it points to, which lives as long as this.

    Args:
        tiled: what ``tables.vec_tiles`` found for these tokens, at least one.
        undo: fp32 ``[tokens, rotary_dim / 2]``, in the caller's order.

    Attributes:
        index: the tokens' places in the caller's order.
        bounds: ``[pages + 1]``, tiles of each destination page.
        work_bytes: of the tokens in all layers, read and written.
        job: fields of the kernel's record.
    """

    def __init__(
        self, group: PageGroup, tokens: Tokens, tiled: tuple[Cut, Ints], undo: Rotation
    ) -> None:
        self.group, self.kept = group, list[Any]()
        self.tokens, (self.cut, blocks) = tokens, tiled
        self.index, self.bounds = tokens.index, self.cut.bounds
        page = group.layers[0][0]
        token_bytes = 2 * len(group.layers) * page.nbytes // group.tokens_per_page
        self.work_bytes = len(self.index) * token_bytes
        self.job = dict[str, int]() | tables.head_rows(group)
        del self.job["rows"]  # every row is a channel here
        self.job |= {
            "bases": self.keep(np.array([layer.data_ptr() for layer in group.layers])),
            "layers": len(group.layers),
            "head_dim": group.head_dim,
            "blocks": self.keep(blocks),
            "block_count": len(blocks),
            "first_token": self.keep(np.append(self.cut.first, len(self.index))),
            "token_values": self.keep(tables.vec_value_places(group, tokens)),
            "tokens": len(self.index),
            "undo": self.turns(undo),
        }

    def keep(self, memory: Any) -> int:
        """Address of the array, made contiguous."""
        array = np.ascontiguousarray(memory)
        self.kept.append(array)
        return int(array.ctypes.data)

    def turns(self, rotation: Rotation) -> int:
        """Address of a rotation's factors, tile by tile."""
        return self.keep(tables.vec_factors(self.tokens, self.cut, rotation))
