# SPDX-License-Identifier: Apache-2.0
"""What an agent with tools has behind it: a request, a call, its result, and a remark on it.

All of it is made up, of the words in ``data/session.yaml``, and no two exchanges are equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import yaml

from kvcomm_vllm.evaluation.workloads.rows import DATA

MONTHS, DAYS = range(1, 13), range(1, 29)
Made = tuple[str, str, dict[str, Any], str]  # about, tool, arguments, result


@cache
def words() -> dict[str, Any]:
    """The packaged words, by kind."""
    found: dict[str, Any] = yaml.safe_load((DATA / "session.yaml").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Exchange:
    """One turn of the agent's past.

    Args:
        about: what it is about, in a few words.
        removed: the result has given way to a tombstone.
    """

    about: str
    request: str
    call: str
    result: str
    remark: str
    removed: bool = False

    @property
    def text(self) -> str:
        return (
            f"User: {self.request}\nAssistant: {self.call}\nTool: {self.result}\n"
            f"Assistant: {self.remark}\n\n"
        )

    @property
    def pruned(self) -> Exchange:
        """The same with a tombstone where its result was."""
        tool = self.call.partition("(")[0]
        gone = f"[{len(self.result)} characters of {tool} removed]"
        return replace(self, result=gone, removed=True)


def schema(name: str) -> str:
    """A tool of the packaged ones as it is offered to a model: a line of JSON."""
    (tool,) = (tool for tool in words()["tools"] if tool["name"] == name)
    return as_schema(tool)


def as_schema(tool: Mapping[str, Any]) -> str:
    """The same for any tool with a name, a description and types of parameters."""
    properties = {key: _typed(kind) for key, kind in tool["parameters"].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    shown = {"name": tool["name"], "description": tool["description"], "parameters": parameters}
    return json.dumps({"type": "function", "function": shown})


def _typed(kind: str) -> dict[str, Any]:
    name, *choices = kind.split()
    if choices:
        return {"type": "string", "enum": choices}
    return {"type": "string", "format": "date"} if name == "date" else {"type": name}


def one_of(kind: str, rng: Random) -> str:
    return str(rng.choice(words()[kind]))


def date(rng: Random) -> str:
    return f"2025-{rng.choice(MONTHS):02}-{rng.choice(DAYS):02}"


def order_number(rng: Random) -> str:
    return f"{rng.choice('ABCDEFGHJK')}-{rng.randrange(10_000, 99_999)}"


def clock_time(rng: Random) -> str:
    return f"{rng.randrange(7, 19):02}:{rng.randrange(60):02}"


def _money(rng: Random) -> float:
    return round(rng.uniform(4, 240), 2)


def _order(rng: Random, rows: int) -> Made:
    number = order_number(rng)
    lines = [
        {"article": one_of("things", rng), "count": rng.randrange(1, 6), "price": _money(rng)}
        for _ in range(rows)
    ]
    found = {"customer": one_of("names", rng), "town": one_of("towns", rng), "lines": lines}
    found["state"] = rng.choice(("packed", "paid", "sent", "on hold"))
    return f"order {number}", "get_order", {"order": number}, json.dumps(found)


def _orders(rng: Random, rows: int) -> Made:
    name, since = one_of("names", rng), date(rng)
    found = [
        {"order": order_number(rng), "on": date(rng), "total": _money(rng)} for _ in range(rows + 1)
    ]
    arguments = {"customer": name, "since": since}
    return f"the orders of {name}", "list_orders", arguments, json.dumps(found)


def _parcel(rng: Random, rows: int) -> Made:
    number = str(rng.randrange(10**7, 10**8))
    found = [
        {"at": clock_time(rng), "town": one_of("towns", rng), "step": one_of("steps", rng)}
        for _ in range(rows + 1)
    ]
    expected = {"events": found, "expected": date(rng)}
    return f"parcel {number}", "track_parcel", {"parcel": number}, json.dumps(expected)


def _stock(rng: Random, rows: int) -> Made:
    article = f"{one_of('things', rng)} {rng.randrange(100, 999)}"
    towns = [one_of("towns", rng) for _ in range(rows + 1)]
    lines = [f"{town} | {rng.randrange(90)} | {rng.randrange(20)}" for town in towns]
    table = "\n".join(["warehouse | in stock | reserved", *lines])
    return f"the {article}", "query_stock", {"article": article}, table


def _log(rng: Random, rows: int) -> Made:
    service, word = one_of("services", rng), f"req-{rng.randrange(1000, 9999)}"
    lines = [
        f"{date(rng)} {clock_time(rng)} {one_of('services', rng)} {one_of('events', rng)} "
        f"{rng.randrange(20, 4000)} ms"
        for _ in range(rows + 1)
    ]
    arguments = {"service": service, "contains": word}
    return f"{word} of {service}", "read_log", arguments, "\n".join(lines)


def _ticket(rng: Random, rows: int) -> Made:
    number = rng.randrange(1000, 9999)
    messages = [
        f"{one_of('names', rng)} wrote on {date(rng)}: The {one_of('things', rng)} "
        f"{one_of('complaints', rng)}. We would like {one_of('wishes', rng)}."
        for _ in range(rows)
    ]
    return f"ticket {number}", "get_ticket", {"ticket": number}, "\n".join(messages)


def _report(rng: Random, rows: int) -> Made:
    name, start = f"returns {rng.randrange(10, 99)}", date(rng)
    lines = [f"{one_of('things', rng)},{rng.randrange(40)},{_money(rng)}" for _ in range(rows + 1)]
    table = "\n".join(["article,returned,euros", *lines])
    return f"report {name}", "run_report", {"report": name, "start": start}, table


def _calendar(rng: Random, rows: int) -> Made:
    name, day = one_of("names", rng), date(rng)
    lines = [
        f"{clock_time(rng)} {one_of('names', rng)}, room {rng.randrange(10, 60)}: "
        f"{one_of('things', rng)} for {one_of('towns', rng)}"
        for _ in range(rows + 1)
    ]
    arguments = {"person": name, "day": day}
    return f"the day of {name}", "read_calendar", arguments, "\n".join(lines)


_MAKERS: tuple[Callable[[Random, int], Made], ...] = (
    _order,
    _orders,
    _parcel,
    _stock,
    _log,
    _ticket,
    _report,
    _calendar,
)
_ASKED = (
    "What do we know about {}?",
    "Please look at {}.",
    "{} again, what is it this time?",
    "Can you check {} for me?",
    "Somebody called about {}.",
)


def make_exchange(number: int, rng: Random, rows: int) -> Exchange:
    """The ``number``-th of a session; results have so many ``rows`` and up to twice as many."""
    make = _MAKERS[number % len(_MAKERS)]
    about, tool, arguments, result = make(rng, rng.randrange(rows, 2 * rows))
    request = rng.choice(_ASKED).format(about)
    call = f"{tool}({json.dumps(arguments)})"
    return Exchange(about, request[0].upper() + request[1:], call, result, one_of("remarks", rng))
