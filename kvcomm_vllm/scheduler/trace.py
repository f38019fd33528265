# SPDX-License-Identifier: Apache-2.0
"""The trace: a record of each request that has ended, for whoever runs the server.

The engine's loop makes records and never waits for them: a thread writes, and what it cannot
write, or not soon enough, is dropped and counted.
"""

from __future__ import annotations

import atexit
import json
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvcomm_vllm.config.trace import TraceConfig
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.trace_file import TraceFile

logger = init_logger("vllm.kvcomm")

MOST_WAITING = 1000  # records
LAST_SECONDS = 2.0  # for what waits to be written when the engine ends
OF_CLIENTS = ("message",)  # fields of a report that may repeat what a client has written

Record = Mapping[str, Any]


class NoTrace:
    """Nothing is written down."""

    def ended(self, state: RequestState) -> None:
        pass

    def close(self) -> None:
        pass


class Trace:
    """Args:
    file: where records go.
    tokens: whether token ids are written, too.
    stats: counts records.
    """

    def __init__(self, file: TraceFile, tokens: bool, stats: KVCommStats) -> None:
        self._file = file
        self._tokens = tokens
        self._stats = stats
        self._waiting: queue.Queue[Record | None] = queue.Queue(MOST_WAITING)
        self._refused = 0  # by the engine's loop
        self._written = self._lost = 0  # by the thread
        self._counted = (0, 0)
        self._warned = False
        self._thread = threading.Thread(target=self._write_all, name="kvcomm trace", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def ended(self, state: RequestState) -> None:
        """A request has ended. Raises nothing, and does not wait."""
        try:
            self._waiting.put_nowait(record(state, self._tokens))
        except queue.Full:
            self._refused += 1
            self._warn("the disk is too slow")
        except Exception as error:
            self._refused += 1
            self._warn(f"{type(error).__name__}: {error}")
        written, dropped = self._written, self._lost + self._refused
        self._stats.count_trace(written - self._counted[0], dropped - self._counted[1])
        self._counted = (written, dropped)

    def close(self) -> None:
        """Write what waits, for a short time."""
        atexit.unregister(self.close)
        try:
            self._waiting.put(None, timeout=LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_SECONDS)

    def _write_all(self) -> None:
        while (one := self._waiting.get()) is not None:
            try:
                self._file.append(line_of(one))
                self._written += 1
            except Exception as error:
                self._lost += 1
                self._warn(f"{type(error).__name__}: {error}")
        self._file.close()

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("kvcomm: trace.file: records are dropped (%s)", why)


def open_trace(config: TraceConfig, rank: int, stats: KVCommStats) -> Trace | NoTrace:
    """The trace of a data-parallel rank, if one is asked for and its file can be opened."""
    if not config.file:
        return NoTrace()
    path = config.of_rank(rank)
    try:
        return Trace(TraceFile(path, config.max_mb << 20), config.tokens, stats)
    except OSError as error:
        logger.warning("kvcomm: trace.file: nothing is written (%s)", error)
        return NoTrace()


def record(state: RequestState, tokens: bool) -> Record:
    """How a request was served: its full report and times, nothing that its client has written but
    the names of the request and its agent.
    """
    now, outcome = time.monotonic(), state.outcome
    found: dict[str, Any] = {"time": round(time.time(), 3), "id": state.id, "outcome": outcome}
    report = state.report()
    if outcome == "aborted":  # before anybody could say how it would be served
        report = {name: report[name] for name in ("mode", "prompt_tokens", "declined")}
    found |= {name: value for name, value in report.items() if name not in OF_CLIENTS}
    found["output_tokens"] = state.request.num_output_tokens
    found["seconds"] = round(now - state.arrived, 4)
    found["waited_seconds"] = round(
        now - state.arrived if state.waited is None else state.waited, 4
    )
    if state.promoted is not None:
        found["promoted"] = state.promoted.told()
    if tokens and state.request.prompt_token_ids is not None:
        found["token_ids"] = state.tokens()
    return found


def line_of(record: Record) -> bytes:
    """A record as a line of JSON."""
    return json.dumps(record, separators=(",", ":"), default=_listed).encode() + b"\n"


def _listed(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not written")
