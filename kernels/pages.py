# SPDX-License-Identifier: Apache-2.0
"""What every kernel here works on: paged K/V of one group of layers, and rotations.

A *slot* is a token's place in the cache: ``slot = page * tokens_per_page + offset``. Kernels take
slots, not block tables, so any block size, any alignment and any mix of requests is one flat list
of tokens.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class Packing(enum.Enum):
    """How K and V of one (page, head) lie in memory (vLLM 0.28+: logical ``[pages, heads, tokens,
    row_dim]``).
    """

    STRIDED = "strided"  # CUDA/ROCm/XPU: K = [..., :D], V = [..., D:], any strides (NHD and HND)
    VEC = "vec"  # CPU vec and vec16: K stored [D, tokens], then V stored [tokens, D]
    AMX = "amx"  # CPU amx (bf16): K [tokens/16, D/2, 16, 2], then V [D/16, tokens/2, 16, 2]
    # MLA on any device: strided, one head; V is what keys and values are made from, K the key that
    # is rotated, of other width and behind V
    LATENT = "latent"


# Of any strides: a token's K and V lie side by side.
ROWS = (Packing.STRIDED, Packing.LATENT)


@dataclass(frozen=True)
class PageGroup:
    """Layers that share shape, dtype, packing and rotary embedding; one launch serves them all.

    Args:
        layers: per layer the cache ``[pages, kv_heads, tokens_per_page, row_dim]`` (logical shape).
        packing: memory layout inside a page.
        head_dim: D, channels of K; and of V, unless the packing is latent.
        rotary_dim: leading channels that are rotated; 0 for layers without rotary embedding.
        interleaved: GPT-J pairs ``(2j, 2j + 1)`` instead of NeoX pairs ``(j, j + rotary_dim / 2)``.
        k_scales, v_scales: per-layer factors of an fp8 cache (stored value * scale = value); None
            otherwise.
    """

    layers: tuple[torch.Tensor, ...]
    packing: Packing
    head_dim: int
    rotary_dim: int
    interleaved: bool = False
    k_scales: tuple[float, ...] | None = None
    v_scales: tuple[float, ...] | None = None

    @property
    def row_dim(self) -> int:
        """Channels of a token's K and V in one head."""
        return int(self.layers[0].shape[3])

    @property
    def value_dim(self) -> int:
        """Channels of V."""
        return self.row_dim - self.head_dim

    @property
    def widest(self) -> int:
        """Channels of K or of V, whichever has more."""
        return max(self.head_dim, self.value_dim)

    @property
    def key_at(self) -> int:
        """The channel of a row where K begins, in packings that have rows."""
        return self.value_dim if self.packing is Packing.LATENT else 0

    @property
    def value_at(self) -> int:
        """The same for V."""
        return 0 if self.packing is Packing.LATENT else self.head_dim

    def split(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tensors that hold them side by side, K first: ``[..., row_dim]``."""
        return both[..., : self.head_dim], both[..., self.head_dim :]

    @property
    def kv_heads(self) -> int:
        return int(self.layers[0].shape[1])

    @property
    def tokens_per_page(self) -> int:
        return int(self.layers[0].shape[2])


@dataclass(frozen=True)
class Rotation:
    """One complex factor ``cos + i sin`` per token and channel pair: fp32 ``[tokens, rotary_dim /
    2]`` each.

    Not always a unit factor: undoing a YaRN rotation divides by its magnitude (mscale) as well.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def then(self, other: Rotation) -> Rotation:
        """This rotation followed by the other."""
        return Rotation(
            self.cos * other.cos - self.sin * other.sin, self.sin * other.cos + self.cos * other.sin
        )
