# SPDX-License-Identifier: Apache-2.0
"""Requests by how they end: length, end of text, stop token, stop string, a client that leaves."""

from __future__ import annotations

import random

from kvcomm_vllm.evaluation.soak.item import CHAT, DECODE, PREFILL, TEXT, Item
from kvcomm_vllm.evaluation.soak.options import LIMIT
from kvcomm_vllm.evaluation.soak.texts import Tenant, story

EOS, FULL_STOP = 2, 30  # token ids of SmolLM2: end of text, "."
FORCED = 100  # a bias no other token comes up against


def by_length(rng: random.Random, tenant: Tenant) -> Item:
    messages = tenant.chat(tenant.documents(rng.randint(1, 3)), "What matters most?")
    body = {"messages": messages, "max_tokens": rng.randint(1, 12), "ignore_eos": True}
    return Item(0, "", CHAT, body, finish=("length",))


def by_long_length(rng: random.Random, tenant: Tenant) -> Item:
    """Decodes for long, so that pages run out while others decode."""
    messages = tenant.chat(tenant.documents(2), "Tell all of it.")
    body = {"messages": messages, "max_tokens": rng.randint(30, 90), "ignore_eos": True}
    return Item(0, "", CHAT, body, finish=("length",))


def by_length_in_a_crowd(rng: random.Random, tenant: Tenant) -> Item:
    """A short prompt that grows: many are admitted, and some must go again."""
    body = {
        "messages": [{"role": "user", "content": story(rng, 15)}],
        "max_tokens": rng.randint(60, 140),
        "ignore_eos": True,
    }
    return Item(0, "", CHAT, body, finish=("length",))


def by_end_of_text(rng: random.Random, tenant: Tenant) -> Item:
    body = {
        "messages": tenant.chat(tenant.documents(1), "Be brief."),
        "max_tokens": 20,
        "min_tokens": rng.randint(0, 4),
        "logit_bias": {str(EOS): FORCED},
    }
    return Item(0, "", CHAT, body, finish=("stop",))


def by_stop_token(rng: random.Random, tenant: Tenant) -> Item:
    body = {
        "messages": tenant.chat(tenant.documents(2), "Name one place."),
        "max_tokens": 20,
        "stop_token_ids": [FULL_STOP],
        "min_tokens": rng.randint(0, 4),
        "logit_bias": {str(FULL_STOP): FORCED},
    }
    return Item(0, "", CHAT, body, finish=("stop",))


def by_stop_string(rng: random.Random, tenant: Tenant) -> Item:
    body = {
        "messages": tenant.chat(tenant.documents(2), "Name one thing."),
        "max_tokens": 20,
        "stop": ["\nObservation:", "." * rng.randint(1, 4)],
        "logit_bias": {str(FULL_STOP): FORCED},
    }
    return Item(0, "", CHAT, body, finish=("stop",))


def near_the_limit(rng: random.Random, tenant: Tenant, limit: int = LIMIT) -> Item:
    """A prompt of token ids that leaves room for a few tokens only."""
    rest = rng.randint(1, 8)
    ids = [rng.randint(1000, 40000) for _ in range(limit - rest)]
    body = {"prompt": ids, "max_tokens": rest, "ignore_eos": True}
    return Item(0, "", TEXT, body, finish=("length",))


def leaves_in_prefill(rng: random.Random, tenant: Tenant) -> Item:
    messages = tenant.chat([*tenant.documents(2), story(rng, 250)], "Sum it up.")
    body = {"messages": messages, "max_tokens": 40}
    return Item(0, "", CHAT, body, leave=PREFILL, patience=rng.uniform(0, 1.5))


def leaves_in_decode(rng: random.Random, tenant: Tenant) -> Item:
    body = {
        "messages": tenant.chat(tenant.documents(2), "Go on and on."),
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    return Item(0, "", CHAT, body, leave=DECODE, patience=rng.randint(1, 12))


ENDINGS = {
    by_length: 8,
    by_long_length: 7,
    by_length_in_a_crowd: 10,
    by_end_of_text: 3,
    by_stop_token: 3,
    by_stop_string: 3,
    near_the_limit: 1,
    leaves_in_prefill: 4,
    leaves_in_decode: 4,
}
