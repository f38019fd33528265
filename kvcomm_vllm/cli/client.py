# SPDX-License-Identifier: Apache-2.0
"""One chat request to an OpenAI endpoint, timed. Nothing in here knows the plugin."""

import time
from dataclasses import dataclass
from typing import Any

import openai

REQUEST_TIMEOUT_SECONDS = 600.0
Message = dict[str, str]


class RequestError(RuntimeError):
    """The server refused a request or broke the connection."""


@dataclass(frozen=True)
class Answer:
    """What one request returned.

    `ttft_ms` runs from sending the request to the first chunk that carries a token; None for a
    request that was not streamed. `cached_tokens` is the server's own count of prompt tokens that
    it did not compute. `extra` holds the response fields beyond OpenAI's.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float | None
    total_ms: float
    extra: dict[str, Any]


class ChatClient:
    """Greedy chat completions of a fixed length through the official client."""

    def __init__(self, base_url: str, model: str) -> None:
        self.model = model
        self._client = openai.OpenAI(
            base_url=f"{base_url}/v1",
            api_key="EMPTY",
            timeout=REQUEST_TIMEOUT_SECONDS,
            max_retries=0,
        )

    def close(self) -> None:
        self._client.close()

    def _arguments(
        self, messages: list[Message], answer_tokens: int, cache_salt: str | None
    ) -> dict[str, Any]:
        # min_tokens forbids an early end, so that every run quotes messages of the same size.
        body: dict[str, Any] = {"min_tokens": answer_tokens, "return_token_ids": True}
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": answer_tokens,
            "temperature": 0.0,
            "seed": 0,
            "extra_body": body,
        }

    def stream(
        self, messages: list[Message], answer_tokens: int, cache_salt: str | None = None
    ) -> Answer:
        """Send a streaming request and time its first token. Errors: RequestError."""
        arguments = self._arguments(messages, answer_tokens, cache_salt)
        text: list[str] = []
        ids: list[int] = []
        ttft_ms: float | None = None
        usage: Any = None
        start = time.perf_counter()
        try:
            chunks = self._client.chat.completions.create(
                stream=True, stream_options={"include_usage": True}, **arguments
            )
            for chunk in chunks:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    new_ids = (choice.model_extra or {}).get("token_ids") or []
                    if ttft_ms is None and (choice.delta.content or new_ids):
                        ttft_ms = (time.perf_counter() - start) * 1e3
                    text.append(choice.delta.content or "")
                    ids.extend(new_ids)
        except openai.OpenAIError as error:
            raise RequestError(f"Request failed: {error}") from error
        if usage is None or ttft_ms is None:
            raise RequestError("The server ended the stream without a token or without usage.")
        total_ms = (time.perf_counter() - start) * 1e3
        return _answer("".join(text), ids, usage, ttft_ms, total_ms, {})

    def complete(self, messages: list[Message], answer_tokens: int) -> Answer:
        """Send a request without streaming, which is where servers can add their own fields.

        Errors: RequestError.
        """
        start = time.perf_counter()
        try:
            response = self._client.chat.completions.create(
                **self._arguments(messages, answer_tokens, None)
            )
        except openai.OpenAIError as error:
            raise RequestError(f"Request failed: {error}") from error
        total_ms = (time.perf_counter() - start) * 1e3
        choice = response.choices[0]
        ids = (choice.model_extra or {}).get("token_ids") or []
        text = choice.message.content or ""
        return _answer(text, ids, response.usage, None, total_ms, response.model_extra or {})


def _answer(
    text: str,
    ids: list[int],
    usage: Any,
    ttft_ms: float | None,
    total_ms: float,
    extra: dict[str, Any],
) -> Answer:
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details else 0
    return Answer(text, tuple(ids), usage.prompt_tokens, cached, ttft_ms, total_ms, extra)
