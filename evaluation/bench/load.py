# SPDX-License-Identifier: Apache-2.0
"""Tasks that arrive whether or not earlier ones have ended, as users do."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.lockstep import Floor, Running
from kvcomm_vllm.evaluation.bench.records import Record, SkipRecord, Stand
from kvcomm_vllm.evaluation.serving.client import RefusedError
from kvcomm_vllm.evaluation.workloads.task import Task


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, from 0 to ``seconds``; ``rate`` per second on average."""
    rng = random.Random(f"{seed} arrivals")
    times: list[float] = []
    now = rng.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += rng.expovariate(rate)
    return times


def run_load(
    tasks: Sequence[Task], times: Sequence[float], stand: Stand, driver: Driver, floor: Floor
) -> list[Record]:
    """Start each task at its time, in a thread of its own, and wait for the last one to end. What
    servers are to have seen before is sent before the first one starts.

    Args:
        times: seconds from the start, ascending; as many as tasks.
        stand: of all tasks, but for their names.

    Returns the records, task by task in the order of arrival.

    Raises:
        RequestError: the server does not serve at all.
    """
    for task in tasks:
        if (call := task.call([])) is not None:
            with contextlib.suppress(RefusedError):  # the task itself will be refused, and say so
                driver.prime(call)
    clock = floor.clock
    floor.rest.after()
    floor.rest.before()
    began = clock()
    stop = threading.Event()

    def run(running: Running) -> float | SkipRecord:
        """Seconds from arrival to end."""
        try:
            while not stop.is_set() and running.ask():
                pass
        except RefusedError as error:
            return running.skip(error, [running.column], clock())
        return clock() - running.at

    started = [
        Running(driver, task, replace(stand, task=task.id), began + at)
        for task, at in zip(tasks, times, strict=True)
    ]
    pool = ThreadPoolExecutor(max_workers=len(tasks) or 1)
    try:
        futures = []
        for running in started:
            # an event that is never set in here: a wait that Ctrl-C ends
            stop.wait(max(0.0, running.at - clock()))
            floor.step(f"{running.column}, {running.task.id}")
            futures.append(pool.submit(run, running))
        ended = [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    records: list[Record] = []
    for running, end in zip(started, ended, strict=True):  # scores are for when nobody is timed
        if isinstance(end, SkipRecord):
            records.append(end)
        else:
            records += [*running.records, running.result(end)]
    return records
