# SPDX-License-Identifier: Apache-2.0
"""The reference itself: against vLLM's rotary op, and against the packings' definition."""

from __future__ import annotations

import math

import pytest
import torch

from kvcomm_vllm.kernels import packing, reference
from kvcomm_vllm.kernels.deviation import AnchorSum, CodeMaps, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation


def rotary_table(positions: int, rotary_dim: int) -> torch.Tensor:
    """vLLM's ``cos_sin_cache``: ``[positions, cos | sin]``."""
    frequency = 10_000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (96, 96), (128, 64)])
def test_moving_a_key_equals_vllms_rotary_op_at_the_new_position(
    head_dim: int, rotary_dim: int, interleaved: bool
) -> None:
    rope = pytest.importorskip("vllm.model_executor.layers.rotary_embedding.base")
    tokens, heads = 11, 3
    table = rotary_table(4096, rotary_dim)
    raw = torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(0))
    old, new = torch.arange(tokens) + 37, torch.arange(tokens) + 3001

    def rotated(positions: torch.Tensor) -> torch.Tensor:
        flat = raw.reshape(tokens, -1).clone()
        query, _ = rope.RotaryEmbedding.forward_static(
            positions, flat, None, head_dim, rotary_dim, table, not interleaved
        )
        return query.reshape(tokens, heads, head_dim)

    def factors(positions: torch.Tensor, sign: int) -> Rotation:
        cos, sin = table[positions].chunk(2, dim=-1)
        return Rotation(cos.contiguous(), sign * sin)

    cache = torch.zeros(4, heads, 16, 2 * head_dim)
    group = PageGroup((cache,), Packing.STRIDED, head_dim, rotary_dim, interleaved)
    src, dst = torch.arange(tokens), torch.arange(tokens) + 40
    packing.write(group, 0, src, rotated(old), raw)
    reference.load(group, src, dst, factors(old, -1).then(factors(new, 1)))
    k, v = packing.read(group, 0, dst)
    torch.testing.assert_close(k, rotated(new), rtol=0, atol=2e-6)
    assert torch.equal(v, raw)


