# SPDX-License-Identifier: Apache-2.0
"""Random agents under an operator who pauses, resumes, resets and replaces the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_without_worker import EngineWithoutWorker
from hypothesis import given
from hypothesis import strategies as st
from scripts import words
from test_random_scripts import Crowd, engines, play, thorough
from vllm.v1.core.sched.interface import PauseState

Make = Callable[..., EngineWithoutWorker]

pytestmark = pytest.mark.slow


class OperatedCrowd(Crowd):
    """Now and then two agents hear the same, and the engine comes to rest: so it learns."""

    def act(self) -> None:
        engine, choice = self.engine, self.random.random()
        if engine.scheduler.pause_state != PauseState.UNPAUSED:
            self.while_paused(choice)
        elif choice < 0.15:
            self.hear()
        elif choice < 0.20:
            engine.scheduler.set_pause_state(self.random.choice(list(PauseState)[1:]))
        else:
            super().act()

    def hear(self) -> None:
        self.count += 1
        message = words(self.count, self.random.randint(20, 45))
        for number, agent in enumerate(self.prefixes[:2]):
            self.engine.serve(f"{self.count} heard by {number}", [*agent, *message, 7])
        for _ in range(self.random.randint(0, 25)):
            self.engine.step()

    def while_paused(self, choice: float) -> None:
        engine, learned = self.engine, len(self.engine.lessons)
        if choice < 0.2:
            self.new_weights()
        elif choice < 0.5:
            self.arrive()
        elif choice < 0.8:
            engine.scheduler.set_pause_state(PauseState.UNPAUSED)
            return
        engine.rest()
        engine.drain()
        assert len(engine.lessons) == learned

    def new_weights(self) -> None:
        """As vLLM does behind a pause: nothing is under way when its cache is emptied."""
        engine = self.engine
        engine.rest()
        engine.drain()
        assert engine.scheduler.reset_prefix_cache(
            reset_running_requests=True, reset_connector=self.random.random() < 0.2
        )
        engine.memory.weights_now += 1

    def end(self) -> None:
        self.engine.scheduler.set_pause_state(PauseState.UNPAUSED)


@thorough
@given(options=engines, seed=st.integers(0, 2**32), pipeline=st.sampled_from([1, 2]))
def test_no_script_mixes_old_weights_with_new_ones(
    make_engine: Make, options: dict[str, object], seed: int, pipeline: int
) -> None:
    roomy = {"mode": "anchor", "anchor_seam_tokens": 0, "num_blocks": 200, "audit_tokens": 32}
    play(make_engine(**options | roomy, pipeline=pipeline), seed, steps=100, crowd=OperatedCrowd)


def test_in_these_scripts_placeholders_learn_and_correct_and_weights_change(
    make_engine: Make,
) -> None:
    """Guards the other test here."""
    corrected = changes = 0
    for seed in range(2):
        engine = make_engine(mode="anchor", num_blocks=600, audit_tokens=32)
        play(engine, seed, steps=150, crowd=OperatedCrowd)
        corrected += sum(served.report.get("corrected", 0) for served in engine.served.values())
        changes += engine.memory.weights_now
    assert corrected > 0
    assert changes > 0
