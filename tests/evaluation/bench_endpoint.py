# SPDX-License-Identifier: Apache-2.0
"""A small server that streams like vLLM: words are tokens, answers depend on the prompt alone."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONGEST = 4000
OPENAI_FIELDS = {
    "model",
    "messages",
    "max_tokens",
    "temperature",
    "seed",
    "stream",
    "stream_options",
}


def token(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:2])


class FakeServer:
    """What the server was asked, and how it is to behave.

    Args:
        strict: refuse fields beyond OpenAI's, and give no token ids.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.bodies: list[dict[str, Any]] = []
        self.on_request: Callable[[int], None] = lambda number: None
        self.metrics = ""
        self.url = ""


def _answer(prompt: list[str], body: dict[str, Any]) -> list[str]:
    seed = hashlib.sha256(" ".join(prompt).encode()).hexdigest()
    words = [f"{seed[:4]}{number}" for number in range(body["max_tokens"])]
    fixed = body.get("min_tokens") == body["max_tokens"]
    return words if fixed else words[: len(words) - len(words) // 3]


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = json.dumps({"object": "list", "data": [{"id": "first", "object": "model"}]})
            self._reply(200, fake.metrics if self.path == "/metrics" else models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            fake.on_request(len(fake.bodies))
            prompt = " ".join(m["content"] for m in body["messages"]).split()
            if fake.strict and set(body) > OPENAI_FIELDS:
                self._reply(400, '{"error": {"message": "unknown field"}}')
            elif len(prompt) > LONGEST:
                self._reply(400, '{"error": {"message": "the prompt is too long"}}')
            else:
                self._stream(prompt, body)

        def _stream(self, prompt: list[str], body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            words = _answer(prompt, body)
            ids = body.get("return_token_ids") and not fake.strict
            known = {"prompt_token_ids": [token(w) for w in prompt]} if ids else {}
            self._send([{"index": 0, "delta": {"role": "assistant", "content": ""}}], **known)
            for word in words:
                more = {"token_ids": [token(word)]} if ids else {}
                self._send([{"index": 0, "delta": {"content": f"{word} "}, **more}])
            usage = {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(words),
                "total_tokens": len(prompt) + len(words),
            }
            self._send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
            self._send([], usage=usage)
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, choices: list[Any], **more: Any) -> None:
            head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            line = json.dumps({**head, "choices": choices, **more})
            self.wfile.write(f"data: {line}\n\n".encode())

        def _reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serving(strict: bool = False) -> Iterator[FakeServer]:
    fake = FakeServer(strict)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
