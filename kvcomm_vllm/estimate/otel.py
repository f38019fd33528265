# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry's attributes of generative models (``gen_ai.*``), made a body of OpenAI's.

Two ways of writing prompts are in use: JSON in ``gen_ai.input.messages``, and one attribute per
field, ``gen_ai.prompt.0.content``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PREFIX = "gen_ai."
_FIELD = re.compile(r"gen_ai\.(prompt|completion)\.(\d{1,5})\.(role|content)\Z")


def body(span: Mapping[str, Any]) -> dict[str, Any] | None:
    """The request that a span tells of, with its ``response``; None if it tells of none."""
    found = {**_attributes(span.get("attributes")), **span}
    attributes = {key: value for key, value in found.items() if key.startswith(PREFIX)}
    if not attributes:
        return None
    asked = _messages(attributes, "system_instructions") + _messages(attributes, "input.messages")
    said = _messages(attributes, "output.messages")
    asked, said = (
        asked or _numbered(attributes, "prompt"),
        said or _numbered(attributes, "completion"),
    )
    if not asked:
        return None
    made = {"messages": asked, "model": attributes.get("gen_ai.request.model")}
    made["agent"] = attributes.get("gen_ai.agent.name")
    if said:
        made["response"] = {"choices": [{"message": said[0]}]}
    tools = _loaded(attributes.get("gen_ai.tool.definitions"))
    return made | ({"tools": tools} if isinstance(tools, list) else {})


def _attributes(value: object) -> dict[str, Any]:
    """A mapping, or the protocol's list of keys and values."""
    if isinstance(value, Mapping):
        return {key: value[key] for key in value if isinstance(key, str)}
    found = {}
    for item in value if isinstance(value, list) else []:
        inner = item.get("value") if isinstance(item, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(item.get("key"), str):
            found[item["key"]] = next(iter(inner.values()), None)
    return found


def _messages(attributes: Mapping[str, Any], name: str) -> list[Any]:
    value = _loaded(attributes.get(PREFIX + name))
    if not isinstance(value, list) or not value:
        return []
    if name == "system_instructions":
        value = [{"role": "system", "parts": value}]
    return [_message(message) for message in value]


def _message(message: Any) -> Any:
    """A message in OpenAI's form; what is none is left to be refused by who reads those."""
    parts = message.get("parts") if isinstance(message, Mapping) else None
    if not isinstance(parts, list):
        return message
    made: dict[str, Any] = {"role": message.get("role", "user"), "content": []}
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_call":
            call = {"name": part.get("name"), "arguments": part.get("arguments")}
            made.setdefault("tool_calls", []).append({"id": part.get("id"), "function": call})
        elif kind in ("tool_call_response", "text"):
            said = part.get("content", part.get("response", part.get("result")))
            said = said if isinstance(said, str) else json.dumps(said)
            made["content"].append({"type": "text", "text": said})
        elif kind == "reasoning":
            made["reasoning"] = part.get("content")
        else:
            made["content"].append(part)
    return made


def _numbered(attributes: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for key, value in attributes.items():
        field = _FIELD.match(key)
        if field is not None and field[1] == name:
            found.setdefault(int(field[2]), {"role": "user"})[field[3]] = value
    return [found[number] for number in sorted(found)]


def _loaded(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
