# SPDX-License-Identifier: Apache-2.0
"""Start-up checks of block tables: does attention read a token's KV where its page lies?

Pages of block tables may be several pages of the attention kernel. Who mixes them up reads other
tokens' KV, and neither reading pages back nor tokens alone in their sequence would show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kvcomm_vllm.compat.layers import cache_of
from kvcomm_vllm.compat.metadata import MetadataBuilder
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.pages import PageGroup
from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.model_check import check_pages, tables_of
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

    def row(order: tuple[int, int], start: int, part: list[int]) -> Row:
        pages = [check_pages()[i] for i in order]
        return Row(pages, HoleOp(start, part), windowed=tables_of(groups, *order))

    def values(row: Row, *before: Row) -> list[torch.Tensor]:
        side_forward.run([*before, row], eager=True)
        return _values(groups, row, block_size, count - block_size)

    there, back = (0, 1), (1, 0)
    tail = row(back, block_size, tokens[block_size:])
    one = values(row(there, 0, tokens))
    two = values(tail, row(back, 0, tokens[:block_size]))
    again = values(tail)
    side_forward.run([row(back, block_size - 1, [other])], eager=True)
    replaced = values(tail)
    _make_loud(groups, block_size)
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


def _values(groups: list[LayerGroup], row: Row, block_size: int, count: int) -> list[torch.Tensor]:
    """Every layer's values of the first tokens of the row's second page: ``[tokens, kv_heads,
    value_dim]``; keys may be mostly bias.
    """
    found = []
    for number, pages, index in _layers(groups):
        start = row.table(number)[1] * block_size
        slots = torch.arange(start, start + count, device=pages.layers[0].device)
        found.append(packing.read(pages, index, slots)[1])
    return found


def _make_loud(groups: list[LayerGroup], block_size: int) -> None:
    """The last token of the page that the tail stands behind."""
    for number, pages, index in _layers(groups):
        slot = check_pages(number)[1] * block_size + block_size - 1
        slots = torch.tensor([slot], device=pages.layers[0].device)
        key, value = packing.read(pages, index, slots)
        packing.write(pages, index, slots, key, torch.full_like(value, LOUD))


def _clear(groups: list[LayerGroup], block_size: int) -> None:
    for number, pages, index in _layers(groups):
        for page in check_pages(number):
            start = page * block_size
            slots = torch.arange(start, start + block_size, device=pages.layers[0].device)
            packing.clear(pages, index, slots)


def _layers(groups: list[LayerGroup]) -> Iterator[tuple[int, PageGroup, int]]:
    """Number of the KV cache group, pages, and index in them."""
    return ((group.number, *layer) for group in groups for layer in layers_of([group]))
