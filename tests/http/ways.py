# SPDX-License-Identifier: Apache-2.0
"""Ways to ask a real server: each endpoint, what a request to it looks like, and its answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from serving import Agents

CHAT, TEXT, BATCH = "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/batch"
TOKENS_IN = "/inference/v1/generate"
TOKENS = 3
OFF = {"kv_transfer_params": {"kvcomm": {"mode": "off"}}}

Body = dict[str, Any]


def messages(role: str, text: str) -> list[Body]:
    return [
        {"role": "system", "content": f"{role} " * 12},
        {"role": "user", "content": f"{text}\nWhat does the {role} say?"},
    ]


class Way:
    """An endpoint and how it is asked: ``body`` makes a request of an agent's role and a text, of
    which vLLM makes ``requests`` engine requests.
    """

    def __init__(self, path: str, requests: int, body: Callable[[str, str], Body]) -> None:
        self.path = path
        self.requests = requests
        self.body = body


def chat(path: str = CHAT, requests: int = 1, **options: Any) -> Way:
    given = {"max_tokens": TOKENS, "temperature": 0, **options}
    return Way(path, requests, lambda role, text: {"messages": messages(role, text), **given})


def prompts(requests: int = 1, count: int = 1, **options: Any) -> Way:
    given = {"max_tokens": TOKENS, "temperature": 0, **options}

    def body(role: str, text: str) -> Body:
        each = [f"{role} " * (n + 1) + text for n in range(count)]
        return {"prompt": each if count > 1 else each[0], **given}

    return Way(TEXT, requests, body)


def batch(role: str, text: str) -> Body:
    each = [messages(f"{role}{n}", text) for n in range(2)]
    return {"messages": each, "max_tokens": TOKENS, "temperature": 0}


def responses(**options: Any) -> Way:
    given = {"max_output_tokens": TOKENS, "temperature": 0, "store": False, **options}
    return Way("/v1/responses", 1, lambda role, text: {"input": f"{role} {text}", **given})


def anthropic(**options: Any) -> Way:
    def body(role: str, text: str) -> Body:
        ask = {"system": f"{role} " * 12, "messages": messages(role, text)[1:]}
        return {**ask, "max_tokens": TOKENS, "temperature": 0, **options}

    return Way("/v1/messages", 1, body)


def tokens(**options: Any) -> Way:
    """Token in, token out: tokens that stand for text here."""

    def body(role: str, text: str) -> Body:
        ids = [100 + sum(word.encode()) % 5000 for word in f"{role} {text}".split()]
        params = {"max_tokens": TOKENS, "temperature": 0}
        return {"token_ids": ids, "sampling_params": params, **options}

    return Way(TOKENS_IN, 1, body)


def scoring(role: str, text: str) -> Body:
    return {"query": f"{role} {text}", "items": [" one", " two"], "label_token_ids": [300, 301]}


BEAMS = {"use_beam_search": True, "n": 2, "ignore_eos": True}
WAYS = {
    "chat": chat(),
    "chat, streamed": chat(stream=True),
    "chat, samples": chat(requests=3, n=3, temperature=1.0, seed=1),
    "chat, beams": chat(requests=1 + 2 * (TOKENS - 1), **BEAMS),
    "chat, by SageMaker's route": chat("/invocations"),
    "batch": Way(BATCH, 2, batch),
    "text": prompts(),
    "text, streamed": prompts(stream=True),
    "text, several prompts": prompts(requests=2, count=2),
    "text, beams": prompts(requests=1 + 2 * (TOKENS - 1), **BEAMS),
    "responses": responses(),
    "responses, streamed": responses(stream=True),
    "responses, in the background": responses(background=True, store=True),
    "messages": anthropic(),
    "messages, streamed": anthropic(stream=True),
    "tokens": tokens(),
    "tokens, streamed": tokens(stream=True),
    "scoring": Way("/generative_scoring", 2, scoring),
}


def post(agents: Agents, path: str, body: Body | bytes, **options: Any) -> Any:
    """Send a request; ``body`` without the model's name."""
    if isinstance(body, dict):
        body = json.dumps({"model": agents.model, **body}).encode()
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    url = agents.server.base_url + path
    return httpx.post(url, content=body, headers=headers, timeout=300, **options)


def chunks_of(answer: Any) -> list[Body]:
    """What a stream consists of; nothing but events, the last of which says that it is over."""
    *lines, end = answer.text.split("\n\n")
    assert (lines.pop(), end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]
