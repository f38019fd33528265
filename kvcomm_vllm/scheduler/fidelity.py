# SPDX-License-Identifier: Apache-2.0
"""Fidelity: which placeholders may be reused, and how, so that what was audited stays in budget.

A placeholder whose requests were too far from exact in the mean gets longer seams, then none of its
text is reused. It is tried again now and then, one level less strict, and the audit of that request
decides. All of it follows from the order of requests and audits, and from nothing else.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm.logger import init_logger

from kvcomm_vllm.metrics import KVCommStats

logger = init_logger("vllm.kvcomm")

LEAST_AUDITS = 2  # one request may have been an exception
MEMORY = 16  # older audits than about so many hardly count
RETRY = 16  # each so many-th request of a limited placeholder is served one level less strictly
LOG_SECONDS = 60.0  # between two lines in the log


class Level(enum.IntEnum):
    """How a placeholder is treated; the names are in labels of a metric."""

    NORMAL = 0
    LONGER_SEAMS = 1
    COMPUTED = 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Use:
    """How a placeholder is treated in one plan; ``trial``: less strictly than it otherwise is."""

    key: str
    level: Level
    trial: bool = False


@dataclass(slots=True)
class Record:
    """What is known of a placeholder.

    Attributes:
        mean: KL in nats of ``audits`` requests at its level; younger ones count more.
        requests: that have had it since it came to its level.
    """

    level: Level = Level.NORMAL
    mean: float = 0.0
    audits: int = 0
    requests: int = 0


class Ledger:
    """All placeholders that were audited; the least recently used are forgotten first.

    Args:
        budget: nats that the first token's KL may have in the mean; 0 = no limit.
        capacity: most placeholders remembered.
        changed: hears of every change of a level: key, old, new, and the mean that led to it.
    """

    def __init__(
        self,
        budget: float,
        capacity: int,
        changed: Callable[[str, Level, Level, float], None] = lambda *_: None,
    ) -> None:
        self.budget = budget
        self.capacity = capacity
        self._changed = changed
        self._records: OrderedDict[str, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def level(self, key: str) -> Level:
        record = self._records.get(key)
        return Level.NORMAL if record is None else record.level

    def use(self, key: str) -> Use:
        """How it is to be treated in the next request; may be asked any number of times."""
        record = self._records.get(key)
        if record is None or record.level is Level.NORMAL:
            return Use(key, Level.NORMAL)
        trial = record.requests % RETRY == RETRY - 1
        return Use(key, Level(record.level - trial), trial)

    def served(self, keys: Iterable[str]) -> None:
        """A request was admitted in whose prompt these stand, whether they were reused or not."""
        for key in keys:
            record = self._records.get(key)
            if record is not None:
                record.requests += 1
                self._records.move_to_end(key)

    def audited(self, uses: Iterable[Use], kl: float) -> None:
        """A request that has reused these placeholders was so far from exact."""
        for use in uses if self.budget else ():
            record = self._see(use.key)
            if use.trial and use.level == record.level - 1:
                if kl <= self.budget:
                    self._move(use.key, record, use.level, kl)
            elif use.level == record.level and not use.trial:
                record.audits += 1
                record.mean += (kl - record.mean) / min(record.audits, MEMORY)
                if record.audits >= LEAST_AUDITS and record.mean > self.budget:
                    self._move(use.key, record, Level(record.level + 1), record.mean)

    def clear(self) -> None:
        """What was audited was about other weights."""
        for key in list(self._records):
            self._forget(key)

    def _see(self, key: str) -> Record:
        record = self._records.setdefault(key, Record())
        self._records.move_to_end(key)
        if len(self._records) > self.capacity:
            self._forget(next(iter(self._records)))
        return record

    def _forget(self, key: str) -> None:
        record = self._records.pop(key)
        if record.level is not Level.NORMAL:
            self._changed(key, record.level, Level.NORMAL, record.mean)

    def _move(self, key: str, record: Record, level: Level, mean: float) -> None:
        before, record.level = record.level, level
        record.mean, record.audits, record.requests = 0.0, 0, 0
        self._changed(key, before, level, mean)


class Announcer:
    """Counts changes of levels, and tells the log of some."""

    def __init__(self, stats: KVCommStats, budget: float) -> None:
        self._stats = stats
        self._budget = budget
        self._agent: str | None = None
        self._silent_until = 0.0
        self._untold = 0

    def of(self, agent: str | None) -> None:
        """Whose request it is that is being spoken of."""
        self._agent = agent

    def changed(self, key: str, before: Level, now: Level, mean: float) -> None:
        self._stats.count_fidelity(before.word, now.word)
        clock = time.monotonic()
        if clock < self._silent_until:
            self._untold += 1
            return
        logger.warning(
            "kvcomm: placeholder %s of agent %s: KL %.4f in audits, fidelity_budget %g: %s, was %s "
            "(%d such lines left out)",
            key,
            self._agent or "-",
            mean,
            self._budget,
            now.word,
            before.word,
            self._untold,
        )
        self._silent_until, self._untold = clock + LOG_SECONDS, 0
