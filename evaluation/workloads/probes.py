# SPDX-License-Identifier: Apache-2.0
"""Questions whose right answer an edit near the prompt's head has changed.

KV behind an edit was computed with the old text in view, so an answer may still follow it: the old
time, a number that a note no longer has, a tool that is gone. Each case is a prompt of an agent,
answered in the old context, and the same one with one line edited, in which the session has gone on
to a question; the old value stands in the first prompt alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, partial
from random import Random
from typing import Any

import yaml

from kvcomm_vllm.evaluation.workloads.case import Case, Probe, Turn, literal
from kvcomm_vllm.evaluation.workloads.edits import note
from kvcomm_vllm.evaluation.workloads.exchanges import (
    Exchange,
    as_schema,
    make_exchange,
    one_of,
    schema,
    words,
)
from kvcomm_vllm.evaluation.workloads.rows import DATA
from kvcomm_vllm.evaluation.workloads.task import Task, Workload

BEFORE, AFTER = "before the edit", "after it"
EXCHANGES = 2
MEMORY = 3  # lines beside the one that is edited
Pair = tuple[str, str]  # before the edit, behind it


@dataclass(frozen=True)
class Change:
    """What is edited, and what is asked about it.

    Args:
        asked: a question, and the beginning of its answer.
        values: how the answer goes on, before and after the edit.
        clock, line, tool: before and after it; an empty text where there is none.
        note, said: what rests on it: a note behind the tools, something said in the session.
    """

    form: str
    asked: Pair
    values: Pair
    note: str
    said: str
    clock: tuple[datetime, datetime]
    line: Pair = ("", "")
    tools: Pair = ("", "")


@cache
def probe_words() -> dict[str, Any]:
    """The packaged texts of probes, by kind."""
    found: dict[str, Any] = yaml.safe_load((DATA / "probes.yaml").read_text(encoding="utf-8"))
    return found


def _moment(rng: Random) -> datetime:
    return datetime(2025, 1, 6) + timedelta(seconds=rng.randrange(300 * 86_400))


def _clock(rng: Random) -> Change:
    """Some days, hours or minutes later."""
    texts = probe_words()["clock"]
    form = rng.choice(list(texts["ask"]))
    before = _moment(rng)
    days = rng.randrange(1, 7) if form != "time" else 0
    after = before + timedelta(days=days, minutes=rng.randrange(7, 600))
    shown = {"weekday": " {:%A}", "time": "{:%H:%M}", "date": "{:%Y-%m-%d}"}[form]
    values = (shown.format(before), shown.format(after))
    asked = texts["ask"][form]
    return Change(form, asked, values, texts["note"], texts["said"], (before, after))


def _number(rng: Random) -> str:
    return str(rng.choice((rng.randrange(20, 100), rng.randrange(100, 999))))


def _file(rng: Random) -> str:
    return "".join(rng.choice(probe_words()[part]) for part in ("stems", "endings"))


def _of_kind(kind: str, rng: Random) -> str:
    known = probe_words() if kind in probe_words() else words()
    return str(rng.choice(known[kind]))


def _line(rows: str, value: Callable[[Random, dict[str, Any]], str], rng: Random) -> Change:
    """A line of the memory, whose value changes."""
    row = rng.choice(probe_words()[rows])
    others = {kind: one_of(f"{kind}s", rng) for kind in ("name", "town", "thing")}
    old = value(rng, row)
    new = old
    while new[:1] == old[:1] or new in others.values() or old in others.values():
        old, new = value(rng, row), value(rng, row)
    form = rng.choice(("direct", "via"))
    question, lead = (text.format(**others) for text in row[form])
    # digits have tokens of their own, as what is quoted; other values begin with a blank
    blank = "" if lead.endswith((" ", "`")) else " "
    clock = _moment(rng)
    return Change(
        form,
        (question, lead),
        (blank + old, blank + new),
        row["note"].format(**others),
        row["said"],
        (clock, clock),
        line=tuple(row["line"].format(value=one, **others) for one in (old, new)),
    )


def _tool(rng: Random) -> Change:
    """One of two tools for a purpose is gone."""
    row = rng.choice(probe_words()["tools"])
    form = rng.choice(("direct", "via"))
    purpose = row["purpose"] if form == "direct" else row["via"]
    asked = (probe_words()["tool_asked"].format(purpose=purpose), probe_words()["tool_lead"])
    clock = _moment(rng)
    gone, left = (as_schema(row[which]) for which in ("gone", "left"))
    return Change(
        form,
        asked,
        (row["gone"]["name"], row["left"]["name"]),
        row["note"],
        rng.choice(words()["remarks"]),
        (clock, clock),
        tools=(f"{gone}\n{left}", left),
    )


CHANGES: dict[str, Callable[[Random], Change]] = {
    "clock": _clock,
    "memory": partial(_line, "numbers", lambda rng, row: _number(rng)),
    "tool": _tool,
    "file": partial(_line, "files", lambda rng, row: _file(rng)),
    "fact": partial(_line, "facts", lambda rng, row: _of_kind(row["values"], rng)),
}


@dataclass(frozen=True)
class Setting:
    """What stands around a change, the same before and after it."""

    shop: str
    memory: tuple[str, ...]
    notes: tuple[str, ...]
    tools: tuple[str, ...]
    past: tuple[Exchange, ...]
    acknowledged: str
    pending: Pair  # a question in the old context, and its answer

    def system(self, change: Change, new: bool) -> str:
        """The instructions, before the edit or after it."""
        told = probe_words()["instructions"].replace("{shop}", self.shop)
        told = told.replace("{clock}", f"{change.clock[new]:%H:%M on %A, %Y-%m-%d}")
        memory = _lines([change.line[new], *self.memory])
        tools = "\n".join(filter(None, (*self.tools, change.tools[new])))
        return f"{told}\n\nMemory:\n{memory}\n\nTools, one a line:\n{tools}"

    def session(self, change: Change) -> str:
        """All that lies behind the edit, up to the question in the old context."""
        first, *others = (exchange.text for exchange in self.past)
        said = f"User: {change.said}\nAssistant: {self.acknowledged}\n\n"
        notes = _lines([self.notes[0], change.note, *self.notes[1:]])
        told = "".join((first, said, *others))
        return literal(f"Notes:\n{notes}\n\nThe session so far:\n\n{told}User: {self.pending[0]}")


def _lines(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts if text)


def _setting(rng: Random) -> Setting:
    start, notes = rng.randrange(8), [note(text, rng) for text in rng.sample(words()["notes"], 5)]
    past = tuple(make_exchange(start + number, rng, 1) for number in range(EXCHANGES))
    used = {exchange.call.partition("(")[0] for exchange in past}
    question = rng.choice(words()["questions"]).replace("{about}", past[-1].about)
    return Setting(
        one_of("shops", rng),
        tuple(notes[:MEMORY]),
        tuple(notes[MEMORY:]),
        tuple(schema(tool["name"]) for tool in words()["tools"] if tool["name"] in used),
        past,
        rng.choice(probe_words()["acknowledged"]),
        (question, one_of("remarks", rng)),
    )


def _turns(setting: Setting, change: Change) -> tuple[Turn, Turn]:
    before = setting.session(change)
    after = f"{before}\nAssistant: {{1}}\n\nUser: {literal(change.asked[0])}"
    return (
        Turn(setting.system(change, new=False), before, BEFORE, reply=setting.pending[1]),
        Turn(setting.system(change, new=True), after, AFTER),
    )


def names(text: str, value: str) -> bool:
    """Whether a text has a value as a word or words of its own."""
    return re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", text) is not None


def draw(number: int, seed: int, kind: str) -> tuple[Change, tuple[Turn, Turn]]:
    """A change whose old value is in the first prompt alone, and whose new one in the second."""
    rng = Random(f"{seed} {kind}-{number}")
    while True:
        change = CHANGES[kind](rng)
        turns = _turns(_setting(rng), change)
        old, new = change.values
        before, after = (turn.system + turn.user for turn in turns)
        # of two tools both are on offer before the edit
        if not names(after, old) and (kind == "tool" or not names(before, new)):
            return change, turns


def probe_case(number: int, seed: int, kind: str) -> Case:
    """The number-th probe of a kind."""
    name = f"{kind}-{number}"
    change, turns = draw(number, seed, kind)
    stale, right = change.values
    probe = Probe(change.asked[1], right, stale, change.form)
    return Case(name, turns, group=name, probe=probe)


def _task(number: int, seed: int, kind: str) -> Task:
    return Task(probe_case(number, seed, kind), 1, fixed=True)


TITLES = {
    "clock": "the time has gone on",
    "memory": "a number in a line of the memory has changed",
    "tool": "a tool is gone",
    "file": "a file has another name",
    "fact": "a line of the memory has been corrected",
}
WORKLOADS = tuple(
    Workload(
        f"stale-{kind}",
        f"A question whose right answer an edit has changed: {title}",
        partial(_task, kind=kind),
        options={},
        source="made-up prompts",
    )
    for kind, title in TITLES.items()
)
