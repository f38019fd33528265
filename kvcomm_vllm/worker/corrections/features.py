# SPDX-License-Identifier: Apache-2.0
"""What the map is given of a token: its base KV in a few layers, and its index in the placeholder.

How a token's KV depends on its context shows in all layers together, so one description serves the
map of every layer and head. It has a fixed width, whatever the model's: larger KV is folded, pairs
of numbers that meet being added with random signs.
"""

from __future__ import annotations

import dataclasses

import torch

from kvcomm_vllm.kernels.pages import PageGroup, Rotation
from kvcomm_vllm.kernels.reference import fold, inputs_of
from kvcomm_vllm.worker import accelerator

_LAYERS = 6
_LEAST = 0.01  # of the mean spread of an anchor's numbers: none counts as more even than that
# Tokens: contexts fade with the distance from the placeholder's start.
_DECAYS = (8.0, 32.0, 128.0, 512.0)


class Features:
    """
    Args:
        group: pages of one layer group; ``_LAYERS`` of its layers are looked at, evenly spaced.
        inputs: most numbers kept of a token's KV.
    """

    def __init__(self, group: PageGroup, inputs: int) -> None:
        last = len(group.layers) - 1
        chosen = sorted({round(last * i / (_LAYERS - 1)) for i in range(_LAYERS)})
        self.pages = dataclasses.replace(
            group,
            layers=tuple(group.layers[i] for i in chosen),
            k_scales=group.k_scales and tuple(group.k_scales[i] for i in chosen),
            v_scales=group.v_scales and tuple(group.v_scales[i] for i in chosen),
        )
        self.raw_width = len(chosen) * group.kv_heads * group.row_dim
        self.folds = -(-self.raw_width // inputs)
        self.inputs = -(-self.raw_width // self.folds)
        device = group.layers[0].device
        # Equal on every rank and in every run: a placeholder's sums refer to these signs.
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (self.raw_width,), generator=draw) * 2.0 - 1.0
        self._signs = (signs if self.folds > 1 else torch.ones_like(signs)).to(device)
        self.decays = torch.tensor(_DECAYS, device=device)

    @property
    def width(self) -> int:
        """Numbers of a token: those of its KV and those of its index."""
        return self.inputs + len(_DECAYS)

    def raw(self, slots: torch.Tensor, undo: Rotation) -> torch.Tensor:
        """Unrotated K and V of the looked-at layers: fp32 ``[tokens, raw_width]``.

        Args:
            slots: int64 ``[tokens]``, where the base KV lies; ``undo``: ``R(-position)`` of each.
        """
        pages = self.pages
        shape = (len(slots), len(pages.layers), pages.kv_heads, pages.row_dim)
        found = torch.empty(shape, device=slots.device)
        k, v = pages.split(found)
        if accelerator.accelerated(slots.device):
            from kvcomm_vllm.kernels.collect import collect
        else:
            from kvcomm_vllm.kernels.reference import collect
        collect(pages, slots, undo, k, v)
        return found.flatten(1)

    def spread(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factor ``[raw_width]`` and offset ``[inputs]`` by which :meth:`of` standardises raw
        features, from those of one anchor.
        """
        centre = raw.mean(0)
        deviation = (raw - centre).square().mean(0).sqrt()
        # Of few tokens some numbers are equal by chance; they must not outweigh all others later.
        deviation = deviation.clamp(min=deviation.mean() * _LEAST + 1e-6)
        factor = self._signs / (deviation * self.folds**0.5)
        return factor, fold(centre[None], factor, self.inputs)[0]

    def of(
        self, raw: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """What the map is given: fp32 ``[tokens, width]``.

        Args:
            factor, offset: from :meth:`spread`; ``index``: ``[tokens]``, each token's index.
        """
        return inputs_of(raw, factor, offset, self.decays, index)
