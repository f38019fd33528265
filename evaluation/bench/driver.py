# SPDX-License-Identifier: Apache-2.0
"""Sends the calls of one column to its server, and writes down what came of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import Column
from kvcomm_vllm.evaluation.bench.records import CallRecord, Stand
from kvcomm_vllm.evaluation.bench.repeats import Repeated, Repeats
from kvcomm_vllm.evaluation.serving.client import Answer, ChatClient
from kvcomm_vllm.evaluation.serving.counters import Meter
from kvcomm_vllm.evaluation.workloads.task import Call


class Driver:
    """Asks the server of one column.

    Args:
        clock: seconds since the session began.
        meter: looks at the server after each request; without one, requests may be sent at the
            same time.
        floor: send each prompt once more, right after it was answered, to time the server's own
            prefix cache on it.
    """

    def __init__(
        self,
        column: Column,
        client: ChatClient,
        clock: Callable[[], float],
        meter: Meter | None = None,
        floor: bool = False,
    ) -> None:
        self.column = column
        self.late = 0  # answers after which the server was not given the time it wanted
        self._client = client
        self._clock = clock
        self._meter = meter
        self._floor = floor
        self._numbers = itertools.count()
        self._repeats = Repeats()
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Wait until the server is done with what was not observed, and charge nobody with it."""
        if self._meter is not None:
            self._settle(self._meter)
            self._meter.take(0)

    def unobserved(self) -> Driver:
        """The same column for requests that overlap, of which a meter could tell nothing."""
        other = Driver(self.column, self._client, self._clock)
        other._numbers, other._repeats, other._lock = self._numbers, self._repeats, self._lock
        return other

    def prime(self, call: Call) -> int:
        """Send what the server is to have seen before a call; how many requests that were.

        Raises:
            RefusedError, RequestError: as for :meth:`ask`.
        """
        if not self.column.cached:
            return 0
        for messages in call.primers:
            answer = self._client.stream(messages, 1, self.column.salt(0), hints=self.column.hints)
            self._repeated(answer)
            self._observed(answer)
        return len(call.primers)

    def ask(self, call: Call, index: int, stand: Stand) -> tuple[str, CallRecord]:
        """The answer's text, and the record.

        Raises:
            RefusedError: the server does not serve this prompt.
            RequestError: it does not serve at all.
        """
        salt = self.column.salt(next(self._numbers))
        at = self._clock()
        answer = self._client.stream(
            call.messages, call.max_tokens, salt, fixed=call.fixed, hints=self.column.hints
        )
        assert answer.ttft_ms is not None
        repeated = self._repeated(answer)
        observed = self._observed(answer)
        again = self._client.stream(call.messages, 1, salt) if self._floor else None
        return answer.text, CallRecord(
            **vars(stand),
            column=self.column.name,
            index=index,
            agent=call.agent,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            ttft_ms=answer.ttft_ms,
            total_ms=answer.total_ms,
            full_hit_ms=again.ttft_ms if again else None,
            cached_tokens=answer.cached_tokens,
            repeated_tokens=repeated.tokens if repeated else None,
            repeated_runs=repeated.runs if repeated else None,
            prompt_digest=_digest(answer, call),
            answer_ids=list(answer.token_ids),
            at_s=at,
            **observed,
        )

    def _observed(self, answer: Answer) -> dict[str, Any]:
        """Fields of a record; the server has been given the time it wants."""
        if self._meter is None:
            return {}
        found = self._meter.take(answer.prompt_tokens)
        began = time.perf_counter()
        self._settle(self._meter)
        return {**found, "waited_ms": (time.perf_counter() - began) * 1e3}

    def _settle(self, meter: Meter) -> None:
        self.late += not meter.settle()

    def _repeated(self, answer: Answer) -> Repeated | None:
        if not answer.prompt_ids:
            return None
        with self._lock:
            found = self._repeats.count(answer.prompt_ids)
            self._repeats.add([*answer.prompt_ids, *answer.token_ids])
        return found


def _digest(answer: Answer, call: Call) -> str:
    if answer.prompt_ids:
        content = np.asarray(answer.prompt_ids, np.int32).tobytes()
    else:
        content = json.dumps(call.messages).encode()
    return hashlib.sha256(content).hexdigest()[:16]
