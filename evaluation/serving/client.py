# SPDX-License-Identifier: Apache-2.0
"""One chat request to an OpenAI endpoint, timed. Nothing in here knows the plugin."""

import time
from dataclasses import dataclass, field
from typing import Any

import openai

from kvcomm_vllm.cli.failure import UserError
from kvcomm_vllm.evaluation.workloads.case import Message

REQUEST_TIMEOUT_SECONDS = 600.0


class RequestError(UserError, RuntimeError):
    """The server refused a request or broke the connection."""


class RefusedError(RequestError):
    """The server refused this one request; another one may be served."""


@dataclass(frozen=True)
class Answer:
    """What one request returned.

    `ttft_ms` runs from sending the request to the first chunk that carries a token; None for a
    request that was not streamed. `cached_tokens` is the server's own count of prompt tokens that
    it did not compute. `extra` holds the response fields beyond OpenAI's. Token ids are empty where
    the server does not give them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float | None = None
    total_ms: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    output_tokens: int = 0

    @property
    def report(self) -> dict[str, Any] | None:
        """The plugin's, of how it has served the request; only without streaming."""
        params = self.extra.get("kv_transfer_params")
        report = params.get("kvcomm") if isinstance(params, dict) else None
        return report if isinstance(report, dict) else None


class ChatClient:
    """Greedy chat completions through the official client.

    With `vllm` false a request has no field but OpenAI's: answers end where they will, and nothing
    is known of token ids.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str = "EMPTY", vllm: bool = True
    ) -> None:
        self.model = model
        self.vllm = vllm
        self._client = openai.OpenAI(
            base_url=f"{base_url}/v1",
            api_key=api_key,
            timeout=REQUEST_TIMEOUT_SECONDS,
            max_retries=0,
        )

    def close(self) -> None:
        self._client.close()

    def _arguments(
        self,
        messages: list[Message],
        answer_tokens: int,
        cache_salt: str | None,
        fixed: bool,
        hints: dict[str, Any] | None,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {}
        if self.vllm:
            body["return_token_ids"] = True
            if fixed:
                body["min_tokens"] = answer_tokens
            if cache_salt is not None:
                body["cache_salt"] = cache_salt
            if hints is not None:
                body["kv_transfer_params"] = hints
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": answer_tokens,
            "temperature": 0.0,
            "seed": 0,
            "extra_body": body,
        }

    def stream(
        self,
        messages: list[Message],
        answer_tokens: int,
        cache_salt: str | None = None,
        *,
        fixed: bool = True,
        hints: dict[str, Any] | None = None,
    ) -> Answer:
        """Send a streaming request and time its first token.

        A `fixed` answer has exactly `answer_tokens` tokens, another one ends where the model ends
        it. `hints` are `kv_transfer_params`. Errors: RequestError, RefusedError.
        """
        arguments = self._arguments(messages, answer_tokens, cache_salt, fixed, hints)
        text: list[str] = []
        ids: list[int] = []
        prompt_ids: list[int] = []
        ttft_ms: float | None = None
        usage: Any = None
        start = time.perf_counter()
        try:
            chunks = self._client.chat.completions.create(
                stream=True, stream_options={"include_usage": True}, **arguments
            )
            for chunk in chunks:
                usage = chunk.usage or usage
                prompt_ids = (chunk.model_extra or {}).get("prompt_token_ids") or prompt_ids
                for choice in chunk.choices:
                    new_ids = (choice.model_extra or {}).get("token_ids") or []
                    # an answer may be empty: then its end is the first sign of it
                    sign = choice.delta.content or new_ids or choice.finish_reason
                    if ttft_ms is None and sign:
                        ttft_ms = (time.perf_counter() - start) * 1e3
                    text.append(choice.delta.content or "")
                    ids.extend(new_ids)
        except openai.OpenAIError as error:
            raise _failure(error) from error
        if usage is None or ttft_ms is None:
            raise RequestError("The server ended the stream without a token or without usage.")
        total_ms = (time.perf_counter() - start) * 1e3
        return Answer(
            "".join(text),
            tuple(ids),
            ttft_ms=ttft_ms,
            total_ms=total_ms,
            prompt_ids=tuple(prompt_ids),
            **_usage(usage),
        )

    def complete(
        self,
        messages: list[Message],
        answer_tokens: int,
        cache_salt: str | None = None,
        *,
        hints: dict[str, Any] | None = None,
    ) -> Answer:
        """Send a request without streaming, which is where servers can add their own fields.

        Errors: RequestError, RefusedError.
        """
        start = time.perf_counter()
        try:
            response = self._client.chat.completions.create(
                **self._arguments(messages, answer_tokens, cache_salt, True, hints)
            )
        except openai.OpenAIError as error:
            raise _failure(error) from error
        total_ms = (time.perf_counter() - start) * 1e3
        (choice,) = response.choices
        return Answer(
            choice.message.content or "",
            tuple((choice.model_extra or {}).get("token_ids") or []),
            total_ms=total_ms,
            extra=response.model_extra or {},
            **_usage(response.usage),
        )


# 400: vLLM for a prompt that is too long, hints it does not accept; 422: other servers
REFUSALS = (openai.BadRequestError, openai.UnprocessableEntityError)


def _failure(error: openai.OpenAIError) -> RequestError:
    kind = RefusedError if isinstance(error, REFUSALS) else RequestError
    return kind(f"Request failed: {error}")


def _usage(usage: Any) -> dict[str, Any]:
    details = usage.prompt_tokens_details
    return {
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cached_tokens": (details.cached_tokens or 0) if details else 0,
    }
