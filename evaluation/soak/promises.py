# SPDX-License-Identifier: Apache-2.0
"""What must hold, and what is said when it does not."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Promise(enum.StrEnum):
    """A promise; its value is a sentence without a full stop."""

    ALIVE = "the server lives"
    ANSWERED = "no request is lost"
    STATUS = "each has the status it should have"
    ENDED = "each ends as it should"
    REPORTED = "every answer that can carry a report has one"
    ADDED_UP = "local, reused and computed add up"
    APART = "nothing crosses salts"
    NOT_REUSED = "nothing is reused where exact is asked"
    EXACT = "what is to be exact equals a dense answer"
    OPERATED = "what an operator asks for is done"
    DRAINED = "the engine holds no request after a drain"
    COUNTED = "requests by outcome are those of the engine"
    TREATED = "treated tokens are the prompts' tokens"
    FREED = "no page is left in use after a drain"
    LEARNED = "no lesson fails"
    RESET = "a reset succeeds after a drain"
    FORGOTTEN = "nothing stale is reused after a reset"
    PAUSED = "an idle server can be paused, and goes on"
    OWN = "a tenant reuses its own text"
    FLAT = "memory stays flat"
    CLEAN = "the log has no error"


@dataclass(frozen=True)
class Fault:
    """Something that does not hold.

    Args:
        kind: of the item, event or process that shows it; empty where the whole server does.
        number: of that item, 0 where there is none.
        detail: what was found.
    """

    promise: Promise
    kind: str
    number: int
    detail: str
