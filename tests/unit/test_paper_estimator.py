# SPDX-License-Identifier: Apache-2.0
"""The paper's estimator against golden vectors of the paper's code, by tensors and by kernels."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_vectors import Case, cases, span

from kvcomm_vllm.anchors.estimators import paper
from kvcomm_vllm.anchors.gate import covering_anchors
from kvcomm_vllm.anchors.paper_pool import PaperPool
from kvcomm_vllm.kernels import packing, reference
from kvcomm_vllm.kernels.deviation import AnchorSum, DistanceSums
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation
from kvcomm_vllm.worker.rope import Rope

OUTPUTS = ("ph_k", "ph_v", "pf_k", "pf_v")


class Anchors:
    """A pool's arenas, and the rows of the anchors that cover a placeholder."""

    def __init__(self, case: Case, names: SequenceOf[str], k: torch.Tensor, v: torch.Tensor):
        stored = [case.spans(name) for name in names]
        lengths = [len(anchor_k) for anchor_k, _ in stored]
        starts = list(accumulate(lengths, initial=0))
        self.case, self.names, self.k, self.v = case, names, k, v
        self.index = covering_anchors(lengths, len(k))
        self.base_k = torch.cat([k[:0], *(anchor_k for anchor_k, _ in stored)])
        self.base_v = torch.cat([v[:0], *(anchor_v for _, anchor_v in stored)])
        place = [starts[i] for i in self.index], [lengths[i] for i in self.index]
        self.first = paper.anchor_rows(*place, len(k))
        self.last = paper.anchor_rows(*place, len(k), last=True)

    def sums(self) -> DistanceSums:
        return paper.distance_sums(self.k, self.v, self.base_k, self.base_v, self.first, self.last)

    def weights(self, skip_layers: int = 1) -> paper.PaperWeights:
        temperature = self.case.params["temperature"]
        return paper.weights(self.sums(), self.k[:1].numel(), temperature, skip_layers)

    def changes(
        self, weights: paper.PaperWeights, prefix_tokens: int, consumer: str = ""
    ) -> tuple[AnchorSum, AnchorSum]:
        """Deviations of the placeholder and of the text behind it."""
        behind = [i * prefix_tokens for i in self.index]
        rows = paper.anchor_rows(behind, [prefix_tokens] * len(behind), prefix_tokens)
        return (
            weights.placeholder(*self._arenas(f"{consumer}ph"), self.first),
            weights.following(*self._arenas(f"{consumer}pf"), rows),
        )

    def _arenas(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self.case.deltas(f"{name}_{kind}") for name in self.names]
        dk = torch.cat([self.k[:0, 1:], *(k for k, _ in parts)])
        return dk, torch.cat([self.v[:0, 1:], *(v for _, v in parts)])


def pool_of(case: Case, candidate: str = "cand") -> Anchors:
    names = [f"a{i}" for i in range(case.params["anchors"])]
    k = span(case.given(f"{candidate}_k"))
    return Anchors(case, names, k, span(case.given("cand_v")))


def check_outputs(case: Case, got: SequenceOf[torch.Tensor], prefix: str = "") -> None:
    for name, tensor in zip(OUTPUTS, got, strict=True):
        case.check(tensor, span(case.want(f"{prefix}{name}")), "outputs_atol")


def check_weights(case: Case, anchors: Anchors, prefix: str = "") -> None:
    """Distances and weights of all layers, where the case has any."""
    if not case.wants(f"{prefix}w_ph_k"):
        assert not anchors.index or not len(anchors.k)
        return
    sums, weights, count = anchors.sums(), anchors.weights(0), anchors.k[:1].numel()
    for x in "kv":
        token = paper.token_distances(getattr(sums, f"abs_{x}"), count)
        channel = paper.channel_distances(getattr(sums, f"square_channel_{x}"))
        case.check(token, case.want(f"{prefix}d_ph_{x}")[:, 0, 0, 0, :, 0])
        case.check(channel, case.want(f"{prefix}d_pf_{x}")[:, :, 0])
        token_w, channel_w = getattr(weights, f"token_{x}"), getattr(weights, f"channel_{x}")
        case.check(token_w, case.want(f"{prefix}w_ph_{x}")[:, 0, 0, 0, :, 0], "weights_atol")
        case.check(channel_w, case.want(f"{prefix}w_pf_{x}")[:, :, 0, :, 0], "weights_atol")


def corrected(
    anchors: Anchors, weights: paper.PaperWeights, consumer: str = ""
) -> list[torch.Tensor]:
    following = anchors.case.spans("pf")
    here, behind = anchors.changes(weights, len(following[0]), consumer)
    return [*paper.blend(anchors.k, anchors.v, here), *paper.blend(*following, behind)]


