# SPDX-License-Identifier: Apache-2.0
"""Start-up checks of block tables: does attention read a token's KV where its page lies?

Pages of block tables may be several pages of the attention kernel. Who mixes them up reads other
tokens' KV, and neither reading pages back nor tokens alone in their sequence would show it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvcomm_vllm.compat.layers import cache_of
from kvcomm_vllm.compat.metadata import MetadataBuilder
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.model_check import PAGES
from kvcomm_vllm.worker.checks.self_check import TOLERANCE
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.kv_view import LayerGroup, layers_of
from kvcomm_vllm.worker.side_forward import Row, SideForward

TAIL = 8  # tokens on the second page
# Values that no token has: attention to them is seen even in a model of random small weights.
LOUD = 100.0


def check_page_sizes(
    layers: dict[str, Any], builders: list[MetadataBuilder], block_size: int
) -> None:
    """Raises ``Unsupported`` where a layer's pages are not of the size its attention reads, or its
    block tables not of ours.
    """
    for builder in builders:
        if builder.block_size != block_size:
            detail = f"block tables of {builder.block_size}-token pages, not {block_size}"
            raise Unsupported(Reason.UNKNOWN_LAYOUT, detail)
        for name in builder.layer_names:
            layer = layers.get(name)
            if not hasattr(layer, "kv_cache"):
                continue
            tokens = cache_of(layer).shape[2]
            if tokens != builder.kernel_block_size:
                detail = (
                    f"{name}: pages of {tokens} tokens, attention reads pages of "
                    f"{builder.kernel_block_size}"
                )
                raise Unsupported(Reason.UNKNOWN_LAYOUT, detail)


def page_fault(groups: list[LayerGroup], block_size: int, side_forward: SideForward) -> str | None:
    """What is wrong with how attention reads across pages, or None.

    A sequence over two pages is computed in one row, then in two, in the same pages the other way
    round: the second page's values must not change. Then the last token of the first page is
    replaced, and then its values are made loud: they must. Pages are left empty.

    Said, not raised: under tensor parallelism every rank must make every forward.
    """
    config = side_forward.runner.model_config
    count = min(block_size + TAIL, int(config.max_model_len))
    if count <= block_size:
        return None  # no request has a second page
    other, *tokens = _tokens(int(config.get_vocab_size()), count + 1)
    there, back = list(PAGES), list(reversed(PAGES))
    tail = Row(back, HoleOp(block_size, tokens[block_size:]))

    def values(row: Row, *before: Row) -> list[torch.Tensor]:
        side_forward.run([*before, row], eager=True)
        start = row.block_ids[1] * block_size
        return _values(groups, torch.arange(start, start + count - block_size))

    one = values(Row(there, HoleOp(0, tokens)))
    two = values(tail, Row(back, HoleOp(0, tokens[:block_size])))
    again = values(tail)
    side_forward.run([Row(back, HoleOp(block_size - 1, [other]))], eager=True)
    replaced = values(tail)
    _make_loud(groups, back[0] * block_size + block_size - 1)
    loud = values(tail)
    _clear(groups, block_size)
    return _verdict(groups, one, two, again, replaced, loud)


def _verdict(groups: list[LayerGroup], *runs: list[torch.Tensor]) -> str | None:
    """``runs``: values in one row, in two, of the second alone, behind another token, behind loud
    values; per layer.
    """
    layers = [
        (layer.layer_name, TOLERANCE[pages.element_size()])
        for group in groups
        for layer, pages in zip(group.layers, group.pages.layers, strict=True)
    ]
    seen = len(layers) == 1  # the first layer's values depend on their own token alone
    for (name, tolerance), one, two, again, replaced, loud in zip(layers, *runs, strict=True):
        noise = max(_difference(one, two), _difference(one, again))
        change = _difference(again, replaced)
        if not noise <= max(tolerance, change / 2):
            return (
                f"{name}: a token attends to other KV in two rows than in one "
                f"(relative difference {noise:.2g})"
            )
        seen |= max(change, _difference(again, loud)) > 4 * noise
    return None if seen else "no token attends to the page before its own"


def _difference(values: torch.Tensor, others: torch.Tensor) -> float:
    """Relative, of the token in the middle: rounding may send some to other experts, and a wrong
    page changes them all.
    """
    far = (values - others).flatten(1).norm(dim=1)
    return float((far / values.flatten(1).norm(dim=1).clamp_min(1e-30)).median())


def _tokens(vocabulary: int, count: int) -> list[int]:
    """Different tokens from the middle of the vocabulary, as far as it has them."""
    middle = np.arange(vocabulary // 4, vocabulary - vocabulary // 4)
    shuffled = np.random.default_rng(0).permutation(middle)
    return [int(token) for token in np.resize(shuffled, count)]


def _values(groups: list[LayerGroup], slots: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's values at the slots: ``[tokens, kv_heads, value_dim]``; keys may be mostly
    bias.
    """
    slots = slots.to(groups[0].pages.layers[0].device)
    return [packing.read(pages, index, slots)[1] for pages, index in layers_of(groups)]


def _make_loud(groups: list[LayerGroup], slot: int) -> None:
    slots = torch.tensor([slot], device=groups[0].pages.layers[0].device)
    for pages, index in layers_of(groups):
        key, value = packing.read(pages, index, slots)
        packing.write(pages, index, slots, key, torch.full_like(value, LOUD))


def _clear(groups: list[LayerGroup], block_size: int) -> None:
    device = groups[0].pages.layers[0].device
    slots = torch.cat([torch.arange(p * block_size, (p + 1) * block_size) for p in PAGES])
    slots = slots.to(device)
    for pages, index in layers_of(groups):
        packing.clear(pages, index, slots)
