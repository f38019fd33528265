# SPDX-License-Identifier: Apache-2.0
"""Promises of the middleware: hints are found however a body is written and sent, malformed ones
are answered in vLLM's form without a traceback, and every other body is none of its business.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from kvcomm_vllm import metrics
from kvcomm_vllm.front import carried_hints, hints_http
from kvcomm_vllm.front.hints_http import HintsMiddleware, hints_in, may_have_hints
from kvcomm_vllm.hints import FIELD

OFF = {"mode": "off"}
JSON = {"content-type": "application/json"}
BAD = {"kv_transfer_params": {"kvcomm": {"spans": [[5, 2]]}}}


def body(hints: object, **others: object) -> dict[str, object]:
    return {"prompt": "hello", **others, "kv_transfer_params": {"kvcomm": hints}}


def carried() -> Any:
    """The hints that an engine request made now would get."""
    here = carried_hints._CARRIED.get()
    return here and here.given


@pytest.fixture
def client() -> TestClient:
    """vLLM's handlers of errors in their most talkative setting, and a route that tells what goes
    with its requests.
    """
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=True)
    init_exception_handler(app)
    app.add_middleware(HintsMiddleware)

    @app.post("/v1/completions")
    async def complete(request: Request, content: dict[str, Any]) -> dict[str, Any]:
        return {"carried": carried(), "content": content}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"carried": carried()}

    return TestClient(app)


# ---- finding them ------------------------------------------------------------------------------


@st.composite
def spelled(draw: st.DrawFn, name: str) -> str:
    """A name as JSON, each letter plain or as an escape in either case."""
    letters = []
    for letter in name:
        escape = f"\\u{ord(letter):04x}"
        upper = "\\u" + escape[2:].upper()
        letters.append(draw(st.sampled_from([letter, escape, upper])))
    return '"' + "".join(letters) + '"'


@given(
    spelled("kvcomm"),
    spelled("kv_transfer_params"),
    spelled("off"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
)
def test_hints_are_found_however_they_are_spelled_and_encoded(
    name: str, params: str, mode: str, encoding: str
) -> None:
    text = f'{{"prompt": "hé", {params}: {{{name}: {{"mode": {mode}}}}}}}'
    assert hints_in(text.encode(encoding)) == OFF


@given(st.text(st.characters(exclude_characters="\\\x7f")), st.booleans())
def test_a_body_without_the_field_or_escaped_letters_is_not_parsed(
    text: str, ascii_only: bool
) -> None:
    if f'"{FIELD}"' in text:
        return
    prompt = json.dumps({"prompt": text, "kv_transfer_params": None}, ensure_ascii=ascii_only)
    data = prompt.encode("utf-8", "surrogatepass")
    assert not may_have_hints(data)


def test_of_equal_keys_the_last_one_counts_as_in_the_route() -> None:
    one, other = '{"kvcomm": {"mode": "rotate"}}', '{"kvcomm": {"mode": "off"}}'
    text = f'{{"kv_transfer_params": {one}, "kv_transfer_params": {other}}}'
    assert hints_in(text.encode()) == OFF
    text = '{"kv_transfer_params": {"kvcomm": {"mode": "seam"}, "kvcomm": {"mode": "off"}}}'
    assert hints_in(text.encode()) == OFF
    last_has_none = f'{{"kv_transfer_params": {other}, "kv_transfer_params": {{}}}}'
    assert hints_in(last_has_none.encode()) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"kvcomm": ',
        b'"kvcomm"',
        b'["kvcomm"]',
        b'{"kv_transfer_params": "kvcomm"}',
        b'{"kv_transfer_params": ["kvcomm"]}',
        b'{"kvcomm": {"mode": "nonsense"}}',
        b'\xff\xfe{"kvcomm"',
        '{"x": "é", "kv_transfer_params": {"kvcomm": {"mode": "nonsense"}}}'.encode("latin-1"),
        gzip.compress(json.dumps(BAD).encode(), mtime=0),
    ],
    ids=repr,
)
def test_what_holds_no_hints_is_left_to_the_route(data: bytes) -> None:
    assert hints_in(data) is None


def test_a_body_too_deep_for_us_is_served_exactly() -> None:
    """The route reads it again, with a little more stack left, and may succeed."""
    deep = "[" * 100_000 + "]" * 100_000
    assert hints_in(f'{{"kvcomm": {deep}}}'.encode()) == OFF


# ---- carrying them ------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [OFF, {"mode": "seam", "agent": "writer"}])
def test_the_hints_of_a_request_are_there_while_it_is_served(
    client: TestClient, sent: dict[str, str]
) -> None:
    answer = client.post("/v1/completions", json=body(sent)).json()
    assert answer == {"carried": sent, "content": body(sent)}
    assert client.post("/v1/completions", json={"prompt": "hello"}).json()["carried"] is None
    assert client.get("/v1/models").json()["carried"] is None


def test_hints_are_found_in_a_body_that_comes_in_pieces(client: TestClient) -> None:
    text = json.dumps(body(OFF)).encode()
    pieces = (text[i : i + 1] for i in range(len(text)))
    answer = client.post("/v1/completions", content=pieces, headers=JSON)
    assert answer.json()["carried"] == OFF


def test_a_compressed_body_is_answered_by_the_route(client: TestClient) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    data = gzip.compress(json.dumps(body(OFF)).encode())
    assert client.post("/v1/completions", content=data, headers=headers).status_code == 400


def test_what_a_middleware_unpacks_is_seen() -> None:
    """Ours is the one next to the routes (see ``compat/cli.py``)."""

    class Unpacking:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def unpacked() -> Any:
                message = await receive()
                return {**message, "body": gzip.decompress(message["body"])}

            await self.app(scope, unpacked if scope["type"] == "http" else receive, send)

    app = FastAPI()
    for middleware in (HintsMiddleware, Unpacking):  # as vLLM adds a list of them
        app.add_middleware(middleware)

    @app.post("/")
    async def route(content: dict[str, Any]) -> Any:
        return carried()

    data = gzip.compress(json.dumps(body(OFF)).encode())
    assert TestClient(app).post("/", content=data, headers=JSON).json() == OFF


def test_a_client_that_hangs_up_within_its_body_leaves_nothing() -> None:
    """Neither hints for others, nor an error of ours."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive(), carried()])

    async def main() -> None:
        text = json.dumps(body(OFF)).encode()
        messages = iter(
            [
                {"type": "http.request", "body": text[:-1], "more_body": True},
                {"type": "http.disconnect"},
            ]
        )

        async def receive() -> Any:
            return next(messages)

        await HintsMiddleware(app)({"type": "http", "method": "POST"}, receive, None)  # type: ignore[arg-type]
        assert carried_hints._CARRIED.get() is None

    asyncio.run(main())
    assert [seen[1], seen[2]] == [{"type": "http.disconnect"}, None]


