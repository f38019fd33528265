# SPDX-License-Identifier: Apache-2.0
"""The paper's estimator against golden vectors of the paper's code: by formula, by kernels, and as
workers keep anchors.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import accumulate

import paper_formulas as formulas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_vectors import Case, cases, span
from paper_formulas import Pair

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels import packing, reference
from kvcomm_vllm.kernels.deviation import AnchorSum
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation
from kvcomm_vllm.messages import AnchorOp, AnchorRows, LoadOp
from kvcomm_vllm.scheduler.modes.paper.gate import covering_anchors
from kvcomm_vllm.scheduler.modes.paper.pool import PaperPool
from kvcomm_vllm.worker.corrections import paper_formulas as paper
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.corrections.paper import PaperArena
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.rope import Rope

OUTPUTS = ("ph_k", "ph_v", "pf_k", "pf_v")


class Anchors:
    """A pool's arenas, and the rows of the anchors that cover a message."""

    def __init__(self, case: Case, names: SequenceOf[str], k: torch.Tensor, v: torch.Tensor):
        stored = [case.spans(name) for name in names]
        lengths = [len(anchor_k) for anchor_k, _ in stored]
        starts = list(accumulate(lengths, initial=0))
        self.case, self.names, self.k, self.v = case, names, k, v
        self.index = covering_anchors(lengths, len(k))
        self.base_k = torch.cat([k[:0], *(anchor_k for anchor_k, _ in stored)])
        self.base_v = torch.cat([v[:0], *(anchor_v for _, anchor_v in stored)])
        place = [starts[i] for i in self.index], [lengths[i] for i in self.index]
        self.first = formulas.anchor_rows(*place, len(k))
        self.last = formulas.anchor_rows(*place, len(k), last=True)

    def sums(self) -> formulas.Sums:
        arenas = self.base_k, self.base_v
        return formulas.distance_sums((self.k, self.v), arenas, self.first, self.last)

    def weights(self, skip_layers: int = 1) -> formulas.Weights:
        temperature = self.case.params["temperature"]
        return formulas.weights(self.sums(), self.k[:1].numel(), temperature, skip_layers)

    def corrected(
        self, weights: formulas.Weights, following: Pair, consumer: str = ""
    ) -> tuple[Pair, Pair]:
        """The message and the text behind it."""
        tokens = len(following[0])
        starts = [i * tokens for i in self.index]
        rows = formulas.anchor_rows(starts, [tokens] * len(starts), tokens)
        here, behind = (self.changes(f"{consumer}{kind}") for kind in ("ph", "pf"))
        return (
            formulas.corrected((self.k, self.v), here, self.first, weights.token),
            formulas.corrected(following, behind, rows, weights.channel),
        )

    def changes(self, kind: str) -> Pair:
        """Arenas of deviations."""
        parts = [self.case.deltas(f"{name}_{kind}") for name in self.names]
        dk = torch.cat([self.k[:0, 1:], *(k for k, _ in parts)])
        return dk, torch.cat([self.v[:0, 1:], *(v for _, v in parts)])


def pool_of(case: Case, candidate: str = "cand") -> Anchors:
    names = [f"a{i}" for i in range(case.params["anchors"])]
    k = span(case.given(f"{candidate}_k"))
    return Anchors(case, names, k, span(case.given("cand_v")))


def check_outputs(case: Case, got: tuple[Pair, Pair], prefix: str = "") -> None:
    for name, tensor in zip(OUTPUTS, [*got[0], *got[1]], strict=True):
        case.check(tensor, span(case.want(f"{prefix}{name}")), "outputs_atol")