@pytest.mark.parametrize("packed", Packing, ids=lambda p: p.value)
def test_written_slots_read_back_and_all_others_keep_their_bytes(packed: Packing) -> None:
    pages, heads, tokens, dim = 5, 3, 32, 48
    cache = torch.full((pages, heads, tokens, 2 * dim), float("nan"), dtype=torch.bfloat16)
    group = PageGroup((cache,), packed, dim, dim)
    slots = torch.randperm(pages * tokens, generator=torch.Generator().manual_seed(1))
    k, v = torch.randn(2, 50, heads, dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    packing.write(group, 0, slots[:50], k.float(), v.float())
    got_k, got_v = packing.read(group, 0, slots[:50])
    assert torch.equal(got_k, k.float())
    assert torch.equal(got_v, v.float())
    rest_k, rest_v = packing.read(group, 0, slots[50:])
    assert bool(rest_k.isnan().all())
    assert bool(rest_v.isnan().all())


@pytest.mark.parametrize("packed", Packing, ids=lambda p: p.value)
def test_packings_are_the_layouts_vllm_documents(packed: Packing) -> None:
    """One number at one (page, head, token, channel), found where cpu_attn puts it."""
    heads, tokens, dim = 2, 32, 32
    cache = torch.zeros(3, heads, tokens, 2 * dim)
    group = PageGroup((cache,), packed, dim, dim)
    page, head, token, channel = 2, 1, 21, 13
    k, v = torch.zeros(2, 1, heads, dim)
    k[0, head, channel], v[0, head, channel] = 1.0, 2.0
    packing.write(group, 0, torch.tensor([page * tokens + token]), k, v)
    flat = cache[page, head].flatten()
    place = {
        Packing.STRIDED: (token * 2 * dim + channel, token * 2 * dim + dim + channel),
        Packing.VEC: (channel * tokens + token, tokens * dim + token * dim + channel),
        Packing.AMX: (
            (token // 16) * dim * 16 + (channel // 2) * 32 + (token % 16) * 2 + channel % 2,
            tokens * dim
            + (channel // 16) * tokens * 16
            + (token // 2) * 32
            + (channel % 16) * 2
            + token % 2,
        ),
        Packing.LATENT: (token * 2 * dim + dim + channel, token * 2 * dim + channel),
    }[packed]
    assert flat.nonzero().flatten().tolist() == sorted(place)
    assert (flat[place[0]], flat[place[1]]) == (1.0, 2.0)


def test_a_latent_row_is_the_latent_and_behind_it_the_key_that_turns() -> None:
    """As ``concat_and_cache_mla`` writes it; DeepSeek's widths."""
    cache = torch.arange(2 * 16 * 576.0).view(2, 1, 16, 576)
    group = PageGroup((cache,), Packing.LATENT, 64, 64, interleaved=True)
    assert (group.value_dim, group.row_dim, group.kv_heads) == (512, 576, 1)
    k, v = packing.read(group, 0, torch.tensor([18]))
    assert torch.equal(v[0, 0], cache[1, 0, 2, :512])
    assert torch.equal(k[0, 0], cache[1, 0, 2, 512:])
    quarter = Rotation(torch.zeros(1, 32), torch.ones(1, 32))
    reference.load(group, torch.tensor([18]), torch.tensor([3]), quarter)
    assert torch.equal(cache[0, 0, 3, :512], cache[1, 0, 2, :512])
    pairs, turned = cache[1, 0, 2, 512:].view(32, 2), cache[0, 0, 3, 512:].view(32, 2)
    assert torch.equal(turned, torch.stack((-pairs[:, 1], pairs[:, 0]), dim=-1))


def test_a_sum_of_anchors_is_the_papers_weighted_sum() -> None:
    """Eq. 6 written out over ``[anchors, tokens, layers, heads, dim]``."""
    rng = torch.Generator().manual_seed(3)
    anchors, layers, tokens, heads, dim = 4, 2, 5, 3, 16
    dk, dv = torch.randn(2, anchors, tokens, layers, heads, dim, generator=rng)
    wk, wv = torch.rand(2, anchors, tokens, generator=rng)
    rows = torch.arange(anchors * tokens).reshape(anchors, tokens)
    change = AnchorSum(dk.flatten(0, 1), dv.flatten(0, 1), rows, wk, wv)
    keep = torch.ones(tokens, dtype=torch.bool)
    for layer in range(layers):
        got_k, got_v = reference.deviate(change, layer, keep)
        torch.testing.assert_close(got_k, torch.einsum("at,athd->thd", wk, dk[:, :, layer]))
        torch.testing.assert_close(got_v, torch.einsum("at,athd->thd", wv, dv[:, :, layer]))


def test_a_code_adds_its_sum_of_channels_to_the_mean_of_its_tokens_row() -> None:
    rng = torch.Generator().manual_seed(4)
    layers, heads, dim, tokens, rank = 2, 3, 16, 7, 5
    mean = torch.randn(2, 4, layers, heads, dim, generator=rng)
    row = torch.tensor([1, 2, 3, 3, 0, 3, 2])
    code = torch.randn(tokens, layers, rank, generator=rng)
    up = torch.randn(2, layers, heads, rank, 2 * dim, generator=rng)
    entry = torch.tensor([0, 0, 1, -1, 1, 0, 1], dtype=torch.int32)
    change = MeanMap(mean[0], mean[1], row, code, up, entry)
    assert (change.rank, MeanMap(mean[0], mean[1], row).rank) == (rank, 0)
    keep = torch.tensor([True, False, True, True, False, True, True])
    for layer in range(layers):
        got = torch.cat(reference.deviate(change, layer, keep), dim=-1)
        for found, token in zip(got, keep.nonzero().flatten().tolist(), strict=True):
            for head in range(heads):
                want = mean[:, row[token], layer, head].flatten()
                for r in range(rank if entry[token] >= 0 else 0):
                    want = want + code[token, layer, r] * up[entry[token], layer, head, r]
                torch.testing.assert_close(found[head], want)


def test_codes_are_each_tokens_folded_features_through_its_own_map() -> None:
    rng = torch.Generator().manual_seed(5)
    tokens, inputs, layers, rank = 6, 4, 2, 3
    factor, offset = torch.randn(2, 10, generator=rng), torch.randn(2, inputs, generator=rng)
    down = torch.randn(2, inputs + 1, layers, rank, generator=rng)
    maps = CodeMaps(factor, offset, torch.tensor([16.0]), down)
    raw, index = torch.randn(tokens, 10, generator=rng), torch.arange(tokens).int()
    entry = torch.tensor([1, 1, 0, -1, 0, 1], dtype=torch.int32)
    got = reference.codes(raw, maps, index, entry)
    assert got.shape == (tokens, layers, rank)
    for t, e in enumerate(entry.tolist()):
        if e < 0:
            assert not got[t].any()
            continue
        x = [-offset[e, c] for c in range(inputs)] + [torch.tensor(math.expm1(-t / 16))]
        for c in range(10):
            x[c % inputs] = x[c % inputs] + raw[t, c] * factor[e, c]
        torch.testing.assert_close(got[t], torch.einsum("i,ilr->lr", torch.stack(x), down[e]))
