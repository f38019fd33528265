# SPDX-License-Identifier: Apache-2.0
"""Records: what one line of a log says of a request, whichever program has written it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.estimate import otel
from kvcomm_vllm.estimate.flaws import Flaw, SkippedError
from kvcomm_vllm.estimate.messages import Message, message_of, messages_of
from kvcomm_vllm.wording import one_line, shown

BODIES = (
    *("body", "request_body", "requestBody", "request", "payload", "input", "kwargs", "data"),
    "model_parameters",
)
ANSWERS = ("response", "response_body", "responseBody", "completion", "output")
AGENTS = ("agent", "agent_name", "agent_id", "gen_ai.agent.name")
DEPTH = 3
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One prompt: ``messages``, or else ``prompt`` as text or tokens.

    Args:
        hints: the body's ``kv_transfer_params``.
        scored: it asks for log-probabilities of its prompt.
        answer: what came back: a message, or text behind a ``prompt``.
    """

    messages: list[Message] | None = None
    prompt: str | list[int] = ""
    tools: list[Any] | None = None
    template: Fields | None = None
    model: str = ""
    agent: str = ""
    salt: str | None = None
    hints: Fields | None = None
    scored: bool = False
    answer: Message | str | None = None

    @property
    def characters(self) -> int:
        """Of its text; tokens count as one each."""
        texts = [text for message in self.messages or () for text in message["content"]]
        return len(self.prompt) + sum(map(len, texts))


def records(value: object) -> Iterator[Record | SkippedError]:
    """The requests of one line: one, or as many as a body has prompts or a list has bodies."""
    for item in value if isinstance(value, list) else [value]:
        try:
            yield from _records(item)
        except SkippedError as skipped:
            yield skipped


def _records(value: object) -> Iterator[Record]:
    layers = list(_layers(value, DEPTH))
    body = next((layer for layer in layers if {"messages", "prompt"} & layer.keys()), None)
    if body is None:
        raise SkippedError(Flaw.NO_REQUEST, shown(value))
    layers.sort(key=lambda layer: layer is not body)  # what the body says comes first
    answer = _answer(layers, "messages" in body)
    common: dict[str, Any] = {
        "model": _first(layers, ("model", "gen_ai.request.model"), str) or "",
        "agent": _agent(layers),
        "salt": _typed(body, "cache_salt", str),
        "hints": _typed(body, "kv_transfer_params", Mapping),
        "scored": _scored(body),
    }
    if body.get("messages") is not None:
        yield Record(
            messages=messages_of(body["messages"]),
            tools=_first(layers, ("tools",), list) or None,
            template=_typed(body, "chat_template_kwargs", Mapping),
            answer=answer,
            **common,
        )
        return
    prompts = _prompts(body.get("prompt"))
    for prompt in prompts:
        yield Record(prompt=prompt, answer=answer if len(prompts) == 1 else None, **common)


def _layers(value: object, depth: int) -> Iterator[Fields]:
    """The line, and the objects in it that may hold its body; as JSON text, too."""
    if depth < DEPTH:
        value = _object(value)
    if not isinstance(value, Mapping):
        return
    spoken = otel.body(value)
    if spoken is not None:
        yield spoken
    yield value
    for key in BODIES if depth else ():
        yield from _layers(value.get(key), depth - 1)


def _prompts(value: object) -> list[str | list[int]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise SkippedError(Flaw.WRONG_TYPE, f"prompt: {shown(value)}")
    if value and all(_is_token(item) for item in value):
        value = [value]
    for item in value:
        if not isinstance(item, str) and not (isinstance(item, list) and all(map(_is_token, item))):
            raise SkippedError(Flaw.WRONG_TYPE, f"prompt: {shown(item)}")
    if not any(value):
        raise SkippedError(Flaw.EMPTY)
    return [item for item in value if item]


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _typed(body: Fields, key: str, kind: type) -> Any:
    value = body.get(key)
    if value is not None and not isinstance(value, kind):
        raise SkippedError(Flaw.WRONG_TYPE, f"{key}: {shown(value)}")
    return value


def _scored(body: Fields) -> bool:
    echoed = body.get("echo") is True and body.get("logprobs") is not None
    return echoed or body.get("prompt_logprobs") is not None


def _first(layers: list[Fields], keys: tuple[str, ...], kind: type) -> Any:
    found = (layer.get(key) for layer in layers for key in keys)
    return next((value for value in found if isinstance(value, kind) and value), None)


def _agent(layers: list[Fields]) -> str:
    """Its name, if the line has one: our own hint, or what loggers write."""
    hints = [layer.get("kv_transfer_params") for layer in layers]
    inner = [hint.get("kvcomm") for hint in hints if isinstance(hint, Mapping)]
    inner += [layer.get(key) for layer in layers for key in ("metadata", "attributes")]
    named = [layer for layer in inner if isinstance(layer, Mapping)]
    name = _first([*named, *layers], AGENTS, str)
    return one_line(name, 60) if name else ""


def _answer(layers: list[Fields], chat: bool) -> Message | str | None:
    """What came back, where the log has it in a form that is understood; else nothing."""
    for layer in layers:
        for key in ANSWERS:
            said = _said(layer.get(key), chat)
            if isinstance(said, str) and said:
                return {"role": "assistant", "content": [said]} if chat else said
            if isinstance(said, Mapping):
                try:
                    return message_of({**said, "role": "assistant"})
                except SkippedError:
                    return None
    return None


def _said(found: object, chat: bool) -> object:
    """The first choice of a response: a message, or text."""
    found = _object(found)
    if isinstance(found, Mapping) and isinstance(found.get("body"), Mapping):
        found = found["body"]  # OpenAI's batches
    choices = found.get("choices") if isinstance(found, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else found
    if not isinstance(choice, Mapping):
        return choice
    if not chat:
        return choice.get("text")
    return choice.get("message", choice if "content" in choice else None)


def _object(value: object) -> object:
    """What a text says that is an object's JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