def check_weights(case: Case, anchors: Anchors, prefix: str = "") -> None:
    """Distances and weights of all layers, where the case has any."""
    if not case.wants(f"{prefix}w_ph_k"):
        assert not anchors.index or not len(anchors.k)
        return
    sums, weights, count = anchors.sums(), anchors.weights(0), anchors.k[:1].numel()
    for i, x in enumerate("kv"):
        token = paper.token_distances(sums.token[i], count)
        channel = paper.channel_distances(sums.channel[i])
        case.check(token, case.want(f"{prefix}d_ph_{x}")[:, 0, 0, 0, :, 0])
        case.check(channel, case.want(f"{prefix}d_pf_{x}")[:, :, 0])
        token_w, channel_w = weights.token[i], weights.channel[i]
        case.check(token_w, case.want(f"{prefix}w_ph_{x}")[:, 0, 0, 0, :, 0], "weights_atol")
        case.check(channel_w, case.want(f"{prefix}w_pf_{x}")[:, :, 0, :, 0], "weights_atol")


@pytest.mark.parametrize("case", cases("blend"))
def test_distances_weights_and_corrected_kv_are_the_golden_ones(case: Case) -> None:
    anchors, following = pool_of(case), case.spans("pf")
    assert anchors.index == case.expected["anchor_index"]
    check_weights(case, anchors)
    got = anchors.corrected(anchors.weights(), following)
    check_outputs(case, got)
    bases = [anchors.k, anchors.v, *following]
    for tensor, base in zip([*got[0], *got[1]], bases, strict=True):
        assert torch.equal(tensor[:, 0], base[:, 0])
        assert tensor.dtype == base.dtype
    if case.wants("gate_dist"):
        case.check(anchors.sums().square_v.sqrt(), case.want("gate_dist"))


@pytest.mark.parametrize("case", cases("blend_shared"))
def test_weights_may_be_shared_by_all_consumers_of_a_message(case: Case) -> None:
    first, second, following = pool_of(case), pool_of(case, "cand2"), case.spans("pf")
    assert first.index == case.expected["anchor_index"]
    check_weights(case, first, "first_")
    check_weights(case, second, "fresh_")
    check_outputs(case, first.corrected(first.weights(), following, "A_"), "first_")
    check_outputs(case, second.corrected(first.weights(), following, "B_"), "second_")
    check_outputs(case, second.corrected(second.weights(), following, "B_"), "fresh_")


class Cache:
    """Spans in strided pages without rotary embedding, one behind the other."""

    def __init__(self, *spans: Pair) -> None:
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

    def read(self, slots: torch.Tensor) -> Pair:
        rows = [packing.read(self.group, i, slots) for i in range(len(self.group.layers))]
        return torch.stack([k for k, _ in rows], 1), torch.stack([v for _, v in rows], 1)


@pytest.mark.parametrize("case", cases("blend"))
def test_sums_and_corrections_of_the_kernels_give_the_same_weights_and_kv(case: Case) -> None:
    anchors = pool_of(case)
    cache = Cache((anchors.k, anchors.v))
    slots, none = cache.slots[0], torch.zeros(len(anchors.k), 0)
    still, arenas = Rotation(none, none), (anchors.base_k, anchors.base_v)
    sums = reference.distance(cache.group, slots, still, *arenas, anchors.first)
    temperature, count = case.params["temperature"], anchors.k[:1].numel()
    wk, wv = (
        paper.softmax_weights(paper.token_distances(absolute, count), temperature)
        for absolute in (sums.abs_k, sums.abs_v)
    )
    change = AnchorSum(*anchors.changes("ph"), anchors.first, wk, wv, skip_layers=1)
    reference.load_corrected(cache.group, slots, slots, still, still, change)
    for name, tensor in zip(OUTPUTS[:2], cache.read(slots), strict=True):
        case.check(tensor, span(case.want(name)), "outputs_atol")
    if case.wants("gate_dist"):
        case.check(sums.square_v.sqrt(), case.want("gate_dist"))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=5), st.floats(0.1, 4))
def test_weights_add_up_to_one_and_follow_their_anchors(
    distances: list[float], temperature: float
) -> None:
    far = torch.tensor(distances)[:, None]
    weights = paper.softmax_weights(far, temperature)
    torch.testing.assert_close(weights.sum(0), torch.ones(1))
    torch.testing.assert_close(paper.softmax_weights(far.flip(0), temperature), weights.flip(0))
    assert bool((weights[far.argsort(0)[:, 0]].diff(dim=0) <= 0).all()), "nearer ones weigh more"


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        paper.softmax_weights(torch.ones(2), 0.0)