def test_other_protocols_pass_untouched() -> None:
    passed: list[Any] = []

    async def app(*given: Any) -> None:
        passed.append(given)

    for scope in ({"type": "lifespan"}, {"type": "websocket"}, {"type": "http", "method": "GET"}):
        asyncio.run(HintsMiddleware(app)(scope, "receive", "send"))  # type: ignore[arg-type]
        assert passed.pop() == (scope, "receive", "send")


# ---- refusing them ------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("hints", "param"),
    [
        ({"mode": "fast"}, "kv_transfer_params.kvcomm.mode"),
        ({"spans": [[5, 2]]}, "kv_transfer_params.kvcomm.spans[0]"),
        ("off", "kv_transfer_params.kvcomm"),
    ],
)
def test_malformed_hints_are_answered_in_vllms_form_without_a_traceback(
    client: TestClient, log: Any, hints: object, param: str
) -> None:
    answer = client.post("/v1/completions", json=body(hints))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert len(log.records) <= 1
    assert all(record.exc_info is None for record in log.records)
    assert client.post("/v1/completions", json=body(OFF)).status_code == 200


def test_malformed_hints_are_counted_where_the_server_counts(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Any] = []
    here = SimpleNamespace(
        per_engine_labelvalues={1: [], 0: []}, observe=lambda *given: counted.append(given)
    )
    monkeypatch.setattr(metrics.KVCommPromMetrics, "here", here)
    client.post("/v1/completions", json=BAD)
    client.post("/v1/completions", json=body(OFF))
    assert counted == [({"reasons/bad_hints": 1}, 0)]


def test_the_middleware_is_where_vllm_is_told_to_look_for_it() -> None:
    module, _, name = hints_http.MIDDLEWARE.rpartition(".")
    assert (module, name) == (HintsMiddleware.__module__, HintsMiddleware.__qualname__)
