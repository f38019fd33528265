# SPDX-License-Identifier: Apache-2.0
"""Tasks that arrive whether or not earlier ones have ended, as users do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from kvcomm_vllm.cli.bench.driver import Driver, Place
from kvcomm_vllm.cli.bench.lockstep import Running, skipped
from kvcomm_vllm.cli.bench.records import Record, SkipRecord
from kvcomm_vllm.cli.bench.task import Task
from kvcomm_vllm.cli.client import RefusedError


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
    tasks: list[Task],
    times: list[float],
    place: Callable[[Task], Place],
    driver: Driver,
    clock: Callable[[], float],
    step: Callable[[str], None] = lambda what: None,
) -> list[Record]:
    """Start each task at its time, in a thread of its own, and wait for the last one to end.

    Args:
        times: seconds from now, ascending; as many as tasks.

    Returns the records, task by task in the order of arrival.

    Raises:
        RequestError: the server does not serve at all.
    """
    began = clock()
    stop = threading.Event()

    def play(task: Task, at: float) -> tuple[Running, float] | SkipRecord:
        running = Running(driver, task.steps(), at)
        running.go(None)
        try:
            while running.call is not None and not stop.is_set():
                running.ask(place(task))
        except RefusedError as error:
            column = driver.column.name
            return skipped(place(task), column, [column], error, clock())
        return running, clock() - at

    pool = ThreadPoolExecutor(max_workers=len(tasks) or 1)
    futures: list[Future[tuple[Running, float] | SkipRecord]] = []
    try:
        for task, at in zip(tasks, times, strict=True):
            # an event that is never set in here: a wait that Ctrl-C ends
            stop.wait(max(0.0, began + at - clock()))
            step(f"{driver.column.name}, {task.id}")
            futures.append(pool.submit(play, task, began + at))
        ended = [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    records: list[Record] = []
    for task, end in zip(tasks, ended, strict=True):  # scores are for when nobody is timed
        if isinstance(end, SkipRecord):
            records.append(end)
        else:
            running, seconds = end
            records += [*running.records, running.result(task, place(task), seconds)]
    return records