def check_entry(case: Case, prefix: str, consumer: str, here: tuple[int, int], end: int) -> None:
    """What an arena keeps of a message in one consumer's prompt, as the entry holds it; exact."""
    base, real = case.spans(f"{consumer}_base"), case.spans(f"{consumer}_real")
    cache, tokens = Cache(base, real), here[1] - here[0]
    pages = list(range(len(cache.group.layers[0])))
    none = torch.zeros(4 * len(pages), 0)
    group = LayerGroup((), cache.group, Rope(none, none, False), None)
    config = KVCommConfig.from_mapping({"mode": "paper", "paper": {"memory_mb": 1}}, "test")
    arena = PaperArena(Ground([group], config, 4, alone=True, single=True))
    rows = AnchorRows(3, tokens, end - here[1])
    at = LoadOp(pages, here[0], 0, len(base[0]) + here[0], tokens)
    arena.keep(pages, AnchorOp(at, rows))
    part = arena.parts[0]
    halves = zip("kv", part.base.chunk(2, -1), part.change.chunk(2, -1), strict=True)
    for i, (x, kept, change) in enumerate(halves):
        here_rows, behind_rows = slice(3, 3 + tokens), slice(3 + tokens, rows.end)
        assert torch.equal(kept[here_rows], span(case.want(f"{prefix}{x}")).to(kept.dtype))
        want = span(case.want(f"{prefix}{consumer}_ph_d{x}"))[:, 1:]
        assert torch.equal(change[here_rows], want.to(change.dtype))
        assert torch.equal(kept[behind_rows], real[i][here[1] : end])


def ends_of(spans: SequenceOf[tuple[int, int]], total: int) -> list[int]:
    """Where the text behind each message ends."""
    return [*(start for start, _ in spans[1:]), total]


@pytest.mark.parametrize("case", cases("capture_both"))
def test_dense_results_become_anchors_split_at_the_messages(case: Case) -> None:
    spans = case.params["spans"]
    ends = ends_of(list(spans.values()), case.params["total_tokens"])
    for (placeholder, here), end in zip(spans.items(), ends, strict=True):
        check_entry(case, f"{placeholder}.", "A", here, end)
        assert case.expected["lengths"][placeholder][0] == here[1] - here[0]


@pytest.mark.parametrize("case", cases("capture"))
def test_a_second_consumer_adds_its_deviations_and_what_was_shareable_is_not_stored(
    case: Case,
) -> None:
    p, message = case.params, case.params["message"]
    pools = {placeholder: PaperPool(paper_quirks=True) for placeholder in p["new_anchor_flags"]}
    for placeholder, new in p["new_anchor_flags"].items():
        pools[placeholder].predict(message, new)
    for consumer, spans in p["spans"].items():
        ends = ends_of(list(spans.values()), p["total_tokens"][consumer])
        for (placeholder, here), end in zip(spans.items(), ends, strict=True):
            if pools[placeholder].store(message, here[1] - here[0]).stored:
                check_entry(case, f"after_{consumer}_", consumer, here, end)
        found = {s: dict(zip(q.messages, q.lengths, strict=True)) for s, q in pools.items()}
        lengths = case.expected[f"after_{consumer}_lengths"]
        assert found == {s: {m: n for m, (n, _) in q.items()} for s, q in lengths.items()}
        assert {s: q.messages for s, q in pools.items()} == case.expected[f"after_{consumer}_pools"]


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
        base += [(k, v), following]
        reuse += anchors.corrected(anchors.weights(), following)
    assert tokens == case.expected["prompt_ids"]
    for x in range(2):
        name = "kv"[x]
        case.check(torch.cat([b[x] for b in base]), span(case.want(f"base_{name}")))
        got = torch.cat([r[x] for r in reuse])[:-1]
        assert len(got) == case.expected["reuse_rows"]
        case.check(got, span(case.want(f"reuse_{name}")), "outputs_atol")
