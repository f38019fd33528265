# SPDX-License-Identifier: Apache-2.0
"""The timing client against a small server that streams like vLLM."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.evaluation.serving.client import ChatClient, RequestError

PREFILL_SECONDS = 0.2
MESSAGES = [{"role": "user", "content": "Hello"}]


def chunk(delta: dict[str, str], ids: list[int] | None, usage: dict[str, Any] | None = None) -> Any:
    choices = [] if usage else [{"index": 0, "delta": delta, "token_ids": ids}]
    head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return {**head, "choices": choices, "usage": usage}


USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 2,
    "total_tokens": 42,
    "prompt_tokens_details": {"cached_tokens": 32},
}


class Handler(BaseHTTPRequestHandler):
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if body["model"] == "unknown":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such model"}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._send(chunk({"role": "assistant", "content": ""}, None))
        time.sleep(PREFILL_SECONDS)
        self._send(chunk({"content": "Good "}, [5]))
        self._send(chunk({"content": "day"}, [6, 7]))
        self._send(chunk({}, None, USAGE))
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Handler.seen = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_first_token_is_timed_and_not_the_empty_first_chunk(endpoint: str) -> None:
    answer = ChatClient(endpoint, "m").stream(MESSAGES, 3)
    assert answer.ttft_ms is not None
    assert PREFILL_SECONDS * 1e3 <= answer.ttft_ms <= answer.total_ms
    assert answer.text == "Good day"
    assert answer.token_ids == (5, 6, 7)
    assert (answer.prompt_tokens, answer.cached_tokens) == (40, 32)


def test_requests_are_greedy_of_fixed_length_and_salted_only_when_asked(endpoint: str) -> None:
    client = ChatClient(endpoint, "m")
    client.stream(MESSAGES, 3)
    client.stream(MESSAGES, 3, cache_salt="cold 1")
    plain, salted = Handler.seen
    assert plain["temperature"] == 0.0
    assert plain["max_tokens"] == plain["min_tokens"] == 3
    assert "cache_salt" not in plain
    assert salted == {**plain, "cache_salt": "cold 1"}


def test_a_refusal_is_one_clear_error(endpoint: str) -> None:
    with pytest.raises(RequestError, match="no such model"):
        ChatClient(endpoint, "unknown").stream(MESSAGES, 3)
