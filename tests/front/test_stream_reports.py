# SPDX-License-Identifier: Apache-2.0
"""Promises of reports in streams: each goes out with its own response, and whatever else happens, a
stream is what the route has made of it. The front end's requests and chunks are vLLM's own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import front_requests
import pytest
from starlette.responses import JSONResponse, Response, StreamingResponse
from stream_chunks import DONE, chat_chunk, report, reused, usage_chunk
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from kvcomm_vllm.compat import cli
from kvcomm_vllm.front import stream_reports
from kvcomm_vllm.front.stream_reports import StreamReportsMiddleware, Told

POST = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}


class FrontEnd:
    """vLLM's output processor, and a route that streams what comes of ``names``' requests."""

    def __init__(self, tokenizer: Any) -> None:
        cli.wrap_front_end(serving=True)
        self.processor = OutputProcessor(tokenizer, log_stats=False)
        self.numbers = iter(range(100))

    def begin(self, name: str, samples: int = 1) -> tuple[list[str], RequestOutputCollector]:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, n=samples, max_tokens=99)
        internal = f"{name}-{next(self.numbers)}"
        return front_requests.begin(self.processor, internal, name, params)

    def end(self, name: str, params: Any) -> None:
        """What the engine says of a request, heard in a task that serves all."""
        first = EngineCoreOutput(name, new_token_ids=[20], kv_transfer_params=params)
        last = EngineCoreOutput(name, new_token_ids=[21], finish_reason=FinishReason.LENGTH)
        for output in (first, last):
            self.processor.process_outputs([output])

    async def chat(
        self, name: str, number: int, samples: int = 1, pause: Any = None
    ) -> AsyncIterator[str]:
        """The stream of a chat."""
        begun, queue = self.begin(name, samples)
        yield chat_chunk(name, 0)
        if pause is not None:
            await pause.wait()
        # not in this task's context, as vLLM's output handler
        for index, one in reversed([*enumerate(begun)]):
            await asyncio.create_task(self._ends(one, report(number + index)))
            assert queue.get_nowait() is not None
            yield chat_chunk(name, index, "stop")
        yield usage_chunk(name)
        yield DONE

    async def _ends(self, name: str, params: Any) -> None:
        stream_reports._TOLD.set(None)
        self.end(name, params)


async def respond(route: Callable[[], Response]) -> list[Any]:
    """All messages of a response that goes through the middleware."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await route()(scope, receive, send)

    await StreamReportsMiddleware(app)(POST, receive, send)
    return sent


def lines(sent: list[Any]) -> list[str]:
    assert sent[0]["type"] == "http.response.start"
    return [message["body"].decode() for message in sent[1:] if message["body"]]


def streams(parts: Any) -> Callable[[], Response]:
    return lambda: StreamingResponse(parts, media_type="text/event-stream")


def test_a_stream_has_the_report_where_it_ends(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer)
    found = lines(asyncio.run(respond(streams(front.chat("chatcmpl-a", 7)))))
    assert [reused(line) for line in found] == [None, 7, 7, None]
    plain = [chat_chunk("chatcmpl-a", 0), chat_chunk("chatcmpl-a", 0, "stop")]
    wanted = [*map(json_of, plain), json_of(usage_chunk("chatcmpl-a")), None]
    for line, before in zip(found, wanted, strict=True):
        after = json_of(line)
        assert before is None or after == before | (
            {"kv_transfer_params": report(7)} if reused(line) else {}
        )
    assert found[-1] == DONE


def json_of(line: str) -> Any:
    found = line.removeprefix("data: ")
    return (
        None
        if found == "[DONE]\n\n"
        else {k: v for k, v in json.loads(found).items() if k != "created"}
    )


def test_samples_have_each_their_own(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer)
    found = lines(asyncio.run(respond(streams(front.chat("chatcmpl-a", 7, samples=3)))))
    assert [reused(line) for line in found] == [None, 9, 8, 7, 7, None]


def test_no_response_has_anothers_though_their_requests_are_named_alike(tokenizer: Any) -> None:
    """Clients choose names (``X-Request-Id``), and may choose the same."""
    front = FrontEnd(tokenizer)

    async def main() -> list[list[Any]]:
        pause = asyncio.Event()
        answers = [
            asyncio.create_task(respond(streams(front.chat("chatcmpl-a", n, pause=pause))))
            for n in (10, 20, 30)
        ]
        await asyncio.sleep(0.05)
        pause.set()
        return await asyncio.gather(*answers)

    for number, sent in zip((10, 20, 30), asyncio.run(main()), strict=True):
        assert [reused(line) for line in lines(sent)] == [None, number, number, None]