@pytest.mark.parametrize("case", cases("blend"))
def test_distances_weights_and_corrected_kv_are_the_golden_ones(case: Case) -> None:
    anchors = pool_of(case)
    assert anchors.index == case.expected["anchor_index"]
    check_weights(case, anchors)
    got = corrected(anchors, anchors.weights())
    check_outputs(case, got)
    for tensor, base in zip(got, [anchors.k, anchors.v, *case.spans("pf")], strict=True):
        assert torch.equal(tensor[:, 0], base[:, 0])
        assert tensor.dtype == base.dtype
    if case.wants("gate_dist"):
        got_gate = torch.tensor(paper.gate_distances(anchors.sums()))
        case.check(got_gate, case.want("gate_dist"))


@pytest.mark.parametrize("case", cases("blend_shared"))
def test_weights_may_be_shared_by_all_consumers_of_a_message(case: Case) -> None:
    first, second = pool_of(case), pool_of(case, "cand2")
    assert first.index == case.expected["anchor_index"]
    check_weights(case, first, "first_")
    check_weights(case, second, "fresh_")
    check_outputs(case, corrected(first, first.weights(), "A_"), "first_")
    check_outputs(case, corrected(second, first.weights(), "B_"), "second_")
    check_outputs(case, corrected(second, second.weights(), "B_"), "fresh_")


