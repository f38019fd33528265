# SPDX-License-Identifier: Apache-2.0
"""The paper's pool: with quirks it evicts as the paper's code does, without them it stays sound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_vectors import Case, cases, span

from kvcomm_vllm.scheduler.modes.paper.gate import decide
from kvcomm_vllm.scheduler.modes.paper.pool import PaperPool

TOKENS = 5
MESSAGES = [f"m{i}" for i in range(7)]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.sampled_from("ABC"), st.sampled_from(MESSAGES)),
        st.tuples(st.just("count"), st.sampled_from(MESSAGES), st.integers(1, 3)),
        st.tuples(st.just("register"), st.sampled_from(MESSAGES)),
    ),
    max_size=40,
)


def run(pool: PaperPool, op: Iterable[Any]) -> tuple[list[str], list[str]]:
    """Apply one step of a script; what was evicted, and what of it held no anchor."""
    match list(op):
        case ["register", message]:
            pool.predict(message, new_anchor=True)
        case ["flag", message, new]:
            pool.predict(message, new_anchor=new)
        case ["count", message, activations]:
            keys = list(pool._counts)
            pool.activate([keys.index(message)] * activations if message in keys else [])
        case ["store", _consumer, message]:
            stored = pool.store(message, TOKENS)
            if stored.evicted is not None:
                return [stored.evicted], [] if stored.freed else [stored.evicted]
        case other:
            raise AssertionError(f"unknown step {other}")
    return [], []


def counts_of(pool: PaperPool) -> list[list[object]]:
    return [[message, count] for message, count in pool._counts.items()]


@pytest.mark.parametrize("case", cases("evict"))
def test_with_quirks_every_golden_script_evicts_the_same(case: Case) -> None:
    pool = PaperPool(case.params["max_anchor_num"], case.params["window"], paper_quirks=True)
    order: list[str] = []
    for step in case.expected["steps"]:
        evicted, in_vain = run(pool, step["op"])
        order += evicted
        assert evicted == step.get("evicted", []), step
        assert in_vain == step.get("evicted_without_entry", []), step
        assert len(pool) == step["size"], step
        if "pool" in step:
            assert pool.messages == step["pool"], step
            assert counts_of(pool) == step["counts"], step
    final = case.expected["final"]
    assert order == case.expected["eviction_order"]
    assert pool.messages == final["pool"]
    assert counts_of(pool) == final["counts"]


@pytest.mark.parametrize("case", cases("online"))
def test_gate_and_pool_together_take_the_golden_course(case: Case) -> None:
    p = case.params
    pool = PaperPool(p["max_anchor_num"], p["window"], paper_quirks=True)
    values: dict[str, Any] = {}
    for step in case.expected["steps"]:
        message, tokens = step["message"], step["tokens"]
        values[message] = span(case.given(f"{message}_v"))
        assert len(values[message]) == tokens
        distances = [
            float((values[message] - values[m][:tokens]).square().sum().sqrt())
            if len(values[m]) >= tokens
            else float("nan")
            for m in pool.messages
        ]
        decision = decide(
            distances,
            pool.lengths,
            tokens,
            gamma=p["gamma"],
            top_p=p["top_p"],
            paper_quirks=True,
        )
        assert decision.new_anchor == step["new_anchor"], step
        if "entropy_bits" in step:
            assert decision.entropy_bits == pytest.approx(step["entropy_bits"], abs=2e-5)
            assert decision.limit_bits == pytest.approx(step["limit_bits"], rel=1e-6)
        evicted = []
        if decision.new_anchor:
            pool.predict(message, new_anchor=True)
            stores = [pool.store(message, tokens) for _consumer in "AB"]
            evicted = [s.evicted for s in stores if s.evicted is not None]
        else:
            pool.predict(message, new_anchor=False)
            pool.activate(decision.activated)
        assert evicted == step["evicted"], step
        assert pool.messages == step["pool"], step
        assert counts_of(pool) == step["counts"], step


@settings(deadline=None)
@given(STEPS, st.integers(1, 4), st.integers(1, 5))
def test_without_quirks_no_script_makes_the_pool_unsound(
    steps: list[tuple[Any, ...]], limit: int, window: int
) -> None:
    pool = PaperPool(limit, window)
    for step in steps:
        before, counts = pool.messages, dict(pool._counts)
        evicted, in_vain = run(pool, step)
        assert len(pool) <= limit
        assert list(pool._counts) == pool.messages
        assert in_vain == []
        kept = [m for m in before if m not in evicted]
        if step[0] == "store":
            message = step[2]
            assert message in pool
            assert (evicted != []) == (message not in before and len(before) == limit)
            assert pool.messages == kept + [message] * (message not in before)
            oldest = before[:window]
            assert all(counts[e] == min(counts[m] for m in oldest) for e in evicted)
            assert message not in evicted
        else:
            assert pool.messages == before


@pytest.mark.parametrize("paper_quirks", [False, True])
def test_a_message_the_gate_let_pass_is_not_stored(paper_quirks: bool) -> None:
    pool = PaperPool(2, paper_quirks=paper_quirks)
    pool.predict("m", new_anchor=False)
    assert not pool.store("m", 5).stored
    assert len(pool) == 0
    pool.predict("m", new_anchor=True)
    assert pool.store("m", 5).stored
    assert pool.lengths == [5]


@pytest.mark.parametrize("paper_quirks", [False, True])
def test_lengths_are_those_of_the_first_store(paper_quirks: bool) -> None:
    pool = PaperPool(2, paper_quirks=paper_quirks)
    pool.store("m", 5)
    pool.store("m", 7)
    assert pool.lengths == [5]


def test_activation_reaches_the_anchor_at_its_pool_index() -> None:
    pool = PaperPool(4)
    pool.predict("lost", new_anchor=True)
    for message in ("m0", "m1", "m2"):
        pool.store(message, 5)
    pool.activate((0, 2))
    assert counts_of(pool) == [["m0", 1], ["m1", 0], ["m2", 1]]


@pytest.mark.parametrize(("limit", "window"), [(0, 5), (20, 0)])
def test_a_pool_without_room_or_window_is_refused(limit: int, window: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        PaperPool(limit, window)
