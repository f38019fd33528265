# SPDX-License-Identifier: Apache-2.0
"""Whether what was to be exact is: the same request again, alone, under a salt of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcomm_vllm.evaluation.cases.client import dense
from kvcomm_vllm.evaluation.soak.clients import send
from kvcomm_vllm.evaluation.soak.item import Outcome
from kvcomm_vllm.evaluation.soak.promises import Fault, Promise

TOLERANCE = 1e-3  # nats: what float32 leaves of one text computed in other pieces


def compare(base_url: str, model: str, outcomes: Sequence[Outcome], most: int) -> list[Fault]:
    """Send the last ``most`` exact requests again and compare tokens and log-probabilities."""
    found = []
    whole = [one for one in outcomes if one.item.exact and _whole(one)]
    for one in whole[-most:]:
        assert isinstance(one.item.body, dict)
        salt = f"dense {one.item.number}"
        again = replace(one.item, body=dense(one.item.body, salt), salt=salt)
        said = difference(one.answer, send(base_url, model, again).answer)
        if said:
            found.append(Fault(Promise.EXACT, one.item.kind, one.item.number, said))
    return found


def _whole(one: Outcome) -> bool:
    return one.status == 200 and one.choices[0].get("finish_reason") in ("stop", "length")


def difference(given: dict[str, Any], alone: dict[str, Any]) -> str:
    """What differs between two answers, as a sentence; empty where nothing does.

    Where two candidates are as likely as each other within the tolerance either may be chosen;
    what follows is not compared then.
    """
    if not alone:
        return "the dense request was not answered"
    ours, theirs = _steps(given), _steps(alone)
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one["token"] != other["token"]:
            gap = abs(float(other["logprob"]) - _of(other, one["token"]))
            if gap <= 2 * TOLERANCE:
                return ""
            return f"token {place}: {one['token']!r}, dense {other['token']!r}, {gap:.4f} apart"
        if place == 0 and abs(one["logprob"] - other["logprob"]) > TOLERANCE:
            return f"first token's log-probability {one['logprob']}, dense {other['logprob']}"
    ids, dense_ids = (answer["choices"][0]["token_ids"] for answer in (given, alone))
    return "" if ids == dense_ids else f"tokens {ids}, dense {dense_ids}"


def _steps(answer: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
    return steps


def _of(step: dict[str, Any], token: str) -> float:
    """The log-probability of another candidate of a step; far off where it is none."""
    for one in step["top_logprobs"]:
        if one["token"] == token:
            return float(one["logprob"])
    return float("-inf")
