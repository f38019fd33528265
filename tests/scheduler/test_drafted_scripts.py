# SPDX-License-Identifier: Apache-2.0
"""Random agents in an engine that guesses tokens ahead; every step is checked."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engine_without_worker import EngineWithoutWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pause_scripts import OperatedCrowd
from test_random_scripts import engines, play, thorough

Make = Callable[..., EngineWithoutWorker]

pytestmark = pytest.mark.slow

drafts = st.sampled_from([1, 3, 7])  # of pages with 4 tokens and more
pipelines = st.sampled_from([1, 2])
layered = st.sampled_from(["draft_model", "eagle"])


def check_answers(engine: EngineWithoutWorker) -> None:
    """Guesses change when a token comes, never which one."""
    for name, served in engine.served.items():
        told = [token for output in served.outputs for token in output.new_token_ids]
        assert told == served.text.tokens[served.prompt_tokens :][: len(told)].tolist(), name


@thorough
@given(options=engines, seed=st.integers(0, 2**32), drafts=drafts, pipeline=pipelines)
def test_no_guess_that_was_wrong_is_ever_read(
    make_engine: Make, options: dict[str, object], seed: int, drafts: int, pipeline: int
) -> None:
    engine = make_engine(**options, drafts=drafts, pipeline=pipeline)
    engine.drafter.share = random.Random(seed).choice([0.1, 0.6, 0.95])
    play(engine, seed, steps=200)
    check_answers(engine)


@settings(thorough, max_examples=8)
@given(options=engines, seed=st.integers(0, 2**32), drafts=drafts)
def test_a_load_that_fails_beside_guesses_reaches_nobody(
    make_engine: Make, options: dict[str, object], seed: int, drafts: int
) -> None:
    engine = make_engine(**options, drafts=drafts)
    play(engine, seed, steps=150, failures=True)
    check_answers(engine)


@settings(thorough, max_examples=8)
@given(options=engines, seed=st.integers(0, 2**32), drafts=drafts, pipeline=pipelines)
def test_priorities_preempt_what_guesses(
    make_engine: Make, options: dict[str, object], seed: int, drafts: int, pipeline: int
) -> None:
    engine = make_engine(**options, drafts=drafts, pipeline=pipeline, policy="priority")
    play(engine, seed, steps=200)
    check_answers(engine)


@settings(thorough, max_examples=8)
@given(options=engines, seed=st.integers(0, 2**32), drafts=drafts, pipeline=pipelines)
def test_pages_of_guesses_leave_the_cache_and_come_back(
    make_engine: Make, options: dict[str, object], seed: int, drafts: int, pipeline: int
) -> None:
    tiers = {"host_gb": 0.0005}
    engine = make_engine(**options, tiers=tiers, drafts=drafts, pipeline=pipeline)
    play(engine, seed, steps=150)
    check_answers(engine)
    assert not engine.half.tiers.due()


@settings(thorough, max_examples=8)
@given(options=engines, seed=st.integers(0, 2**32), drafts=drafts)
def test_an_operator_pauses_and_resets_what_guesses(
    make_engine: Make, options: dict[str, object], seed: int, drafts: int
) -> None:
    engine = make_engine(**options, drafts=drafts)
    play(engine, seed, steps=150, crowd=OperatedCrowd)
    check_answers(engine)


@thorough
@given(
    options=engines,
    seed=st.integers(0, 2**32),
    drafts=drafts,
    pipeline=pipelines,
    layered=layered,
)
def test_drafters_with_layers_have_room_and_read_nothing_that_is_wrong(
    make_engine: Make,
    options: dict[str, object],
    seed: int,
    drafts: int,
    pipeline: int,
    layered: str,
) -> None:
    """vLLM reserves slots ahead for them, and takes a page less of what it has cached."""
    engine = make_engine(**options, drafts=drafts, pipeline=pipeline, layered=layered)
    play(engine, seed, steps=200, failures=pipeline == 1)
    check_answers(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_guesses_are_right_and_wrong_and_much_is_reused_beside_them(
    make_engine: Make, pipeline: int
) -> None:
    """Guards the other tests here."""
    engine = make_engine(num_blocks=600, drafts=3, pipeline=pipeline)
    play(engine, seed=1, steps=150)
    check_answers(engine)
    reports = [served.report for served in engine.served.values() if served.report]
    assert sum(report["reused"] > 0 for report in reports) > len(reports) / 5
    assert engine.drafter.right > 50
    assert engine.drafter.wrong > 50
    assert engine.lessons, "some of it was healed"