@pytest.mark.parametrize("params", [None, {}, {"remote_block_ids": [1]}])
def test_without_a_report_nothing_is_added(tokenizer: Any, params: Any) -> None:
    front = FrontEnd(tokenizer)

    async def chat() -> AsyncIterator[str]:
        (name,), _ = front.begin("chatcmpl-a")
        front.end(name, params)
        for line in wanted:
            yield line

    wanted = [chat_chunk("chatcmpl-a", 0, "stop"), usage_chunk("chatcmpl-a"), DONE]
    assert lines(asyncio.run(respond(streams(chat())))) == wanted


def ended_before(front: FrontEnd, make: Callable[[], Response]) -> Callable[[], Response]:
    """A route whose request has ended, with a report, when its response begins."""

    def route() -> Response:
        (name,), _ = front.begin("chatcmpl-a")
        front.end(name, report(7))
        return make()

    return route


ENDS = chat_chunk("chatcmpl-a", 0, "stop")


@pytest.mark.parametrize(
    ("kind", "headers"),
    [
        ("application/json", {}),
        ("text/plain", {}),
        ("text/event-stream", {"content-encoding": "gzip"}),
        ("text/event-stream", {"content-length": str(len(ENDS))}),
    ],
)
def test_other_responses_pass_as_they_are(
    tokenizer: Any, kind: str, headers: dict[str, str]
) -> None:
    def make() -> Response:
        return StreamingResponse(iter([ENDS]), media_type=kind, headers=headers)

    assert lines(asyncio.run(respond(ended_before(FrontEnd(tokenizer), make)))) == [ENDS]


def test_a_response_that_is_not_streamed_passes_as_it_is(tokenizer: Any) -> None:
    content = json.loads(ENDS.removeprefix("data: "))
    route = ended_before(FrontEnd(tokenizer), lambda: JSONResponse(content))
    assert json.loads(lines(asyncio.run(respond(route)))[0]) == content


def test_an_error_of_ours_costs_the_report_alone_and_is_said_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stream_reports.logger, "warning_once", lambda text, *a: said.append(text))

    def fail(chunk: Any, heard: Any) -> None:
        raise KeyError("not as expected")

    monkeypatch.setattr(stream_reports, "report_for", fail)
    route = ended_before(FrontEnd(tokenizer), streams([ENDS, ENDS, DONE]))
    assert lines(asyncio.run(respond(route))) == [ENDS, ENDS, DONE]
    assert said == ["kvcomm: a streamed response has no report (%s: %s)"]


def test_a_request_that_is_not_as_expected_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stream_reports.logger, "warning_once", lambda text, *a: said.append(text))
    state = SimpleNamespace(**{stream_reports.LISTENER: Told()})  # it has no name
    stream_reports.tell_listener(state, report(7))
    assert len(said) == 1


def test_a_client_that_is_gone_ends_its_stream_as_ever(tokenizer: Any) -> None:
    async def send(message: Any) -> None:
        if message.get("body"):
            raise OSError("gone")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": ENDS.encode(), "more_body": True})

    with pytest.raises(OSError, match="gone"):
        asyncio.run(StreamReportsMiddleware(app)(POST, None, send))  # type: ignore[arg-type]
    assert stream_reports._TOLD.get() is None


def test_other_protocols_and_methods_pass_untouched() -> None:
    passed: list[Any] = []

    async def app(*given: Any) -> None:
        passed.append(given)

    for scope in ({"type": "lifespan"}, {"type": "websocket"}, {"type": "http", "method": "GET"}):
        asyncio.run(StreamReportsMiddleware(app)(scope, "receive", "send"))  # type: ignore[arg-type]
        assert passed.pop() == (scope, "receive", "send")


def test_the_middleware_is_where_vllm_is_told_to_look_for_it() -> None:
    module, _, name = stream_reports.MIDDLEWARE.rpartition(".")
    found = StreamReportsMiddleware
    assert (module, name) == (found.__module__, found.__qualname__)
