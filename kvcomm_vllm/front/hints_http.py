# SPDX-License-Identifier: Apache-2.0
"""Hints in the body of an HTTP request: an ASGI middleware, vLLM's own hook for looking at
requests, carries them to the engine's requests and answers malformed ones with HTTP 400.

``--kv-connector kvcomm`` adds it to vLLM's ``--middleware`` list. Where a request comes in without
it (offline, or over a server that does not use the list) the scheduler half ignores malformed hints
with the reason ``bad_hints``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from starlette.types import Message, Receive, Scope, Send
from vllm.exceptions import VLLMValidationError

from kvcomm_vllm import metrics
from kvcomm_vllm.front.carried_hints import PARAMS, carry
from kvcomm_vllm.front.posts import PostMiddleware
from kvcomm_vllm.hints import FIELD, HintError, parse_hints
from kvcomm_vllm.reasons import Reason

MIDDLEWARE = "kvcomm_vllm.front.hints_http.HintsMiddleware"
OFF = {"mode": "off"}


class RefusedHintsError(VLLMValidationError, HTTPException):
    """Malformed hints: HTTP 400 in vLLM's error form.

    Of what is raised while a body is read FastAPI lets through ``HTTPException`` alone, for which
    vLLM can log a traceback. Being one of vLLM's validation errors as well, it is answered as one:
    without a traceback, and with the hint's name.
    """

    def __init__(self, error: HintError) -> None:
        # not the other base's, whose super().__init__ would end up here with one argument
        HTTPException.__init__(self, HTTPStatus.BAD_REQUEST, f"{PARAMS}.{error}")
        self.parameter = f"{PARAMS}.{error}".partition(":")[0]
        self.value = None

    def __str__(self) -> str:
        return str(self.detail)


class HintsMiddleware(PostMiddleware):
    """Looks for ``kv_transfer_params.kvcomm`` in JSON bodies.

    A body is looked at while the route reads it, so that authentication and size limits still come
    first, and parsed only if it names the field at all.
    """

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunks: list[bytes] = []
        with carry() as carried:

            async def watched_receive() -> Message:
                message = await receive()
                if message["type"] == "http.request":
                    chunks.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        body = b"".join(chunks)
                        chunks.clear()
                        carried.given = hints_in(body)
                return message

            await self.app(scope, watched_receive, send)


def hints_in(body: bytes) -> Mapping[str, Any] | None:
    """The hints in the body of a request, if it has any.

    The body is read as the routes read it (``json.loads``): in any of JSON's encodings, and of
    equal keys the last one counts.

    Raises:
        RefusedHintsError: they are malformed.
    """
    if not may_have_hints(body):
        return None
    try:
        content = json.loads(body)
    except RecursionError:
        return OFF  # the route, a few calls nearer to the bottom of the stack, may get through
    except ValueError:
        return None  # not JSON: the route answers that itself
    params = content.get(PARAMS) if isinstance(content, dict) else None
    try:
        parse_hints(params)
    except HintError as error:
        metrics.count_here(Reason.BAD_HINTS)
        raise RefusedHintsError(error) from None
    return params.get(FIELD) if isinstance(params, dict) else None


# A name stands in a body as it is, or with letters as escapes, which hardly anybody writes.
_ESCAPES = {f"\\u{ord(letter):04x}"[:-1].encode() for letter in FIELD}
_NEEDLES = (f'"{FIELD}"'.encode(), *sorted(_ESCAPES))


def may_have_hints(body: bytes) -> bool:
    """Whether a body has to be parsed: most have none, and a long one must not be parsed twice."""
    if not json.detect_encoding(body).startswith("utf-8"):
        return True
    return any(needle in body for needle in _NEEDLES)
