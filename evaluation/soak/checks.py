# SPDX-License-Identifier: Apache-2.0
"""What must hold of the answers of a storm, whatever was done to the server meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from kvcomm_vllm.evaluation.soak.events import Event
from kvcomm_vllm.evaluation.soak.item import BATCH, MESSAGES, RESPONSES, Outcome
from kvcomm_vllm.evaluation.soak.promises import Fault, Promise


def faults_of(outcomes: Sequence[Outcome], events: Sequence[Event]) -> list[Fault]:
    """The faults of a storm's answers and events, by promise."""
    aborts = [event for event in events if event.aborts]
    unhurt = [one for one in outcomes if not any(_during(one, event) for event in aborts)]
    found = [*unanswered(outcomes, unhurt), *wrong_ends(unhurt)]
    for check in (without_report, sums, crossed, not_exact):
        found += check([one for one in unhurt if one.status == 200])
    found += [
        Fault(Promise.OPERATED, event.path, 0, f"{event.status} {event.text}")
        for event in events
        if event.status != 200
    ]
    return found


def _during(outcome: Outcome, event: Event) -> bool:
    return outcome.began <= event.ended and event.began <= outcome.ended


def _each(
    promise: Promise, outcomes: Iterable[Outcome], problem: Callable[[Outcome], str]
) -> Iterator[Fault]:
    for one in outcomes:
        if said := problem(one):
            yield Fault(promise, one.item.kind, one.item.number, said)


def unanswered(outcomes: Sequence[Outcome], unhurt: Sequence[Outcome]) -> list[Fault]:
    """Requests without an answer, and answers with another status than the script says."""

    def lost(one: Outcome) -> str:
        return f"after {one.ended - one.began:.0f} s: {one.error}" if one.status == 0 else ""

    def other(one: Outcome) -> str:
        if one.status in (0, -1) or one.status == one.item.status:
            return ""
        return f"{one.status} instead of {one.item.status}: {one.error[:300]}"

    return [
        *_each(Promise.ANSWERED, outcomes, lost),
        *_each(Promise.STATUS, unhurt, other),
    ]


def wrong_ends(unhurt: Sequence[Outcome]) -> list[Fault]:
    def problem(one: Outcome) -> str:
        if one.status != 200 or not one.item.finish:
            return ""
        said = [choice.get("finish_reason") for choice in one.choices]
        good = bool(said) and set(said) <= set(one.item.finish)
        return "" if good else f"finish reasons {said}, allowed {one.item.finish}"

    return list(_each(Promise.ENDED, unhurt, problem))


def reports(one: Outcome) -> bool:
    """Whether this answer has a report beside its choices: beams have none, streamed responses and
    messages have it elsewhere, and so have batches.
    """
    assert isinstance(one.item.body, dict)
    nested = one.item.body.get("stream") and one.item.path in (MESSAGES, RESPONSES)
    return not nested and one.item.engine_requests is not None and one.item.path != BATCH


def without_report(answered: Sequence[Outcome]) -> list[Fault]:
    def problem(one: Outcome) -> str:
        return "no report" if reports(one) and not one.report else ""

    return list(_each(Promise.REPORTED, answered, problem))


def sums(answered: Sequence[Outcome]) -> list[Fault]:
    def problem(one: Outcome) -> str:
        if not (told := one.report):
            return ""
        parts = [told["local"], told["reused"], told["computed"]]
        if sum(parts) != told["prompt_tokens"]:
            return f"{parts} do not add up to {told['prompt_tokens']}"
        usage = one.answer.get("usage") or {}
        tokens = usage.get("input_tokens" if one.item.path == RESPONSES else "prompt_tokens")
        if one.item.engine_requests == 1 and tokens not in (None, told["prompt_tokens"]):
            return f"{told['prompt_tokens']} prompt tokens, usage says {tokens}"
        return ""

    return list(_each(Promise.ADDED_UP, answered, problem))


def crossed(answered: Sequence[Outcome]) -> list[Fault]:
    def problem(one: Outcome) -> str:
        kept = one.report.get("local", 0) + one.report.get("reused", 0)
        if one.item.foreign and (kept or one.cached_tokens):
            return f"{kept} tokens reported, {one.cached_tokens} cached"
        return ""

    return list(_each(Promise.APART, answered, problem))


def not_exact(answered: Sequence[Outcome]) -> list[Fault]:
    """Requests that ask for it, and yet reused; their tokens are compared later."""

    def problem(one: Outcome) -> str:
        reused = one.report.get("reused", 0)
        return f"{reused} tokens reused" if one.item.exact and reused else ""

    return list(_each(Promise.NOT_REUSED, answered, problem))
