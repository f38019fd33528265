# SPDX-License-Identifier: Apache-2.0
"""What workers write in mode paper is what the estimator, judged by the golden vectors, says."""

from __future__ import annotations

import paper_formulas as formulas
import pytest
import torch
from paper_formulas import Pair

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.kernels.reference import turn_keys
from kvcomm_vllm.messages import AnchorOp, AnchorRows, EstimateOp, LoadOp
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.corrections.paper import PaperArena
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.rope import Rope

LAYERS, HEADS, DIM, PAGE = 3, 2, 16, 4


@pytest.fixture
def group() -> LayerGroup:
    generator = torch.Generator().manual_seed(3)
    shape = (200, HEADS, PAGE, 2 * DIM)
    layers = tuple(torch.randn(shape, generator=generator) for _ in range(LAYERS))
    angles = torch.arange(600)[:, None] / 50 ** (torch.arange(DIM // 2) / (DIM // 2))
    pages = PageGroup(layers, Packing.STRIDED, DIM, DIM)
    return LayerGroup((), pages, Rope(angles.cos(), angles.sin(), False), None)


@pytest.fixture
def arena(group: LayerGroup) -> PaperArena:
    config = KVCommConfig.from_mapping({"mode": "paper", "paper": {"memory_mb": 1}}, "test")
    return PaperArena(Ground([group], config, PAGE, alone=True, single=True))


def blocks(first: int, tokens: int) -> list[int]:
    return list(range(first, first + -(-tokens // PAGE)))


def unrotated(group: LayerGroup, block_ids: list[int], position: int, count: int) -> Pair:
    """K and V of positions ``position ..``: ``[tokens, layers, heads, dim]``."""
    places = torch.arange(position, position + count)
    slots = torch.tensor(block_ids)[places // PAGE] * PAGE + places % PAGE
    pairs = [packing.read(group.pages, layer, slots) for layer in range(LAYERS)]
    keys = [turn_keys(k, group.rope.undo(places), False) for k, _ in pairs]
    return torch.stack(keys, 1), torch.stack([v for _, v in pairs], 1)


def at(first: int, place: int, tokens: int) -> LoadOp:
    """A message that lies at position 0 of its source, and at ``place`` in the prompt."""
    return LoadOp(blocks(first, tokens), 0, 0, place, tokens)


# a source's first page, the prompt's first page, where the message stands, its tokens, text behind
ANCHORS = [(0, 10, 5, 12, 7), (20, 30, 9, 17, 7), (45, 55, 3, 12, 6)]
MESSAGE = (70, 80, 6, 11)


def taught(group: LayerGroup, arena: PaperArena) -> tuple[list[AnchorRows], list[Pair], list[Pair]]:
    """Anchors kept; the base KV and the true KV they were kept from, text behind included."""
    rows, bases, trues, start = [], [], [], 0
    for source, prompt, place, tokens, behind in ANCHORS:
        rows.append(AnchorRows(start, tokens, behind))
        start = rows[-1].end
        table = blocks(prompt, place + tokens + behind)
        bases.append(unrotated(group, blocks(source, tokens), 0, tokens))
        trues.append(unrotated(group, table, place, tokens + behind))
        arena.keep(table, AnchorOp(at(source, place, tokens), rows[-1]))
    return rows, bases, trues


def stacked(parts: list[Pair]) -> Pair:
    k, v = zip(*parts, strict=True)
    return torch.cat(k), torch.cat(v)


def test_estimates_are_those_of_the_papers_formulas(group: LayerGroup, arena: PaperArena) -> None:
    rows, bases, trues = taught(group, arena)
    source, prompt, place, tokens = MESSAGE
    k, v = unrotated(group, blocks(source, tokens), 0, tokens)
    lengths = [r.tokens for r in rows]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    first = formulas.anchor_rows(starts, lengths, tokens)
    last = formulas.anchor_rows(starts, lengths, tokens, last=True)
    sums = formulas.distance_sums((k, v), stacked(bases), first, last)
    weights = formulas.weights(sums, LAYERS * HEADS * DIM, skip_layers=0)
    changes = [
        tuple(t[:n] - b for t, b in zip(true, base, strict=True))
        for true, base, n in zip(trues, bases, lengths, strict=True)
    ]
    dk, dv = stacked(changes)
    expected = formulas.corrected((k, v), (dk[:, 1:], dv[:, 1:]), first, weights.token)
    # text behind: 6 tokens all anchors know, one more that two of them know
    end = place + tokens + 9
    op = EstimateOp(at(source, place, tokens), rows, end - 7, end, end, [7, 7, 6])
    table = blocks(prompt, end)
    arena.estimate(table, op)
    for found, right in zip(unrotated(group, table, place, tokens), expected, strict=True):
        torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)
    for part, found in enumerate(unrotated(group, table, end - 6, 6)):
        behind = torch.stack([true[part][-6:] for true in trues])
        right = (weights.channel[part][:, None] * behind).sum(0)
        torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)


def test_a_token_that_some_anchors_know_comes_from_those(
    group: LayerGroup, arena: PaperArena
) -> None:
    rows, _, trues = taught(group, arena)
    source, prompt, place, tokens = MESSAGE
    end = place + tokens + 7
    op = EstimateOp(at(source, place, tokens), rows[:1], end - 7, end, end, [7])
    table = blocks(prompt, end)
    arena.estimate(table, op)
    for found, right in zip(unrotated(group, table, end - 7, 7), trues[0], strict=True):
        torch.testing.assert_close(found, right[-7:], atol=2e-5, rtol=2e-5)


def test_the_gates_distance_is_that_of_the_values(group: LayerGroup, arena: PaperArena) -> None:
    rows, bases, _ = taught(group, arena)
    source, _, place, tokens = MESSAGE
    _, v = unrotated(group, blocks(source, tokens), 0, tokens)
    found = arena.distances(at(source, place, tokens), rows)
    right = [float((v - base_v[:tokens]).square().sum()) for _, base_v in bases]
    assert found == pytest.approx(right, rel=1e-5)


def test_the_first_layer_is_left_as_it_is(group: LayerGroup, arena: PaperArena) -> None:
    rows, _, _ = taught(group, arena)
    source, prompt, place, tokens = MESSAGE
    before_k, before_v = unrotated(group, blocks(source, tokens), 0, tokens)
    table = blocks(prompt, place + tokens)
    end = place + tokens
    arena.estimate(table, EstimateOp(at(source, place, tokens), rows, end, end, end, [0, 0, 0]))
    after_k, after_v = unrotated(group, table, place, tokens)
    torch.testing.assert_close(after_k[:, 0], before_k[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(after_v[:, 0], before_v[:, 0])
    assert not torch.allclose(after_v[:, 1:], before_v[:, 1:])


def test_several_ranks_mean_no_anchors(group: LayerGroup) -> None:
    config = KVCommConfig.from_mapping({"mode": "paper", "paper": {"memory_mb": 1}}, "test")
    assert PaperArena(Ground([group], config, PAGE, alone=True, single=False)).room == 0


def test_text_behind_that_the_nearest_anchor_does_not_know_is_still_a_number(
    group: LayerGroup, arena: PaperArena
) -> None:
    rows, _, trues = taught(group, arena)
    op = EstimateOp(at(MESSAGE[0], 6, 11), tuple(rows), 33, 40, 40, (3, 7, 6))
    distances = torch.full((3, HEADS, 2 * DIM), 500.0)
    distances[0] = 0.0
    found = arena._behind(list(arena.layers)[1], op, distances)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :, DIM:], trues[1][1][-7, 1])
    torch.testing.assert_close(found[-1, :, DIM:], trues[0][1][-1, 1])
