# SPDX-License-Identifier: Apache-2.0
"""Random agents, arrivals, ends and aborts in a pool that is too small; every step is checked."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from scripts import words

Make = Callable[..., EngineWithoutWorker]

pytestmark = pytest.mark.slow


IDLE_STEPS = 25


class Crowd:
    """Agents that quote shared messages, answer, continue conversations, retry, and hang up."""

    def __init__(self, engine: EngineWithoutWorker, seed: int, failures: bool) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.messages = [words((seed, n), self.random.randint(9, 45)) for n in range(5)]
        self.prefixes = [words((seed, "agent", n), self.random.randint(1, 25)) for n in range(4)]
        self.conversations: list[list[int]] = []
        room = (len(engine.pool.blocks) - 1) * engine.block_size
        self.capacity = min(room, engine.scheduler.max_model_len)
        self.count = 0
        if failures:
            engine.fail = lambda ops: self.random.random() < 0.15
            engine.break_load = lambda ops: self.random.random() < 0.2

    def prompt(self) -> list[int]:
        choice = self.random.random()
        if self.conversations and choice < 0.35:
            prompt = list(self.random.choice(self.conversations[-8:]))
            if choice < 0.1:
                prompt = prompt[: self.random.randint(1, len(prompt))]
        else:
            prompt = list(self.random.choice(self.prefixes))
        for _ in range(self.random.randint(0, 4)):
            message = self.random.choice([*self.messages, *self.conversations[-4:]])
            start = self.random.randint(0, len(message) // 3)
            prompt += message[start : len(message) - self.random.randint(0, len(message) // 3)]
            if self.random.random() < 0.6:
                prompt += words((self.count, len(prompt)), self.random.randint(1, 12))
        return prompt[: self.capacity - 40] or [7]

    def arrive(self) -> None:
        self.count += 1
        prompt = self.prompt()
        answer = words((self.count, "answer"), self.random.choice([1, 2, 9, 30]))
        hints: dict[str, object] | None = None
        if self.random.random() < 0.3:
            hints = {"mode": self.random.choice(["off", "rotate", "seam"])}
        salt = self.random.choice([None] * 6 + ["tenant"])
        for child in range(self.random.choice([1, 1, 1, 2])):
            name = f"{self.count}_{child}"
            priority = self.random.randint(0, 2)
            self.engine.add(name, prompt, answer, hints=hints, salt=salt, priority=priority)
        self.conversations.append([*prompt, *answer])

    def act(self) -> None:
        engine = self.engine
        choice = self.random.random()
        if choice > 0.97:
            for _ in range(self.random.randint(0, IDLE_STEPS)):  # what was served is healed
                engine.step()
        elif choice < 0.25 and len(engine.scheduler.requests) < 12:
            self.arrive()
        elif choice < 0.29 and engine.scheduler.requests:
            engine.abort(self.random.choice(list(engine.scheduler.requests)))
        elif choice < 0.30:
            # vLLM's own rule: no running request is reset while KV of another is on its way
            running = self.random.random() < 0.5 and not (engine.jobs or engine.others_load)
            # its OffloadingConnector asserts that what was reset loads nothing at once
            others = self.random.random() < 0.5 or (running and engine.has_others)
            engine.scheduler.reset_prefix_cache(
                reset_running_requests=running, reset_connector=others
            )

    def end(self) -> None:
        """Nobody acts any more."""


def play(
    engine: EngineWithoutWorker,
    seed: int,
    steps: int,
    failures: bool = False,
    crowd: type[Crowd] = Crowd,
) -> None:
    agents = crowd(engine, seed, failures)
    for _ in range(steps):
        agents.act()
        engine.step()
    agents.end()
    engine.run(steps=3000)
    engine.idle()
    assert not engine.scheduler.has_requests(), "idle work has an end"
    check_idle(engine)
    finished = [name for name, served in engine.served.items() if served.finished]
    for name in finished:
        check_report(engine, name)


engines = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([4, 8, 16]),
        "num_blocks": st.integers(24, 64),
        "budget": st.sampled_from([16, 48, 128]),
        "max_num_seqs": st.sampled_from([2, 6]),
        "seam_tokens": st.sampled_from([0, 2, 5]),
        "reuse_approximate": st.booleans(),
        "max_sequences": st.sampled_from([3, 256]),
        "share_inflight_seconds": st.sampled_from([0.0, 60.0]),
        "max_hole_tokens": st.sampled_from([0, 0, 20]),
        "audit_tokens": st.sampled_from([6, 64]),
        "fidelity_budget": st.sampled_from([0.0, 0.005]),  # audits find 0.01
    }
)
SCARCE: dict[str, object] = {
    "block_size": 16,
    "num_blocks": 24,
    "budget": 16,
    "max_num_seqs": 2,
    "seam_tokens": 0,
    "reuse_approximate": True,
    "max_sequences": 3,
    "share_inflight_seconds": 60.0,
    "max_hole_tokens": 0,
    "audit_tokens": 64,
    "fidelity_budget": 0.0,
}
# the last lesson comes back when nothing else is under way, and its pages are to be stored
HEALS_LAST = {**SCARCE, "num_blocks": 27, "budget": 128, "max_num_seqs": 6, "audit_tokens": 6}
HEALS_LAST["max_sequences"] = 256
# A failing script is not made smaller: that takes minutes, and its seed says all.
thorough = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@thorough
@given(options=engines, seed=st.integers(0, 2**32))
def test_no_script_reads_what_was_not_written(
    make_engine: Make, options: dict[str, object], seed: int
) -> None:
    play(make_engine(**options), seed, steps=200)


@thorough
@given(options=engines, seed=st.integers(0, 2**32))
@example(options=SCARCE, seed=4952)  # the first of many pieces fails, which has loads and no hole
def test_failed_loads_never_reach_another_request(
    make_engine: Make, options: dict[str, object], seed: int
) -> None:
    play(make_engine(**options), seed, steps=150, failures=True)


@thorough
@given(options=engines, seed=st.integers(0, 2**32))
def test_two_steps_in_flight_keep_their_order(
    make_engine: Make, options: dict[str, object], seed: int
) -> None:
    play(make_engine(**options, pipeline=2), seed, steps=200)


@thorough
@given(options=engines, seed=st.integers(0, 2**32), pipeline=st.sampled_from([1, 2]))
@example(options=HEALS_LAST, seed=597730, pipeline=2)
def test_pages_that_left_the_cache_come_back_as_they_were(
    make_engine: Make, options: dict[str, object], seed: int, pipeline: int
) -> None:
    engine = make_engine(**options, tiers={"host_gb": 0.0005}, pipeline=pipeline)
    engine.host_pool.fail = lambda op: random.Random(repr((seed, op.number))).random() < 0.1
    play(engine, seed, steps=150)
    assert not engine.half.tiers.due()


@settings(thorough, max_examples=6)
@given(options=engines, seed=st.integers(0, 2**32), pipeline=st.sampled_from([1, 2]))
def test_pages_that_left_the_pool_come_back_from_disk_as_they_were(
    make_engine: Make,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, object],
    seed: int,
    pipeline: int,
) -> None:
    folder = tmp_path_factory.mktemp("tier")
    tiers = {"host_gb": 0.0001, "disk_path": str(folder), "wait_seconds": 0.2}
    engine = make_engine(**options, tiers=tiers, pipeline=pipeline)
    play(engine, seed, steps=150)
    engine.half.tiers.close()


@thorough
@given(options=engines, seed=st.integers(0, 2**32))
def test_priorities_preempt_without_harm(
    make_engine: Make, options: dict[str, object], seed: int
) -> None:
    play(make_engine(**options, policy="priority"), seed, steps=200)


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_with_room_reuses_most_of_what_is_shared(make_engine: Make, seed: int) -> None:
    """Guards the other tests here: the crowd really does reuse."""
    engine = make_engine(num_blocks=600)
    play(engine, seed, steps=150)
    reports = [served.report for served in engine.served.values() if served.report]
    assert sum(report["reused"] > 0 for report in reports) > len(reports) / 5
    assert engine.lessons, "some of it was healed"
