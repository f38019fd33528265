# SPDX-License-Identifier: Apache-2.0
"""One request of any kind to a server, and what its answer tells."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.evaluation.cases.case import Body

TOP = 20  # log-probabilities asked for; vLLM's own limit
TIMEOUT_SECONDS = 600.0
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FIELD = "kvcomm"


@dataclass(frozen=True)
class Reply:
    """An answer: HTTP status, seconds, text, and the parts of the body that are judged.

    Args:
        status: 0 where the connection broke.
        report: the plugin's; None without one.
        top: log-probabilities of the first token's most likely candidates; None where the endpoint
            has none.
        usage: as the server has it; ``error``: the message of a refusal.
    """

    status: int
    seconds: float
    text: str = ""
    report: dict[str, Any] | None = None
    top: dict[str, float] | None = None
    usage: dict[str, Any] | None = None
    error: str = ""


def with_logprobs(path: str, body: Body) -> Body:
    """The body, asking for the first token's candidates as well, where the endpoint knows how."""
    if path == CHAT and not body.get("stream"):
        return {**body, "logprobs": True, "top_logprobs": TOP}
    if path == TEXT and not body.get("echo"):
        return {**body, "logprobs": TOP}
    return body


def dense(body: Body, salt: str) -> Body:
    """The same request, served exactly and by itself."""
    return {**body, "kv_transfer_params": {FIELD: {"mode": "off"}}, "cache_salt": salt}


def post(base_url: str, path: str, body: Body | None = None) -> tuple[int, bytes]:
    """Status and body of the answer; status 0 if the connection breaks."""
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(
        base_url + path, data, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()
    except (OSError, urllib.error.URLError) as broken:
        return 0, str(broken).encode()


def send(base_url: str, path: str, body: Body) -> Reply:
    """Send one request and read its answer."""
    began = time.perf_counter()
    status, content = post(base_url, path, body)
    seconds = time.perf_counter() - began
    if status != 200:
        return Reply(status, seconds, error=content.decode(errors="replace"))
    answer = json.loads(content)
    params = answer.get("kv_transfer_params") or {}
    return Reply(
        status,
        seconds,
        text=_text(answer),
        report=params.get(FIELD),
        top=_top(answer),
        usage=answer.get("usage"),
    )


def _text(answer: dict[str, Any]) -> str:
    """The first choice's text, of any endpoint."""
    for choice in answer.get("choices") or []:
        message = choice.get("message") or {}
        return str(message.get("content") or choice.get("text") or "")
    for part in answer.get("output") or answer.get("content") or []:
        inner = (part.get("content") or [part])[0] if isinstance(part, dict) else {}
        return str(inner.get("text") or "")
    return ""


def _top(answer: dict[str, Any]) -> dict[str, float] | None:
    for choice in answer.get("choices") or []:
        found = choice.get("logprobs") or {}
        if steps := found.get("content"):
            return {
                str(one.get("bytes") or one["token"]): float(one["logprob"])
                for one in steps[0]["top_logprobs"]
            }
        if steps := found.get("top_logprobs"):
            first: dict[str, float] = steps[0]
            return first
    return None
