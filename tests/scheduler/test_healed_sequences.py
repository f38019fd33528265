# SPDX-License-Identifier: Apache-2.0
"""What was served approximately becomes exact while vLLM is idle, for all who come later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from vllm.distributed.kv_events import BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvcomm_vllm.messages import WorkerFacts
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.index import Sequence

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
PROMPT = [*words("agent", 10), *QUESTION, *words("tail", 6)]
ANSWER = words("answer", 13)
TURN = [*PROMPT, *ANSWER, *words("next", 9)]
STORED = len(PROMPT) + len(ANSWER) - 1  # the last token of an answer has no KV
EXACT = 12  # the agent's own text and the question's seam were computed where they stand


@pytest.fixture
def healed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tokens healed; vLLM takes the counts away with every step."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(
        KVCommStats,
        "count_healed",
        lambda stats, computed, from_others: found.update(computed=computed, found=from_others),
    )
    return found


def answer(engine: EngineWithoutWorker, **options) -> None:
    """One agent reads the question; another one is served with its KV, and answers."""
    engine.serve("source", [*words("one", 20), *QUESTION], **options)
    assert engine.serve("answers", PROMPT, ANSWER, **options).report["reused"] > 30


def stored(engine: EngineWithoutWorker, owner: str = "answers") -> Sequence:
    return next(s for s in engine.half.store.index._row_of if s.owner == owner)


def recomputed(engine: EngineWithoutWorker) -> list[int]:
    """Positions that audits have computed, in their order."""
    holes = [op.hole for op in engine.lessons if op.hole is not None]
    return [hole.start + n for hole in holes for n in range(len(hole.tokens))]


@pytest.mark.parametrize("mode", ["rotate", "seam", "anchor"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_follow_up_turn_reads_exact_pages(make_engine: Make, mode: str, pipeline: int) -> None:
    engine = make_engine(mode=mode, pipeline=pipeline, audit_tokens=16)
    answer(engine)
    engine.idle()
    assert stored(engine).first_approximate is None
    follow_up = engine.serve("turn2", TURN)
    assert follow_up.report["local"] == STORED // 4 * 4
    assert follow_up.report["local_approximate"] == 0
    assert follow_up.report["generation"] == 0
    engine.idle()
    check_idle(engine)


def test_an_exact_request_finds_healed_pages_as_anybody_s(make_engine: Make) -> None:
    engine = make_engine()
    answer(engine)
    assert engine.serve("before", PROMPT, hints={"mode": "off"}).report["local"] == EXACT
    other = make_engine()
    answer(other)
    other.idle()
    assert other.serve("after", PROMPT, hints={"mode": "off"}).report["local"] == 52


@pytest.mark.parametrize(("heal", "copies", "from_approximate"), [("idle", 1, 0), ("off", 2, 40)])
def test_who_quotes_healed_text_is_one_copy_away_from_exact(
    make_engine: Make, heal: str, copies: int, from_approximate: int
) -> None:
    engine = make_engine(heal=heal)
    long = words("a long answer", 40)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.serve("answers", PROMPT, long)
    engine.idle()
    reads = engine.serve("reads", [*words("third", 15), *long, 5, 6])
    assert reads.report["reused"] > 30
    assert reads.report["generation"] == copies
    assert abs(reads.report["from_approximate"] - from_approximate) < 6
    engine.idle()
    check_idle(engine)


def test_of_two_sources_the_healed_one_is_taken(make_engine: Make) -> None:
    """Token by token the youngest generation, though the other one is newer."""
    engine = make_engine(num_blocks=256)
    long = words("a long answer", 40)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.serve("answers", PROMPT, long)
    engine.idle()
    assert stored(engine).generation == 0
    engine.add("copies", [*words("second", 15), *long, 5, 6])
    engine.run("copies")
    assert stored(engine, "copies").generation == 1
    engine.add("reads", [*words("third", 15), *long, 7, 8])
    while "reads" in engine.scheduler.requests:
        engine.step()
    (plan,) = engine.served["reads"].loaded
    # an answer's last token was never forwarded where it was generated
    assert engine.served["reads"].report["from_approximate"] <= 1
    assert plan.loads[0].length > 30
    assert plan.loads[0].source_start >= len(PROMPT), "as it stands in the healed sequence"


def test_healing_and_learning_share_what_they_compute(make_engine: Make) -> None:
    engine = make_engine(mode="anchor", seam_tokens=4, num_blocks=256, audit_tokens=8)
    for number in range(2):
        question = words(f"question {number}", 40)
        engine.serve(f"first {number}", [*words("one", 20), *question, 5])
        engine.serve(f"second {number}", [*words("agent", 20), *question, *words("tail", 9)])
    engine.idle()
    both = engine.lessons[0].number
    pieces = [op for op in engine.lessons if op.number == both]
    holes = [op.hole for op in pieces if op.hole is not None]
    positions = [hole.start + n for hole in holes for n in range(len(hole.tokens))]
    assert len(positions) == len(set(positions)) > 0
    taught = next(n for n, op in enumerate(pieces) if op.spans)
    assert taught < len(pieces) - 1, "learned as soon as it can be, then the rest is healed"
    assert stored(engine, "second 1").first_approximate is None
    assert engine.half.modes["anchor"].table.counts() == (1, 1)
    check_idle(engine)


def test_healing_needs_no_audits_and_heal_off_heals_nothing(make_engine: Make) -> None:
    healing, off = make_engine(audits=False), make_engine(heal="off", audits=False)
    for engine in (healing, off):
        answer(engine)
        engine.idle()
    assert stored(healing).first_approximate is None
    assert stored(off).first_approximate == EXACT
    assert not off.lessons


def test_nothing_is_healed_where_other_engines_would_have_to_wait(make_engine: Make) -> None:
    engine = make_engine()
    facts = WorkerFacts(None, "", "", rooms={"anchor": 8, "paper": 0})
    engine.half.workers_ready([facts, replace(facts, alone=False)])
    answer(engine)
    engine.idle()
    assert not engine.lessons


def test_a_request_in_the_middle_of_healing_loses_no_page_that_is_ready(
    make_engine: Make, healed: Counter[str]
) -> None:
    engine = make_engine(audit_tokens=8)
    answer(engine)
    while len(engine.lessons) < 3:
        engine.step()
    assert stored(engine).first_approximate == EXACT + 3 * 8
    assert engine.half.pages.held == 0
    engine.serve("user", words("user", 30))
    assert stored(engine).first_approximate == EXACT + 3 * 8
    engine.idle()
    assert stored(engine).first_approximate is None
    assert recomputed(engine) == list(range(EXACT, STORED)), "none twice"
    assert healed["computed"] == STORED - EXACT
    check_idle(engine)


def test_a_follow_up_turn_in_the_middle_of_healing_goes_on_from_both_kinds_of_pages(
    make_engine: Make,
) -> None:
    engine = make_engine(audit_tokens=8)
    answer(engine)
    while len(engine.lessons) < 3:
        engine.step()
    turn = engine.serve("turn2", TURN, words("again", 10))
    assert turn.report["local"] == STORED // 4 * 4
    assert turn.report["local_approximate"] == STORED // 4 * 4 - EXACT - 3 * 8
    engine.idle()
    assert stored(engine, "turn2").first_approximate is None
    assert stored(engine).first_approximate is None
    check_idle(engine)


def test_pages_that_were_given_away_during_a_piece_are_not_kept(make_engine: Make) -> None:
    """The request comes and goes before the workers have answered."""
    engine = make_engine(audit_tokens=8, pipeline=2)
    answer(engine)
    while not engine.lessons:
        engine.step()
    (begun,) = engine.lessons
    assert begun.hole is not None
    engine.add("user", words("user", 60))
    engine.schedule()
    _, pages = engine.trace[-1]["user"]
    assert begun.block_ids[begun.hole.start // engine.block_size] in pages
    engine.abort("user")
    engine.drain()
    assert stored(engine).first_approximate == EXACT
    engine.step()
    assert engine.lessons[1].hole == begun.hole
    engine.idle()
    assert stored(engine).first_approximate is None
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_reset_in_the_middle_of_healing_succeeds_and_forgets_it(
    make_engine: Make, pipeline: int
) -> None:
    engine = make_engine(audit_tokens=8, pipeline=pipeline)
    answer(engine)
    while len(engine.lessons) < 3:
        engine.step()
    assert engine.half.lessons.pending
    assert engine.scheduler.reset_prefix_cache()
    engine.memory.weights_now += 1
    engine.drain()
    engine.idle()
    assert not engine.half.lessons.pending
    assert engine.serve("again", PROMPT).report["local"] == 0
    engine.idle()
    check_idle(engine)


def test_what_somebody_had_computed_exactly_is_not_computed_again(
    make_engine: Make, healed: Counter[str]
) -> None:
    engine = make_engine()
    answer(engine)
    engine.serve("exact", [*PROMPT, *ANSWER, 5, 6, 7, 8], hints={"mode": "off"})
    engine.idle()
    assert recomputed(engine) == list(range(STORED // 4 * 4, STORED)), "its last, partly full page"
    assert healed == {"found": STORED // 4 * 4 - EXACT, "computed": STORED % 4}
    check_idle(engine)


def test_turns_of_one_conversation_are_healed_once(make_engine: Make, healed: Counter[str]) -> None:
    engine = make_engine(num_blocks=256)
    answer(engine)
    engine.serve("turn2", TURN, words("again", 10))
    assert len(engine.half.lessons._waiting) == 2
    engine.idle()
    assert stored(engine).first_approximate is stored(engine, "turn2").first_approximate is None
    positions = recomputed(engine)
    assert len(positions) - len(set(positions)) <= STORED % 4
    check_idle(engine)


def test_tenants_heal_apart(make_engine: Make) -> None:
    engine = make_engine(num_blocks=256)
    answer(engine, salt="a")
    engine.idle()
    off = {"mode": "off"}
    assert engine.serve("b", PROMPT, hints=off, salt="b").report["local"] == 0
    assert engine.serve("nobody", PROMPT, hints=off).report["local"] == 0
    assert engine.serve("a", PROMPT, hints=off, salt="a").report["local"] == 52


def test_healed_pages_are_announced_as_those_of_a_request_are(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    answer(engine)
    engine.pool.enable_kv_cache_events = True
    taken: list[KVCacheEvent] = []
    take = engine.pool.take_events
    monkeypatch.setattr(engine.pool, "take_events", lambda: taken.extend(take()) or [])
    engine.idle()
    told = [event for event in taken if isinstance(event, BlockStored)]
    full = stored(engine).block_hashes[EXACT // 4 : STORED // 4]
    assert [event.block_hashes for event in told] == [
        [maybe_convert_block_hash(block_hash)] for block_hash in full
    ]
    tokens = [token for event in told for token in event.token_ids]
    assert tokens == [*PROMPT, *ANSWER][EXACT : STORED // 4 * 4]


def test_private_pages_make_room_for_healed_ones(make_engine: Make) -> None:
    engine = make_engine()
    answer(engine)
    private = stored(engine).block_hashes[EXACT // 4 :]
    engine.idle()
    pages = engine.half.pages
    assert pages.leading(private) == len(private), "they stay until somebody needs room"
    healed = list(stored(engine).block_hashes)
    blocks = engine.pool.get_new_blocks(len(private))
    engine.pool.free_blocks(blocks)
    assert not pages.cached(private)
    assert pages.leading(healed) == len(healed)


def test_the_end_of_a_healed_text_is_evicted_before_its_beginning(make_engine: Make) -> None:
    engine = make_engine(audit_tokens=8)
    answer(engine)
    engine.idle()
    hashes = stored(engine).block_hashes
    queue = [block.block_id for block in engine.pool.free_block_queue.get_all_free_blocks()]
    places = [queue.index(engine.half.pages.lookup(one).block_id) for one in hashes[:-1]]
    assert places == sorted(places, reverse=True)
    assert places[0] == len(queue) - 1


def test_a_failed_piece_ends_the_healing_of_its_request_alone(make_engine: Make) -> None:
    engine = make_engine()
    answer(engine)
    engine.fail_lesson = lambda op: True
    engine.idle()
    assert stored(engine).first_approximate == EXACT
    assert engine.serve("turn2", TURN).report["local"] == STORED // 4 * 4
    engine.fail_lesson = lambda op: False
    engine.idle()
    assert stored(engine, "turn2").first_approximate is None
    check_idle(engine)


def test_what_left_the_index_is_not_healed(make_engine: Make) -> None:
    engine = make_engine(max_sequences=2, audit_idle_seconds=3600, audits=False)
    answer(engine)
    for number in range(3):
        engine.serve(f"user {number}", words(f"user {number}", 30))
    engine.half.lessons.config = replace(engine.half.config, audit_idle_seconds=0)
    engine.idle()
    assert not engine.lessons
    assert not engine.half.lessons.pending


def test_a_pool_without_room_heals_nothing_and_serves(make_engine: Make) -> None:
    engine = make_engine(num_blocks=30)
    answer(engine)
    engine.idle()
    assert not engine.lessons
    assert engine.serve("turn2", TURN).report["local"] == STORED // 4 * 4
    engine.idle()
    check_idle(engine)
