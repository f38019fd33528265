# SPDX-License-Identifier: Apache-2.0
"""Requests by their hints, those that must be served exactly among them."""

from __future__ import annotations

import random
from typing import Any

from kvcomm_vllm.evaluation.cases.case import Body
from kvcomm_vllm.evaluation.soak.item import CHAT, FIELD, TEXT, Item
from kvcomm_vllm.evaluation.soak.texts import Tenant

ENDED = ("stop", "length")
COMPARED: Body = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
OTHERS: tuple[object, ...] = (None, {}, {"do_remote_prefill": False, "remote_engine_id": None})


def hinted(hints: object, tenant: Tenant, documents: int = 2, **body: Any) -> Item:
    messages = tenant.chat(tenant.documents(documents), "Follow the hint.")
    given = {"kv_transfer_params": {FIELD: hints}}
    return Item(0, "", CHAT, {"messages": messages, **body, **given}, finish=ENDED)


def mode(rng: random.Random, tenant: Tenant) -> Item:
    name = rng.choice(("rotate", "seam", "anchor"))
    return hinted({"mode": name, "agent": "ann"}, tenant, max_tokens=4)


def off(rng: random.Random, tenant: Tenant) -> Item:
    item = hinted({"mode": "off"}, tenant, max_tokens=rng.randint(1, 12), **COMPARED)
    return Item(0, "", item.path, item.body, finish=ENDED, exact=True)


def learn(rng: random.Random, tenant: Tenant) -> Item:
    item = hinted({"learn": True}, tenant, max_tokens=rng.randint(1, 8), **COMPARED)
    return Item(0, "", item.path, item.body, finish=ENDED, exact=True)


def seams(rng: random.Random, tenant: Tenant) -> Item:
    return hinted({"seam_tokens": rng.choice((0, 1, 33, 4096))}, tenant, max_tokens=3)


def spans(rng: random.Random, tenant: Tenant) -> Item:
    bounds = sorted(rng.sample(range(5000), 4))
    pairs = [bounds[:2], bounds[2:]]
    return hinted({"spans": rng.choice((pairs, [], [[0, 1]]))}, tenant, max_tokens=3)


def explain(rng: random.Random, tenant: Tenant) -> Item:
    return hinted({"explain": rng.random() < 0.9}, tenant, max_tokens=2)


def no_hints(rng: random.Random, tenant: Tenant) -> Item:
    """Nothing is said in each of the ways in which that is done."""
    if rng.random() < 0.5:
        empty = {"mode": None, "agent": None, "spans": None, "learn": None}
        return hinted(rng.choice((None, {}, empty)), tenant, max_tokens=2)
    messages = tenant.chat(tenant.documents(2), "No hints.")
    body = {"messages": messages, "max_tokens": 2, "kv_transfer_params": rng.choice(OTHERS)}
    return Item(0, "", CHAT, body, finish=ENDED)


def letter(rng: random.Random, tenant: Tenant) -> Item:
    """A text nobody has sent."""
    body = {"prompt": tenant.letter(), "max_tokens": 1}
    return Item(0, "", TEXT, body, finish=ENDED, foreign=True)


def letter_of_another(rng: random.Random, tenant: Tenant) -> Item:
    """A text another tenant has sent, but this one has not."""
    body = {"prompt": tenant.letter_of_another(), "max_tokens": 1}
    return Item(0, "", TEXT, body, finish=ENDED, foreign=True)


HINTED = {
    mode: 5,
    off: 5,
    learn: 2,
    seams: 2,
    spans: 2,
    explain: 2,
    no_hints: 3,
    letter: 2,
    letter_of_another: 3,
}
