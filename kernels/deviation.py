# SPDX-License-Identifier: Apache-2.0
"""Deviations as kernels consume them: a weighted sum over anchors, or a mean plus a code.

Both live in the unrotated frame: anchors sit at other absolute positions than the span they correct
(paper section 3.1, "positional alignment"). Layer 0 of a model has no deviation (its K and V depend
on token and position alone), so a group that starts with it sets ``skip_layers=1`` and its arenas
hold one layer less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AnchorSum:
    """``dK = sum_a wk_a * dk[rows_a]``, the same for V (paper Eq. 6).

    Args:
        dk, dv: arenas ``[arena_rows, layers, kv_heads, head_dim]``, V's with ``value_dim``, one row
            per anchor token, any float dtype, channels contiguous.
        rows: int64 ``[anchors, tokens]``, arena row of anchor a for token t; negative = this anchor
            says nothing about this token. Anchors are picked without copying them.
        wk, wv: fp32 weights ``[anchors, tokens]``.
        skip_layers: leading layers of the group that have no deviation and no place in the arenas.
    """

    dk: torch.Tensor
    dv: torch.Tensor
    rows: torch.Tensor
    wk: torch.Tensor
    wv: torch.Tensor
    skip_layers: int = 0


@dataclass(frozen=True)
class MeanMap:
    """``(dK, dV) = mean[row] + code @ up[entry]`` (``residual``), of any placeholders together.

    Args:
        mean_k, mean_v: arenas ``[arena_rows, layers, kv_heads, head_dim]``, V's with ``value_dim``,
            any float dtype, channels contiguous.
        row: int64 ``[tokens]``, the arena row of each token's mean.
        code: ``[tokens, layers, rank]``, any float dtype, contiguous: what a layer's deviation is
            predicted from, the same for all heads; None = means alone.
        up: ``[entries, layers, kv_heads, rank, row_dim]``, any float dtype, contiguous: from a
            code (row) to the channels of (dK, dV) (column), for each placeholder.
        entry: int32 ``[tokens]``, whose ``up`` takes a token's code; negative = the token has its
            mean alone. Tokens of one entry that follow each other are corrected fastest. ``code``,
            ``up`` and ``entry`` are given together.
        skip_layers: leading layers of the group that have no deviation and no place in the tensors.
    """

    mean_k: torch.Tensor
    mean_v: torch.Tensor
    row: torch.Tensor
    code: torch.Tensor | None = None
    up: torch.Tensor | None = None
    entry: torch.Tensor | None = None
    skip_layers: int = 0

    @property
    def rank(self) -> int:
        """Numbers of a token's code in one layer; 0 without codes."""
        return 0 if self.code is None else int(self.code.shape[-1])


@dataclass(frozen=True)
class CodeMaps:
    """How tokens' features become their codes, for each placeholder: ``x @ down``, where ``x`` is a
    token's features, weighted and folded, and how far its index is from the placeholder's start.

    Args:
        factor: fp32 ``[entries, raw_width]``: features that lie ``inputs`` apart are multiplied by
            theirs and added up.
        offset: fp32 ``[entries, inputs]``, taken off the sums.
        decays: fp32 ``[decays]``, tokens; each gives ``exp(-index / decay) - 1``.
        down: ``[entries, inputs + decays, layers, rank]``, any float dtype, contiguous.
    """

    factor: torch.Tensor
    offset: torch.Tensor
    decays: torch.Tensor
    down: torch.Tensor

    @property
    def inputs(self) -> int:
        return int(self.offset.shape[1])


Deviation = AnchorSum | MeanMap


@dataclass(frozen=True)
class DistanceSums:
    """Sums over this rank's heads between a candidate span and A anchors; ranks add them up.

    Args:
        square_v: ``[anchors]``, sum of (V - V_a)^2; its root is the gate's distance (paper Eq. 5).
        abs_k, abs_v: ``[anchors, tokens]``, sum of |K - K_a| over layers, heads and channels;
            divided by their count over all ranks it is the paper's per-token distance (Eq. 6).
    """

    square_v: torch.Tensor
    abs_k: torch.Tensor
    abs_v: torch.Tensor
