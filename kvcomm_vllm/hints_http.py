# SPDX-License-Identifier: Apache-2.0
"""HTTP 400 for malformed hints: an ASGI middleware, vLLM's own hook for looking at requests.

``--kv-connector kvcomm`` adds it to vLLM's ``--middleware`` list. Where a request comes in without
it (offline, or over a server that does not use the list) the scheduler half ignores malformed hints
with the reason ``bad_hints``.
"""

from __future__ import annotations

import json

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcomm_vllm.hints import FIELD, HintError, parse_hints

MIDDLEWARE = "kvcomm_vllm.hints_http.HintsMiddleware"
_NEEDLE = b'"' + FIELD.encode() + b'"'


class HintsMiddleware:
    """Refuses a JSON body whose ``kv_transfer_params.kvcomm`` :func:`parse_hints` does not accept.

    The body is looked at while the route reads it, so that authentication and size limits still
    come first, and parsed only if it mentions the field at all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        chunks: list[bytes] = []

        async def checked_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                chunks.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body = b"".join(chunks)
                    chunks.clear()
                    _check(body)
            return message

        await self.app(scope, checked_receive, send)


def _check(body: bytes) -> None:
    """Raise ``HTTPException``, which FastAPI and vLLM's handlers turn into vLLM's error form."""
    if _NEEDLE not in body:
        return
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return  # not JSON: the route answers that itself
    if not isinstance(content, dict):
        return
    try:
        parse_hints(content.get("kv_transfer_params"))
    except HintError as error:
        raise HTTPException(status_code=400, detail=f"kv_transfer_params.{error}") from None
