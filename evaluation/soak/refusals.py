# SPDX-License-Identifier: Apache-2.0
"""Requests that must be refused, each with its status."""

from __future__ import annotations

import random
from typing import Any

from kvcomm_vllm.evaluation.soak.item import BATCH, CHAT, FIELD, MESSAGES, RESPONSES, TEXT, Item
from kvcomm_vllm.evaluation.soak.texts import Tenant, story

BAD_HINTS: tuple[object, ...] = (
    "off",
    3,
    [],
    {"mode": "OFF"},
    {"mode": 1},
    {"mood": "off"},
    {"agent": ""},
    {"seam_tokens": -1},
    {"seam_tokens": 1.5},
    {"spans": [[5, 2]]},
    {"spans": [[0, 9], [3, 12]]},
    {"spans": "0-9"},
    {"learn": "yes"},
    {"explain": 1},
)
BAD_BODIES: tuple[tuple[str, dict[str, Any], int], ...] = (
    (CHAT, {"max_tokens": -1}, 400),
    (CHAT, {"temperature": -1}, 400),
    (CHAT, {"n": 0}, 400),
    (CHAT, {"model": "another"}, 404),
    (CHAT, {"structured_outputs": {"regex": "("}}, 400),
    (CHAT, {"cache_salt": ""}, 400),
    (CHAT, {"top_logprobs": 1000, "logprobs": True}, 400),
)


def bad_hints(rng: random.Random, tenant: Tenant) -> Item:
    asked = {"kv_transfer_params": {FIELD: rng.choice(BAD_HINTS)}}
    user = [{"role": "user", "content": story(rng, 10)}]
    path, body = rng.choice(
        (
            (CHAT, {"messages": user, "max_tokens": 2}),
            (TEXT, {"prompt": story(rng, 10), "max_tokens": 2}),
            (RESPONSES, {"input": story(rng, 10), "store": False, "max_output_tokens": 2}),
            (MESSAGES, {"messages": user, "max_tokens": 2}),
        )
    )
    return Item(0, "", path, {**body, **asked}, status=400, engine_requests=0)


def bad_body(rng: random.Random, tenant: Tenant) -> Item:
    path, wrong, status = rng.choice(BAD_BODIES)
    body = {"messages": tenant.chat(tenant.documents(1), "No."), "max_tokens": 2, **wrong}
    return Item(0, "", path, body, status=status, engine_requests=0)


def too_long(rng: random.Random, tenant: Tenant) -> Item:
    body = {"prompt": [rng.randint(1000, 40000) for _ in range(4000)], "max_tokens": 2}
    return Item(0, "", TEXT, body, status=400, engine_requests=0)


def not_json(rng: random.Random, tenant: Tenant) -> Item:
    sent = rng.choice((b"{", b'{"kv_transfer_params": {"kvcomm": ', b"[1]", b'"kvcomm"'))
    return Item(0, "", rng.choice((CHAT, BATCH)), sent, status=400, engine_requests=0)


REFUSALS = {bad_hints: 4, bad_body: 3, too_long: 1, not_json: 1}
