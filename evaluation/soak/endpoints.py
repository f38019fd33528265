# SPDX-License-Identifier: Apache-2.0
"""Requests by endpoint and by what they ask vLLM for."""

from __future__ import annotations

import random
from typing import Any

from kvcomm_vllm.evaluation.soak.item import BATCH, CHAT, MESSAGES, RESPONSES, TEXT, Item
from kvcomm_vllm.evaluation.soak.texts import ROLES, Tenant, story

ENDED = ("stop", "length")
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["north", "south"]}, "sure": {"type": "boolean"}},
    "required": ["place", "sure"],
    "additionalProperties": False,
}
SHAPES: tuple[dict[str, Any], ...] = (
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"structured_outputs": {"regex": "[0-9]{3}-[a-z]{4}"}},
)


def conversation(rng: random.Random, tenant: Tenant) -> Item:
    body = {"messages": tenant.conversation(), "max_tokens": rng.randint(1, 16)}
    return Item(0, "", CHAT, body, finish=ENDED)


def completion(rng: random.Random, tenant: Tenant) -> Item:
    body = {"prompt": "\n".join(tenant.documents(2)), "max_tokens": rng.randint(1, 10)}
    return Item(0, "", TEXT, body, finish=ENDED)


def list_of_prompts(rng: random.Random, tenant: Tenant) -> Item:
    prompts = [f"{role}: {tenant.documents(1)[0]}" for role in rng.sample(ROLES, 3)]
    body = {"prompt": prompts, "max_tokens": 4}
    return Item(0, "", TEXT, body, finish=ENDED, engine_requests=3)


def echo(rng: random.Random, tenant: Tenant) -> Item:
    asked = rng.choice(({"logprobs": 2}, {"logprobs": None}, {"prompt_logprobs": 1}))
    body = {"prompt": tenant.documents(1)[0], "echo": True, "max_tokens": rng.randint(1, 3)}
    return Item(0, "", TEXT, {**body, **asked}, finish=ENDED)


def prompt_logprobs(rng: random.Random, tenant: Tenant) -> Item:
    messages = tenant.chat(tenant.documents(1), "And?")
    body = {"messages": messages, "max_tokens": 2, "prompt_logprobs": 1}
    return Item(0, "", CHAT, body, finish=ENDED)


def responses(rng: random.Random, tenant: Tenant) -> Item:
    system, user = tenant.chat(tenant.documents(2), "Answer.")
    body = {
        "instructions": system["content"],
        "input": user["content"],
        "max_output_tokens": 8,
        "store": False,
        "stream": rng.random() < 0.5,
    }
    return Item(0, "", RESPONSES, body)


def messages(rng: random.Random, tenant: Tenant) -> Item:
    system, user = tenant.chat(tenant.documents(2), "Answer.")
    body = {
        "system": system["content"],
        "messages": [user],
        "max_tokens": 8,
        "stop_sequences": ["."],
        "stream": rng.random() < 0.5,
    }
    return Item(0, "", MESSAGES, body)


def batch(rng: random.Random, tenant: Tenant) -> Item:
    chats = [tenant.chat(tenant.documents(1), "Vote.") for _ in range(3)]
    body = {"messages": chats, "max_tokens": 3}
    return Item(0, "", BATCH, body, finish=ENDED, engine_requests=3)


def beam_search(rng: random.Random, tenant: Tenant) -> Item:
    body = {
        "messages": tenant.chat(tenant.documents(1), "Choose."),
        "max_tokens": 4,
        "use_beam_search": True,
        "n": 2,
    }
    return Item(0, "", CHAT, body, finish=ENDED, engine_requests=None)


def samples(rng: random.Random, tenant: Tenant) -> Item:
    """Without a seed: on CPUs vLLM 0.32 ends with a seeded request whose prefill is chunked."""
    count = rng.randint(2, 4)
    body = {
        "messages": tenant.chat(tenant.documents(2), "Guess."),
        "max_tokens": 6,
        "n": count,
        "temperature": 1.0,
    }
    return Item(0, "", CHAT, body, finish=ENDED, engine_requests=count)


def stream(rng: random.Random, tenant: Tenant) -> Item:
    body: dict[str, Any] = {
        "max_tokens": rng.randint(2, 24),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if rng.random() < 0.3:
        prompt = "\n".join(tenant.documents(2))
        return Item(0, "", TEXT, {**body, "prompt": prompt}, finish=ENDED)
    said = tenant.chat(tenant.documents(2), "Stream it.")
    return Item(0, "", CHAT, {**body, "messages": said}, finish=ENDED)


def structured(rng: random.Random, tenant: Tenant) -> Item:
    messages = tenant.chat(tenant.documents(1), "Fill in.")
    body = {"messages": messages, "max_tokens": 40, **rng.choice(SHAPES)}
    return Item(0, "", CHAT, body, finish=ENDED)


def other_options(rng: random.Random, tenant: Tenant) -> Item:
    body = {
        "messages": tenant.chat([story(rng, 20), *tenant.documents(2)], "Mind the options."),
        "max_tokens": 8,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "bad_words": ["the"],
        "priority": 0,
    }
    return Item(0, "", CHAT, body, finish=ENDED)


ENDPOINTS = {
    conversation: 8,
    completion: 3,
    list_of_prompts: 3,
    echo: 3,
    prompt_logprobs: 2,
    responses: 3,
    messages: 3,
    batch: 3,
    beam_search: 2,
    samples: 3,
    stream: 5,
    structured: 4,
    other_options: 2,
}
