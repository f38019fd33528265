# SPDX-License-Identifier: Apache-2.0
"""Chunks of streamed responses, as vLLM makes them, and reports in them."""

from __future__ import annotations

import json
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo

DONE = "data: [DONE]\n\n"
USAGE = UsageInfo(prompt_tokens=3, completion_tokens=2, total_tokens=5)


def event(chunk: Any) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def chat_chunk(name: str, choice: int, finish: str | None = None) -> str:
    delta = DeltaMessage(content="x")
    one = ChatCompletionResponseStreamChoice(index=choice, delta=delta, finish_reason=finish)
    return event(ChatCompletionStreamResponse(id=name, model="m", choices=[one]))


def text_chunk(name: str, choice: int, finish: str | None = None) -> str:
    one = CompletionResponseStreamChoice(index=choice, text="x", finish_reason=finish)
    return event(CompletionStreamResponse(id=name, model="m", choices=[one]))


def usage_chunk(name: str) -> str:
    return event(ChatCompletionStreamResponse(id=name, model="m", choices=[], usage=USAGE))


def report(number: int) -> dict[str, Any]:
    return {"kvcomm": {"reused": number}}


def reused(line: str) -> int | None:
    """What a line of a stream reports."""
    if not line.startswith("data: {"):
        return None
    params = json.loads(line.removeprefix("data: ")).get("kv_transfer_params")
    return params and int(params["kvcomm"]["reused"])
