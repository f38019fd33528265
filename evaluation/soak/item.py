# SPDX-License-Identifier: Apache-2.0
"""One request of the script, what must come of it, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvcomm_vllm.evaluation.cases.case import Body

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BATCH = "/v1/chat/completions/batch"

PREFILL, DECODE = "prefill", "decode"
FIELD = "kvcomm"


@dataclass(frozen=True)
class Item:
    """A request.

    Args:
        kind: what it is an example of; all kinds are in ``script.py``.
        body: without model and salt; or the very bytes that are sent.
        salt: the tenant, None for the one without a name.
        status: the HTTP status it must be answered with.
        finish: the reasons for which its choices may end; empty = its endpoint says none.
        leave: where the client hangs up (``PREFILL``, ``DECODE``), after ``patience`` seconds or
            chunks.
        exact: asks to be served exactly, and is compared with a dense answer.
        foreign: nothing of its prompt was ever sent by its tenant.
        engine_requests: how many requests vLLM makes of it; None where only vLLM knows.
    """

    number: int
    kind: str
    path: str
    body: Body | bytes
    salt: str | None = None
    status: int = 200
    finish: tuple[str, ...] = ()
    leave: str = ""
    patience: float = 0.0
    exact: bool = False
    foreign: bool = False
    engine_requests: int | None = 1

    def sent(self, model: str) -> Body:
        """The body as it goes out."""
        assert isinstance(self.body, dict)
        salted = {} if self.salt is None else {"cache_salt": self.salt}
        return {"model": model, **salted, **self.body}


@dataclass(frozen=True)
class Outcome:
    """What came of an item.

    Args:
        status: 0 where the connection broke or nothing came in time; -1 where the client hung up.
        answer: the body of an answer with status 200; the last chunk of a stream, its choices
            those of the chunks that ended one.
        began, ended: monotonic seconds.
    """

    item: Item
    status: int
    began: float
    ended: float
    answer: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def report(self) -> dict[str, Any]:
        """The plugin's; empty without one."""
        found: dict[str, Any] = (self.answer.get("kv_transfer_params") or {}).get(FIELD) or {}
        return found

    @property
    def choices(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.answer.get("choices") or []
        return found

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed, as usage has it."""
        details = (self.answer.get("usage") or {}).get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)
