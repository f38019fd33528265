# SPDX-License-Identifier: Apache-2.0
"""What an operator has done is seen on vLLM's own objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.executor import Executor

from kvcomm_vllm.compat.owners import find_engine
from kvcomm_vllm.scheduler.engine_state import EngineState


class Engine:
    """Has its executor before it makes anything else, and asks vLLM's own methods."""

    is_running = EngineCoreProc.is_running
    get_weight_version = EngineCore.get_weight_version
    set_weight_version = EngineCore.set_weight_version

    def __init__(self) -> None:
        self.model_executor: Any = SimpleNamespace(is_sleeping=False)
        self.shutdown_state = EngineShutdownState.RUNNING
        self._weight_version = "default"
        self.found = self.make_connector()

    def make_connector(self) -> Any:
        return find_engine()


def test_a_connector_finds_the_engine_that_is_just_making_it() -> None:
    engine = Engine()
    assert engine.found is engine
    assert find_engine() is None


@pytest.mark.parametrize("state", list(PauseState))
def test_a_paused_scheduler_wants_rest(state: PauseState) -> None:
    paused = state != PauseState.UNPAUSED
    assert EngineState(SimpleNamespace(pause_state=state), Engine()).resting == paused


def test_a_sleeping_executor_wants_rest() -> None:
    assert isinstance(Executor.is_sleeping, property)
    engine = Engine()
    engine.model_executor.is_sleeping = True
    assert EngineState(None, engine).resting


@pytest.mark.parametrize("state", list(EngineShutdownState))
def test_an_engine_that_is_told_to_end_wants_rest(state: EngineShutdownState) -> None:
    engine = Engine()
    engine.shutdown_state = state
    assert EngineState(None, engine).resting == (state != EngineShutdownState.RUNNING)


def test_another_weight_version_is_told_of_once() -> None:
    engine = Engine()
    pool = BlockPool(4, True, 16)
    watched = EngineState(None, engine)
    watched.watch(pool)
    assert not watched.renewed()
    engine.set_weight_version("step 1")
    assert watched.renewed()
    assert not watched.renewed()
    engine.set_weight_version("step 1")
    assert not watched.renewed()


def test_an_emptied_prefix_cache_is_told_of_once_and_a_refused_reset_never() -> None:
    pool = BlockPool(4, True, 16)
    watched = EngineState()
    watched.watch(pool)
    pages = pool.get_new_blocks(1)
    assert not pool.reset_prefix_cache()
    assert not watched.renewed()
    pool.free_blocks(pages)
    assert pool.reset_prefix_cache()
    assert watched.renewed()
    assert not watched.renewed()


def test_what_cannot_be_seen_wants_no_rest_and_is_never_renewed() -> None:
    unknown = EngineState(SimpleNamespace(), SimpleNamespace())
    unknown.watch(SimpleNamespace())  # type: ignore[arg-type]
    assert not unknown.resting
    assert not unknown.renewed()
