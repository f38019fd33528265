# SPDX-License-Identifier: Apache-2.0
"""Reports of streamed responses: an ASGI middleware, vLLM's own hook for looking at responses, puts
each into the chunk that ends its choice, and the first one into the chunk with the usage.

vLLM's chunks have no field for them. The report comes with a request's last output
(:mod:`kvcomm_vllm.front.late_reports`) to the process that answers, and a context variable says
which response that belongs to; so nothing is kept beyond the response, and nobody else can ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from vllm.logger import init_logger

from kvcomm_vllm.front.carried_hints import PARAMS
from kvcomm_vllm.front.posts import PostMiddleware
from kvcomm_vllm.front.stream_events import Events
from kvcomm_vllm.hints import FIELD

logger = init_logger("vllm.kvcomm")

MIDDLEWARE = "kvcomm_vllm.front.stream_reports.StreamReportsMiddleware"
LISTENER = "kvcomm_listener"
EVENTS = b"text/event-stream"


class Told:
    """What the engine requests of one HTTP request have told of themselves as they ended."""

    def __init__(self) -> None:
        self.samples = 1  # of each prompt
        self._reports: dict[tuple[str, int], object] = {}  # by request and number of the sample

    def __bool__(self) -> bool:
        return bool(self._reports)

    def hear(self, name: str, sample: int, samples: int, report: object) -> None:
        self.samples = samples
        self._reports[name, sample] = report

    def of(self, name: object, choice: object) -> object | None:
        """The report of a choice in a response of this name (``id``): of several prompts vLLM names
        the requests ``id-0``, ``id-1`` ..., and numbers the samples of all of them through.

        Requests of other names, as those of a beam search, are steps on the way to an answer.
        """
        if not isinstance(choice, int):
            return None
        if (str(name), choice) in self._reports:
            return self._reports[str(name), choice]
        prompt, sample = divmod(choice, self.samples)
        return self._reports.get((f"{name}-{prompt}", sample))

    def only(self) -> object | None:
        """The report, if there has been one request."""
        return next(iter(self._reports.values())) if len(self._reports) == 1 else None


_TOLD: ContextVar[Told | None] = ContextVar("kvcomm_told", default=None)


def with_listener(init: Callable[..., None]) -> Callable[..., None]:
    """Around ``RequestState.__init__``, which vLLM calls for whoever has sent the request: so the
    one who waits for its report can be found when it ends, in a task that serves all.
    """

    def begin(self: Any, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        told = _TOLD.get()
        if told is not None:
            setattr(self, LISTENER, told)

    return begin


def tell_listener(state: Any, params: Mapping[str, Any] | None) -> None:
    """The request of a ``RequestState`` ends with these ``kv_transfer_params``. Raises nothing: the
    task that asks serves all requests.
    """
    try:
        told = getattr(state, LISTENER, None)
        if isinstance(told, Told) and isinstance(params, Mapping) and FIELD in params:
            samples = getattr(state.parent_req, "n", 1)
            told.hear(state.external_req_id, state.request_index, samples, params[FIELD])
    except Exception as error:
        _no_report(error)


def _no_report(error: Exception) -> None:
    name = type(error).__name__
    logger.warning_once("kvcomm: a streamed response has no report (%s: %s)", name, error)


def report_for(chunk: Mapping[str, Any], told: Told) -> object | None:
    """What belongs into a chunk of a chat, a completion, a generation by tokens, or a message in
    Anthropic's form; None for most.
    """
    if PARAMS in chunk:
        return None
    if chunk.get("type") == "message_delta":
        return told.only()
    name, choices = chunk.get("id", chunk.get("request_id")), chunk.get("choices")
    if choices == [] and isinstance(chunk.get("usage"), dict):
        return told.of(name, 0)
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason") is not None:
            return told.of(name, choice.get("index"))
    return None


class StreamReportsMiddleware(PostMiddleware):
    """Stands next to the routes. Whatever is no stream of events, or none of vLLM's, passes as it
    is.
    """

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = _TOLD.set(told := Told())
        try:
            await self.app(scope, receive, Response(send, told).send)
        finally:
            _TOLD.reset(token)


class Response:
    """One response on its way out."""

    def __init__(self, send: Send, told: Told) -> None:
        self._send = send
        self._told = told
        self._events: Events | None = None

    async def send(self, message: Message) -> None:
        """A message for a message; an error of ours costs the report alone."""
        try:
            message = self._with_reports(message)
        except Exception as error:
            self._events = None
            _no_report(error)
        await self._send(message)

    def _with_reports(self, message: Message) -> Message:
        if message["type"] == "http.response.start":
            streams = is_plain_event_stream(message.get("headers", ()))
            self._events = Events(self._addition) if streams else None
        elif message["type"] == "http.response.body" and self._events is not None:
            body = message.get("body", b"")
            if self._told:
                return {**message, "body": self._events.passing(body)}
            self._events.follow(body)
        return message

    def _addition(self, chunk: Mapping[str, Any]) -> bytes:
        report = report_for(chunk, self._told)
        if report is None:
            return b""
        params = json.dumps({FIELD: report}, separators=(",", ":"))
        return f',"{PARAMS}":{params}'.encode()


def is_plain_event_stream(headers: Any) -> bool:
    """Whether a response with these headers is a stream of events, uncompressed, of any length."""
    found = {bytes(name).lower(): bytes(value) for name, value in headers}
    return found.get(b"content-type", b"").lower().startswith(EVENTS) and not (
        {b"content-length", b"content-encoding"} & found.keys()
    )
