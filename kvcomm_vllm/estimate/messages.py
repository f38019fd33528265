# SPDX-License-Identifier: Apache-2.0
"""Messages of a chat, as vLLM hands them to a chat template: text alone, and in plain types."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from kvcomm_vllm.estimate.flaws import Flaw, SkippedError
from kvcomm_vllm.wording import shown

KEPT = ("tool_call_id", "name", "reasoning", "reasoning_content")
TEXTS = ("text", "input_text", "output_text", "refusal", "thinking")
Message = dict[str, Any]


def messages_of(value: object) -> list[Message]:
    """The messages of a body; ``content`` is a list of texts.

    Raises:
        SkippedError: they are none, or not of text alone.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # written as text
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    found = [message_of(message) for message in _list("messages", value)]
    if not any(message["content"] or "tool_calls" in message for message in found):
        raise SkippedError(Flaw.EMPTY)
    return found


def message_of(value: object) -> Message:
    """One message.

    Raises:
        SkippedError: as above.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise SkippedError(Flaw.WRONG_TYPE, f"a message: {shown(value)}")
    message: Message = {"role": value["role"], "content": _texts(value.get("content"))}
    message |= {key: value[key] for key in KEPT if isinstance(value.get(key), str)}
    calls = value.get("tool_calls")
    if calls:
        message["tool_calls"] = [_call(call) for call in _list("tool_calls", calls)]
    return message


def _texts(content: object) -> list[str]:
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [content]
    return [text for part in _list("content", content) if (text := _text(part))]


def _text(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise SkippedError(Flaw.WRONG_TYPE, f"a part of a message: {shown(part)}")
    if kind not in TEXTS:
        raise SkippedError(Flaw.MEDIA, shown(kind))
    text = next((part[key] for key in ("text", kind) if key in part), "")
    if not isinstance(text, str):
        raise SkippedError(Flaw.WRONG_TYPE, f"text: {shown(text)}")
    return text


def _call(call: object) -> Message:
    """A tool call; vLLM reads its arguments before the template sees them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise SkippedError(Flaw.WRONG_TYPE, f"a tool call: {shown(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # it has to make do with the text
            arguments = json.loads(arguments) if arguments.strip() else {}
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise SkippedError(Flaw.WRONG_TYPE, f"{name}: {shown(value)}")
    return value
