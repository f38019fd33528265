# SPDX-License-Identifier: Apache-2.0
"""Tiers that others have written: one that fails is left alone, and everything else goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvcomm_vllm.compat.offload import end_of_step
from kvcomm_vllm.scheduler.tiers.foreign import ForeignTier

Make = Callable[..., EngineWithoutWorker]
POOL = {"host_gb": 0.002}
WAYS = ["submit_store", "submit_load", "lookup", "get_finished_jobs", "on_new_request"]
WAYS += ["on_request_finished", "on_schedule_end", "has_pending_work", "take_events", "touch"]


class Remembering(SecondaryTierManager):
    """A tier of somebody's; it has what was stored, and raises where it is told to."""

    def __init__(self, *args: Any, fails: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fails = fails
        self.keys: set[OffloadKey] = set()
        self.jobs: list[TransferJob] = []
        self.asked: list[str] = []
        self._may("__init__")

    def _may(self, method: str) -> None:
        self.asked.append(method)
        if method == self.fails:
            raise RuntimeError("no\nluck")

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        self._may("lookup")
        return LookupResult.HIT if key in self.keys else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._may("submit_store")
        self.jobs.append(job_metadata)
        self.keys.update(job_metadata.keys)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._may("submit_load")
        self.jobs.append(job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._may("get_finished_jobs")
        jobs, self.jobs = self.jobs, []
        return [JobResult(job.job_id, True) for job in jobs]

    def has_pending_work(self) -> bool:
        self._may("has_pending_work")
        return False

    def take_events(self) -> Any:
        self._may("take_events")
        return ()

    def touch(self, keys: Any, req_context: ReqContext) -> None:
        self._may("touch")

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._may("on_new_request")
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._may("on_request_finished")

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._may("on_schedule_end")

    def drain_jobs(self) -> None:
        self._may("drain_jobs")

    def shutdown(self) -> None:
        self._may("shutdown")


def given(fails: str = "", **more: Any) -> dict[str, Any]:
    return {"type": "Remembering", "module_path": __name__, "fails": fails, **more}


def opened(make_engine: Make, *tiers: dict[str, Any]) -> EngineWithoutWorker:
    return make_engine(
        tiers=POOL | {"secondary_tiers": list(tiers)}, audits=False, heal="off", num_blocks=48
    )


def rest(engine: EngineWithoutWorker) -> None:
    """Nothing is left to be done, and tiers have been asked what they have done."""
    engine.idle()
    end_of_step(engine.half.tiers._manager)


def tiers_of(engine: EngineWithoutWorker) -> list[Any]:
    return [tier._tier for tier in engine.half.tiers._manager.secondary_tiers]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def lines() -> list[str]:
        """But for the settings, where it stands as well."""
        loud = (record for record in caplog.records if record.levelno >= logging.WARNING)
        return [line for one in loud if "tiers.secondary_tiers" in (line := one.getMessage())]

    return lines


def test_what_is_stored_goes_there_too(make_engine: Make, told: Callable[[], list[str]]) -> None:
    engine = opened(make_engine, given())
    engine.serve("a", words("a", 40))
    rest(engine)
    (tier,) = tiers_of(engine)
    sequence = next(iter(engine.half.store.index._row_of))
    assert len(tier.keys) == len(sequence.block_hashes)
    assert engine.half.tiers.holds(sequence), "it may be there, and nobody else knows the text"
    assert not told()
    check_idle(engine)


@pytest.mark.parametrize(
    "wrong",
    [
        given("__init__"),
        given(unknown_argument=1),
        {"type": "Nobody", "module_path": __name__},
        {"type": "Any", "module_path": "no_such_module_anywhere"},
        {"type": "fs", "root_dir": "/dev/null/kv"},
    ],
    ids=["raises", "argument", "class", "module", "of_vllms"],
)
def test_one_that_cannot_be_had_is_named_in_one_line_and_the_others_are_used(
    make_engine: Make, told: Callable[[], list[str]], wrong: dict[str, Any]
) -> None:
    engine = opened(make_engine, wrong, given())
    engine.serve("a", words("a", 40))
    rest(engine)
    assert tiers_of(engine)[0] is None
    assert tiers_of(engine)[1].keys
    (line,) = told()
    assert f"number 1 ({wrong['type']}): " in line
    assert "\n" not in line
    check_idle(engine)


@pytest.mark.parametrize("fails", WAYS)
def test_one_that_fails_ends_no_request_and_is_not_asked_again(
    make_engine: Make, told: Callable[[], list[str]], fails: str
) -> None:
    engine = opened(make_engine, given(), given())
    first, second = tiers_of(engine)
    engine.serve("a", words("a", 40))
    rest(engine)
    first.fails = fails
    guard = engine.half.tiers._manager.secondary_tiers[0]
    for number in range(3):
        engine.serve(f"b{number}", words(("b", number), 40))
        rest(engine)
    call(guard, fails)
    assert len(told()) == 1
    first.asked.clear()
    engine.serve("c", words("c", 40))
    rest(engine)
    assert set(first.asked) <= {"get_finished_jobs"}, "what is under way there may end"
    assert second.keys > first.keys
    assert not engine.half.tiers._manager._jobs or fails == "get_finished_jobs"
    check_idle(engine)


def call(guard: ForeignTier, method: str) -> None:
    """Whatever the engine has not asked of it by itself."""
    context = ReqContext("somebody")
    job = TransferJob(10**6, [], np.zeros(0, np.int32), True, context)
    arguments: dict[str, tuple[Any, ...]] = {
        "submit_load": (job,),
        "lookup": (OffloadKey(b"x" * 36), context),
        "touch": ([], context),
    }
    if method in arguments or method in ("has_pending_work", "take_events"):
        getattr(guard, method)(*arguments.get(method, ()))
    if method == "submit_load":
        assert JobResult(10**6, success=False) in list(guard.get_finished_jobs())


def test_a_job_that_a_failed_tier_goes_on_with_keeps_its_room_until_it_ends(
    make_engine: Make,
) -> None:
    engine = opened(make_engine, given())
    (tier,) = tiers_of(engine)
    manager = engine.half.tiers._manager
    (guard,) = manager.secondary_tiers
    jobs = tier.get_finished_jobs
    tier.get_finished_jobs = list
    engine.serve("a", words("a", 40))
    rest(engine)
    assert manager._jobs
    tier.fails = "lookup"
    call(guard, "lookup")
    engine.serve("b", words("b", 40))
    rest(engine)
    assert len(manager._jobs) == 1, "only what was refused has ended"
    tier.get_finished_jobs = jobs
    engine.serve("c", words("c", 40))
    rest(engine)
    assert not manager._jobs


@pytest.mark.parametrize("fails", ["get_finished_jobs", "drain_jobs", "shutdown"])
def test_a_reset_gets_by_a_tier_that_fails(make_engine: Make, fails: str) -> None:
    engine = opened(make_engine, given())
    (tier,) = tiers_of(engine)
    tier.fails = fails
    engine.serve("a", words("a", 40))
    rest(engine)
    assert engine.scheduler.reset_prefix_cache()
    engine.half.reset()
    engine.memory.weights_now += 1
    rest(engine)
    assert not engine.half.tiers._manager.secondary_tiers
    tier.asked.clear()
    served = engine.serve("b", words("a", 40))
    assert served.report["local"] == 0
    rest(engine)
    assert not tier.asked
    check_idle(engine)
