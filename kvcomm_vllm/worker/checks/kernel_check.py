# SPDX-License-Identifier: Apache-2.0
"""Start-up check of what corrects KV on its way: kernels do what their reference does.

Kernels are compiled on the user's machine, by compilers and for devices that nobody has tried them
with; one that computes something else fails here, not in a user's answer. Plain loads are judged
by the model itself (:mod:`self_check`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from kvcomm_vllm.kernels import packing, reference
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation
from kvcomm_vllm.kernels.pages import PageGroup, Rotation
from kvcomm_vllm.worker.checks.self_check import SHIFT, require_close
from kvcomm_vllm.worker.load import CorrectKernel

ANCHORS = 3


def check_corrections(
    examples: Iterable[tuple[PageGroup, Deviation]], kernel: CorrectKernel
) -> None:
    """Loads a page with a made-up deviation of each kind, into the next one that nobody uses yet.

    Raises:
        Unsupported: what is there then is not what the reference writes.
    """
    for pages, example in examples:
        device, size = pages.layers[0].device, pages.tokens_per_page
        shift = min(SHIFT, size // 2)
        source = torch.arange(size, 2 * size - shift, device=device)
        target = source + size + shift
        noise = _Noise(device)
        undo, redo = (noise.turn(len(source), pages.rotary_dim // 2) for _ in range(2))
        deviation = noise.like(example, len(source))
        for index in range(len(pages.layers)):
            both = noise.of(len(source), pages.kv_heads, pages.row_dim)
            packing.write(pages, index, source, *pages.split(both))
        found = []
        for load in (kernel, reference.load_corrected):
            load(pages, source, target, undo, redo, deviation)
            found.append([packing.read(pages, n, target) for n in range(len(pages.layers))])
        for index, (got, want) in enumerate(zip(*found, strict=True)):
            packing.clear(pages, index, torch.cat((source, target)))
            name = f"corrected layer {index} of a group"
            require_close(pages, index, name, got, want, "are not those of the reference")


class _Noise:
    """Numbers on a device, the same at every start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def of(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def turn(self, tokens: int, pairs: int) -> Rotation:
        angle = self.of(tokens, pairs)
        return Rotation(angle.cos(), angle.sin())

    def like(self, example: Deviation, tokens: int) -> Deviation:
        """A deviation of the example's kind, for so many tokens."""
        numbers = torch.arange(tokens, device=self._device)
        if isinstance(example, AnchorSum):
            rows = ANCHORS * tokens
            return replace(
                example,
                dk=self._rows(example.dk, rows),
                dv=self._rows(example.dv, rows),
                rows=torch.arange(rows, device=self._device).view(ANCHORS, tokens),
                wk=self.of(ANCHORS, tokens),
                wv=self.of(ANCHORS, tokens),
            )
        means = replace(
            example,
            mean_k=self._rows(example.mean_k, tokens),
            mean_v=self._rows(example.mean_v, tokens),
            row=numbers,
        )
        if example.code is None or example.up is None:
            return means
        entry = (numbers % 2).int()  # of two placeholders
        code, up = self._rows(example.code, tokens), self._rows(example.up, 2)
        return replace(means, code=code, up=up, entry=entry)

    def _rows(self, like: torch.Tensor, count: int) -> torch.Tensor:
        return self.of(count, *like.shape[1:]).to(like.dtype)
