# SPDX-License-Identifier: Apache-2.0
"""Sessions of one agent whose prompt is edited turn after turn: each yields its prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

Messages = list[dict[str, str]]
Pair = tuple[str, str]

WINDOW = 8  # turns in a prompt
OPERATOR = (
    "You are an operations agent. You call tools, read their results and report shortly what they "
    "say. Never invent numbers."
)
WRITER = (
    "You are the writer of a small harbour's logbook. You turn what you are told into short plain "
    "sentences for readers who were not there."
)
WHO = ("a survey crew", "two apprentices", "the night shift", "the harbour office", "an auditor")
DID = ("repaired", "inspected", "moved", "painted", "counted", "tested")
WHAT = ("the tide gauges", "the signal lamps", "the grain barges", "the ice saws", "the ferries")
WHERE = ("at Ardmoor", "at Belhaven", "at Dunsley", "at Elmworth", "at Kestrel Bay")
WHY = (
    "because the old fittings had corroded",
    "after a complaint from the pilots",
    "while the river was too low for loaded boats",
    "so that winter deliveries would not be held up",
)
END = (
    "Nobody was hurt, but {} hours were lost.",
    "Costs came to {} crowns, a little less than planned.",
    "Of {} measurements, some were outside the permitted range.",
)
TOOLS = ("search_orders", "read_file", "list_tickets", "query_db")


def log_entry(number: int, draw: Random) -> Pair:
    """Prose from few phrases, as reports are."""
    told = []
    for _ in range(2):
        told.append(" ".join(draw.choice(part) for part in (WHO, DID, WHAT, WHERE, WHY)))
        told.append(draw.choice(END).format(draw.randrange(10, 900)))
    text = f"{told[0][0].upper()}{told[0][1:]}. {told[1]} Then {told[2]}. {told[3]}"
    return f"Entry {number}. {text}", f"Entry {number} is filed."


def tool_result(number: int, draw: Random) -> Pair:
    """A call, its result as JSON, and what the agent says of it."""
    rows = [
        {
            "id": draw.randrange(1000, 9999),
            "status": draw.choice(["open", "closed", "late"]),
            "total": round(draw.random() * 500, 2),
            "city": draw.choice(["Oslo", "Lyon", "Porto", "Gdansk"]),
        }
        for _ in range(4)
    ]
    name = draw.choice(TOOLS)
    asked = f"Step {number}: call {name} and look at the result.\nResult of {name}: "
    first = rows[0]
    said = f"{name} returned 4 rows; the first is {first['id']}, which is {first['status']}."
    return asked + json.dumps(rows), said


def _chat(system: str, turns: list[Pair], question: str) -> Messages:
    messages = [{"role": "system", "content": system}]
    for asked, said in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": said})
    return [*messages, {"role": "user", "content": question}]


def _turns(make: Callable[[int, Random], Pair], count: int) -> list[Pair]:
    draw = Random(7)
    return [make(number, draw) for number in range(count)]


def trimmed(
    make: Callable[[int, Random], Pair], system: str, ask: str, steps: int
) -> Iterator[Messages]:
    """The oldest turn is dropped at each step; every other question looks back."""
    turns = _turns(make, WINDOW + steps + 1)
    for step in range(steps + 1):
        question = turns[step + WINDOW][0] if step % 2 else ask
        yield _chat(system, turns[step : step + WINDOW], question)


def clock(
    make: Callable[[int, Random], Pair], system: str, ask: str, steps: int
) -> Iterator[Messages]:
    """The system text says the time; the history grows."""
    turns = _turns(make, WINDOW + steps + 1)
    for step in range(steps + 1):
        now = f"{system} It is {10 + step // 6}:{(31 + 7 * step) % 60:02d}."
        question = turns[step + WINDOW // 2][0] if step % 2 else ask
        yield _chat(now, turns[: step + WINDOW // 2], question)


def pruned(
    make: Callable[[int, Random], Pair], system: str, ask: str, steps: int
) -> Iterator[Messages]:
    """The oldest result that is still there gives way to a line that says so."""
    turns = _turns(make, WINDOW + steps)
    for step in range(steps + 1):
        gone = [(f"{asked[:24]} [removed]", said) for asked, said in turns[:step]]
        yield _chat(system, [*gone, *turns[step : step + WINDOW]], ask)


_RESULTS = (tool_result, OPERATOR, "Which orders are late? Name their ids.")
_PROSE = (log_entry, WRITER, "Sum up the entries above in one sentence.")
SESSIONS: dict[str, Callable[[int], Iterator[Messages]]] = {
    "results, oldest dropped": partial(trimmed, *_RESULTS),
    "prose, oldest dropped": partial(trimmed, *_PROSE),
    "results, clock": partial(clock, *_RESULTS),
    "results, pruned": partial(pruned, *_RESULTS),
    "prose, pruned": partial(pruned, *_PROSE),
}