class Cache:
    """Spans in strided pages without rotary embedding, one behind the other."""

    def __init__(self, *spans: tuple[torch.Tensor, torch.Tensor]) -> None:
        _, layers, heads, dim = spans[0][0].shape
        pages = -(-sum(len(k) for k, _ in spans) // 4) + 1
        caches = torch.zeros(layers, pages, heads, 4, 2 * dim, dtype=spans[0][0].dtype)
        self.group = PageGroup(tuple(caches), Packing.STRIDED, dim, 0)
        self.slots: list[torch.Tensor] = []
        place = 0
        for k, v in spans:
            self.slots.append(torch.arange(place, place + len(k)))
            for layer in range(layers):
                packing.write(self.group, layer, self.slots[-1], k[:, layer], v[:, layer])
            place += len(k)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [packing.read(self.group, i, slots) for i in range(len(self.group.layers))]
        return torch.stack([k for k, _ in rows], 1), torch.stack([v for _, v in rows], 1)


def still(tokens: int | torch.Tensor) -> Rotation:
    """No rotation, for layers without any."""
    none = torch.zeros(tokens if isinstance(tokens, int) else len(tokens), 0)
    return Rotation(none, none)


@pytest.mark.parametrize("case", cases("blend"))
def test_sums_and_corrections_of_the_kernels_give_the_same_weights_and_kv(case: Case) -> None:
    anchors = pool_of(case)
    cache = Cache((anchors.k, anchors.v), case.spans("pf"))
    here, behind = cache.slots
    arenas = anchors.base_k, anchors.base_v
    near = reference.distance(cache.group, here, still(here), *arenas, anchors.first)
    far = reference.distance(
        cache.group, here, still(here), *arenas, anchors.last, per_channel=True
    )
    sums = replace(
        near,
        square_channel_k=far.square_channel_k,
        square_channel_v=far.square_channel_v,
    )
    weights = paper.weights(sums, anchors.k[:1].numel(), case.params["temperature"])
    changes = anchors.changes(weights, len(behind))
    for slots, change in zip((here, behind), changes, strict=True):
        turn = still(slots)
        reference.load_corrected(cache.group, slots, slots, turn, turn, change)
    check_outputs(case, [*cache.read(here), *cache.read(behind)])


def random_spans(seed: int, *tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of spans with 3 layers, 4 heads and 6 channels."""
    rng = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, sum(tokens), 3, 4, 6, generator=rng)
    return list(zip(k.split(list(tokens)), v.split(list(tokens)), strict=True))


def sums_of(
    candidate: tuple[torch.Tensor, torch.Tensor],
    anchors: SequenceOf[tuple[torch.Tensor, torch.Tensor]],
) -> DistanceSums:
    lengths = [len(k) for k, _ in anchors]
    starts = list(accumulate(lengths[:-1], initial=0))
    rows = [paper.anchor_rows(starts, lengths, len(candidate[0]), last=last) for last in (0, 1)]
    arena_k = torch.cat([k for k, _ in anchors])
    return paper.distance_sums(*candidate, arena_k, torch.cat([v for _, v in anchors]), *rows)


LENGTHS = st.lists(st.integers(5, 9), min_size=1, max_size=5)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(0, 1000), st.floats(0.1, 4))
def test_weights_add_up_to_one_and_follow_their_anchors(
    lengths: list[int], seed: int, temperature: float
) -> None:
    candidate, *anchors = random_spans(seed, 5, *lengths)
    weights = paper.weights(sums_of(candidate, anchors), 72, temperature)
    turned = paper.weights(sums_of(candidate, anchors[::-1]), 72, temperature)
    for name in ("token_k", "token_v", "channel_k", "channel_v"):
        w = getattr(weights, name)
        torch.testing.assert_close(w.sum(0), torch.ones(w.shape[1:]))
        torch.testing.assert_close(getattr(turned, name), w.flip(0))


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(0, 1000))
def test_ranks_with_half_the_heads_each_come_to_the_weights_of_all(
    lengths: list[int], seed: int
) -> None:
    def heads(spans: Any, half: slice) -> Any:
        return [(k[:, :, half], v[:, :, half]) for k, v in spans]

    spans = random_spans(seed, 5, *lengths)
    whole = sums_of(spans[0], spans[1:])
    want = paper.weights(whole, 72)
    parts = [heads(spans, half) for half in (slice(0, 2), slice(2, 4))]
    own, other = (sums_of(part[0], part[1:]) for part in parts)
    total = paper.add_sums(own, [other])
    got = paper.weights(total, 72)
    torch.testing.assert_close(got.token_k, want.token_k)
    torch.testing.assert_close(got.token_v, want.token_v)
    assert got.channel_k is not None
    assert want.channel_k is not None
    torch.testing.assert_close(got.channel_k, want.channel_k[:, :, :2])
    torch.testing.assert_close(
        paper.gate_distances(total), paper.gate_distances(whole), rtol=1e-5, atol=1e-5
    )


def test_an_anchor_shorter_than_the_placeholder_has_no_rows() -> None:
    with pytest.raises(ValueError, match="4 tokens does not cover 5"):
        paper.anchor_rows([0, 9], [9, 4], 5)


def test_the_following_text_needs_distances_per_channel() -> None:
    (k, v), (base_k, base_v) = random_spans(0, 5, 5)
    rows = paper.anchor_rows([0], [5], 5)
    weights = paper.weights(paper.distance_sums(k, v, base_k, base_v, rows), 72)
    with pytest.raises(ValueError, match="per channel"):
        weights.following(base_k, base_v, rows)


@pytest.mark.parametrize("spans", [[(4, 2)], [(3, 6), (5, 8)], [(0, 11)]])
def test_placeholders_out_of_order_or_outside_the_prompt_are_refused(
    spans: list[tuple[int, int]],
) -> None:
    with pytest.raises(ValueError, match="not in order in 10 tokens"):
        paper.following_segments(spans, 10)


def collected(
    case: Case, consumer: str, span_: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """True minus base in a stretch of a consumer's prompt, by the kernels' reference."""
    stretch = slice(*span_)
    cache = Cache(case.spans(f"{consumer}_real"))
    slots = cache.slots[0][stretch]
    base_k, base_v = (x[stretch] for x in case.spans(f"{consumer}_base"))
    out_k, out_v = torch.empty_like(base_k), torch.empty_like(base_v)
    reference.collect(cache.group, slots, still(slots), base_k, base_v, out_k, out_v)
    return out_k, out_v


def check_entry(
    case: Case,
    prefix: str,
    consumer: str,
    here: tuple[int, int],
    behind: tuple[int, int],
) -> None:
    """Deviations of one consumer, and its base rows, as the entry holds them; exact."""
    for kind, stretch in (("ph", here), ("pf", behind)):
        for x, got in zip("kv", collected(case, consumer, stretch), strict=True):
            assert torch.equal(got, span(case.want(f"{prefix}{consumer}_{kind}_d{x}")))
    for x, base in zip("kv", case.spans(f"{consumer}_base"), strict=True):
        assert torch.equal(base[slice(*here)], span(case.want(f"{prefix}{x}")))


@pytest.mark.parametrize("case", cases("capture_both"))
def test_dense_results_become_anchors_split_at_the_placeholders(case: Case) -> None:
    spans = case.params["spans"]
    segments = paper.following_segments(list(spans.values()), case.params["total_tokens"])
    earlier = 0
    for (slot, here), behind in zip(spans.items(), segments, strict=True):
        check_entry(case, f"{slot}.", "A", here, behind)
        assert case.expected["lengths"][slot] == [here[1] - here[0], earlier]
        earlier += here[1] - here[0]


def stored_lengths(pool: PaperPool) -> dict[str, list[int]]:
    anchors = [(message, pool.anchor(message)) for message in pool.messages]
    return {message: [a.tokens, a.earlier_tokens] for message, a in anchors if a}


@pytest.mark.parametrize("case", cases("capture"))
def test_a_second_consumer_adds_its_deviations_and_what_was_shareable_is_not_stored(
    case: Case,
) -> None:
    p, message = case.params, case.params["message"]
    pools = {slot: PaperPool(paper_quirks=True) for slot in p["new_anchor_flags"]}
    for slot, new in p["new_anchor_flags"].items():
        pools[slot].predict(message, new)
    for consumer, spans in p["spans"].items():
        segments = paper.following_segments(list(spans.values()), p["total_tokens"][consumer])
        earlier = 0
        for (slot, here), behind in zip(spans.items(), segments, strict=True):
            tokens = here[1] - here[0]
            if pools[slot].store(message, consumer, tokens, earlier).stored:
                check_entry(case, f"after_{consumer}_", consumer, here, behind)
            earlier += tokens
        lengths = {slot: stored_lengths(pool) for slot, pool in pools.items()}
        assert lengths == case.expected[f"after_{consumer}_lengths"]
        found = {slot: pool.messages for slot, pool in pools.items()}
        assert found == case.expected[f"after_{consumer}_pools"]


def table(inverse: torch.Tensor, positions: int, scaling: float = 1.0) -> Rope:
    """cos and sin as vLLM keeps them: single-precision angles, magnitude included."""
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
    return Rope(angle.cos() * scaling, angle.sin() * scaling, interleaved=False)


@pytest.mark.parametrize("case", cases("rope"))
def test_keys_move_as_in_the_papers_code(case: Case) -> None:
    p = case.params
    k, v = span(case.given("k")), span(case.given("v"))
    positions = torch.arange(len(k)) + max(0, -min(m["offset"] for m in p["moves"]))
    reach = int(positions.max()) + sum(abs(m["offset"]) for m in p["moves"]) + 1
    scaling = p["attention_scaling"]
    rope = table(case.want("inv_freq"), reach, scaling)
    for i, move in enumerate(p["moves"]):
        k, v, old = (x[move["drop"] :] for x in (k, v, positions))
        positions = old + move["offset"]
        k = reference.turn_keys(k.float(), rope.move(old, positions), False).to(k.dtype)
        case.check(k, span(case.want(f"k{i}")) / scaling)
    assert torch.equal(v.float(), span(case.want("v")))


@pytest.mark.parametrize("case", cases("rope_freq"))
def test_frequencies_of_vllms_table_are_those_of_the_papers_code(case: Case) -> None:
    vllm_config = pytest.importorskip("vllm.config")
    layers = pytest.importorskip("vllm.model_executor.layers.rotary_embedding")
    from kvcomm_vllm.worker.rope import rope_of

    p = case.params
    parameters = {"rope_type": "default", **(p["scaling"] or {}), "rope_theta": p["theta"]}
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        module = layers.get_rope(p["head_dim"], 16, True, parameters, torch.float32)
    rope = rope_of(module)
    case.check(torch.atan2(rope.sin[1], rope.cos[1]), case.want("inv_freq"))


@pytest.mark.parametrize("case", cases("prompt"))
def test_a_whole_prompt_is_assembled_and_corrected_as_in_the_papers_code(case: Case) -> None:
    p, ids = case.params, case.params["ids"]
    rope = table(torch.tensor(case.expected["inv_freq"]), 64)
    base, reuse, tokens = [case.spans("p0")], [case.spans("p0")], list(ids["p0"])

    def moved(name: str, drop: int, old: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (x[drop:] for x in case.spans(name))
        at = torch.arange(len(k)) + old
        new = torch.arange(len(k)) + len(tokens)
        assert torch.equal(new - at, torch.full_like(at, shift))
        tokens.extend(ids[name][drop:])
        return reference.turn_keys(k, rope.move(at, new), False), v

    for i, segment in enumerate(p["segments"]):
        k, v = moved(f"ph{i}", segment["drop"], segment["drop"], segment["ph_shift"])
        following = moved(f"p{i + 1}", 0, segment["end"], segment["prefix_shift"])
        anchors = Anchors(case, [f"ph{i}_a{j}" for j in range(len(p["anchor_tokens"][i]))], k, v)
        here, behind = anchors.changes(anchors.weights(), len(following[0]))
        base += [(k, v), following]
        reuse += [paper.blend(k, v, here), paper.blend(*following, behind)]
    assert tokens == case.expected["prompt_ids"]
    for x in range(2):
        name = "kv"[x]
        case.check(torch.cat([b[x] for b in base]), span(case.want(f"base_{name}")))
        got = torch.cat([r[x] for r in reuse])[:-1]
        assert len(got) == case.expected["reuse_rows"]
        case.check(got, span(case.want(f"reuse_{name}")), "outputs_atol")
