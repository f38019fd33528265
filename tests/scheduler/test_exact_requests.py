# SPDX-License-Identifier: Apache-2.0
"""Who does not reuse gets what plain vLLM gives: the same steps, and none but exact pages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import cached_pages, exactly_hashed
from engine_without_worker import EngineWithoutWorker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=8),
    num_blocks=st.integers(32, 64),
    budget=st.sampled_from([16, 64]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_requests_that_share_nothing_are_scheduled_as_by_plain_vllm(
    make_engine: Make,
    plain_engine: Make,
    lengths: list[tuple[int, int]],
    num_blocks: int,
    budget: int,
    policy: str,
) -> None:
    """Token counts and pages of every step, preemptions included."""
    engine_options = {"num_blocks": num_blocks, "budget": budget, "policy": policy}
    ours = make_engine(**engine_options, keep_last_page=False)
    plain = plain_engine(**engine_options)
    for engine in (ours, plain):
        for number, (prompt, answer) in enumerate(lengths):
            name, texts = f"r{number}", (words(("p", number), prompt), words(("a", number), answer))
            engine.add(name, *texts, priority=-number)
            engine.step()
        engine.run()
    assert ours.trace == plain.trace


def reuse_a_lot(engine: EngineWithoutWorker) -> None:
    engine.serve("first", [*words("one", 20), *QUESTION], words("a1", 12))
    for number in range(4):
        prompt = [*words("mine", 16), *words(number, 4 * number + 1), *QUESTION, *words("tail", 9)]
        served = engine.serve(f"agent{number}", prompt, words(("answer", number), 20))
        assert served.report["reused"] > 0


@pytest.mark.parametrize("hints", [{"mode": "off"}, None])
def test_after_any_reuse_an_exact_request_finds_exact_pages_only(
    make_engine: Make, hints: dict[str, str] | None
) -> None:
    """Mode off, or sharing nothing but an exact prefix: local is what plain vLLM could have had."""
    engine = make_engine()
    reuse_a_lot(engine)
    engine.half.store.clear([])  # no source is left: what follows can only use vLLM's own lookup
    number = 2
    prompt = [*words("mine", 16), *words(number, 9), *QUESTION, *words("tail", 9), 7]
    exact = engine.serve("exact", prompt, hints=hints)
    # 16 of the agent's prefix and 9 of its own text are exact, 2 of the seam as well: 6 full pages
    assert exact.spans("local") == [(0, 24)]
    assert exact.loaded == []


def test_no_private_page_can_be_looked_up_by_its_text(make_engine: Make) -> None:
    engine = make_engine()
    reuse_a_lot(engine)
    private = {block_hash for block_hash, _ in cached_pages(engine)} - engine.exact_pages.keys()
    assert private
    for block_hash, block in cached_pages(engine):
        exact = engine.memory.exact[block.block_id * 4 : block.block_id * 4 + 4]
        assert (block_hash in private) or exact.all()
    assert exactly_hashed(engine)


def test_a_page_that_fills_up_after_the_prompt_is_private_too(make_engine: Make) -> None:
    """The reused text ends inside a page whose hash vLLM computes only when the answer fills it."""
    engine = make_engine(block_size=16, min_span_tokens=8, mode="rotate")
    engine.serve("first", [*words("one", 8), *QUESTION])
    prompt = [*QUESTION[:12], 3]
    second = engine.serve("second", prompt, words("answer", 30), hints={"spans": [[0, 12]]})
    assert second.report["reused"] == 12
    engine.half.store.clear([])
    follow_up = engine.serve("third", [*prompt, *words("answer", 30), 4], hints={"mode": "off"})
    assert follow_up.spans("local") == []


def test_a_dropped_plan_restores_the_exact_chain(make_engine: Make) -> None:
    """vLLM may take no external token although it was offered some (prompt_logprobs)."""
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION])
    prompt = [*words("two", 8), *QUESTION, *words("tail", 9)]
    request = engine.add("second", prompt)
    offered = engine.half.match(request, 0)
    assert offered
    assert engine.half.states["second"].taint.first_block is not None
    blocks = engine.scheduler.kv_cache_manager.empty_kv_cache_blocks
    engine.connector.update_state_after_alloc(request, blocks, 0)
    exact = [block_hash in engine.exact_pages for block_hash in map(bytes, request.block_hashes)]
    assert all(exact)
    assert engine.half.pages.held == 0


def test_prompt_logprobs_are_computed_from_scratch(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 8), *QUESTION, 3], prompt_logprobs=1)
    assert second.spans("computed") == [(0, 49)]
    assert second.declined == ["prompt_logprobs"]
    third = engine.serve("third", [*words("three", 8), *words("two", 8), *QUESTION, 3])
    assert third.report["reused"] > 40, "its own KV is exact and may be reused"
