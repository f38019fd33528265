# SPDX-License-Identifier: Apache-2.0
"""What was learned does not outlive a sleep in which weights may have been changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from test_learning import ANCHOR, hear, warm
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor

from kvcomm_vllm.messages import Divergence

Make = Callable[..., EngineWithoutWorker]

FOUND = ANCHOR | {"num_blocks": 256, "compares": True, "fidelity_budget": 0.02}
pipelines = pytest.mark.parametrize("pipeline", [1, 2])


class NoWorkers(Executor):
    """vLLM's own account of what sleeps; there is nobody to be sent to sleep."""

    def __init__(self) -> None:
        self.sleeping_tags: set[str] = set()

    def _init_executor(self) -> None: ...

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None, **options):
        return []

    def check_health(self) -> None: ...


class Operated(EngineCore):
    """vLLM's engine core as its operator knows it, around a scheduler without workers."""

    def __init__(self, engine: EngineWithoutWorker) -> None:
        self.scheduler = engine.scheduler
        self.model_executor = NoWorkers()
        self.batch_queue = None
        self._weight_version = "default"
        engine.half.engine.engine = self
        engine.half.engine.renewed()  # looked at before anything was learned

    def reset_mm_cache(self) -> None: ...


def learned(make_engine: Make, **options: int) -> tuple[EngineWithoutWorker, Operated]:
    """An engine with a warm placeholder, audits in its ledger, a lesson that waits, and text."""
    engine = make_engine(**FOUND, **options)
    core = Operated(engine)
    engine.divergence = lambda text: Divergence(0.01, True)
    warm(engine)
    assert hear(engine, 29).report["corrected"] > 0
    assert engine.half.lessons.pending
    assert len(engine.half.audits.ledger) > 0
    engine.drain()
    return engine, core


def holds_nothing(engine: EngineWithoutWorker) -> None:
    half = engine.half
    assert half.modes.counts() == (0, 0)
    assert len(half.audits.ledger) == 0
    assert not half.lessons.pending
    assert not len(half.store.index._row_of)


@pipelines
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_forgets_text_anchors_audits_and_lessons(
    make_engine: Make, level: int, pipeline: int
) -> None:
    engine, core = learned(make_engine, pipeline=pipeline)
    core.sleep(level)
    assert engine.half.engine.resting
    engine.step()  # tells the workers which requests have ended
    engine.memory.weights_now += 1
    core.wake_up(["weights"])
    assert not engine.scheduler.has_requests(), "half awake, it learns nothing"
    core.wake_up()
    holds_nothing(engine)
    served = hear(engine, 30)
    assert (served.report["corrected"], served.report["local"]) == (0, 0)
    for number in range(31, 35):
        engine.idle()
        assert hear(engine, number).report["reused"] > 0
    assert hear(engine, 36).report["corrected"] > 0, "it learns again, with the new weights"
    engine.idle()
    check_idle(engine)


def test_new_weights_in_a_sleep_that_vllm_itself_forgot_to_reset_are_told_by_their_version(
    make_engine: Make,
) -> None:
    """Level 0 keeps vLLM's prefix cache, whatever is done to the weights meanwhile."""
    engine, core = learned(make_engine)
    core.sleep(0)
    core.set_weight_version("step 1")
    engine.memory.weights_now += 1
    core.wake_up(["scheduling"])
    engine.step()
    holds_nothing(engine)


def test_a_nap_without_new_weights_keeps_what_was_learned(make_engine: Make) -> None:
    engine, core = learned(make_engine)
    core.sleep(0)
    core.wake_up(["scheduling"])
    assert hear(engine, 30).report["corrected"] > 0


def test_released_kv_memory_takes_what_was_learned_with_it(make_engine: Make) -> None:
    engine, core = learned(make_engine)
    core.pause_scheduler("abort", clear_cache=False)
    engine.step()  # tells the workers which requests have ended
    core.release_kv_cache_memory()
    core.wake_up()
    holds_nothing(engine)


def test_a_running_request_is_ended_by_sleep_and_teaches_nothing_of_the_old_weights(
    make_engine: Make,
) -> None:
    engine, core = learned(make_engine)
    question = words("question 50", 40)
    engine.serve("source", [*words("one", 20), *question, 5])
    engine.add("running", [*words("agent", 20), *question, 7, 8], words("answer", 9))
    for _ in range(3):
        engine.step()
    core.sleep(2)
    core.wake_up()
    holds_nothing(engine)
    engine.idle()
    check_idle(engine)
