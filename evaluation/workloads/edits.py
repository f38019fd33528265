# SPDX-License-Identifier: Apache-2.0
"""One agent whose prompt is edited near its head from turn to turn, while the rest stays.

That is what frameworks do with a long session: a line says what time it is, the tools on offer
change, the oldest turn is dropped (compaction), an old result gives way to a tombstone. A prefix
cache computes everything behind the edit again. Each task is a first prompt, then eight edits of
it, each with a new question; questions and their answers stay in the session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.exchanges import (
    Exchange,
    date,
    make_exchange,
    one_of,
    order_number,
    schema,
    words,
)
from kvcomm_vllm.evaluation.workloads.lengths import about_tokens
from kvcomm_vllm.evaluation.workloads.task import TOKENS, Range, Task, Workload

EDITS = 8
INPUT_TOKENS: Range = (2000, 16_000)
OPTIONS = {"input_tokens": INPUT_TOKENS, "output_tokens": TOKENS}
FIRST = "first prompt"
LEAST_EXCHANGES, MOST_EXCHANGES = 10, 20
NOTES = 4
# Of an exchange without the rows of its result, and what each of these adds to it.
EXCHANGE_TOKENS, ROW_TOKENS = 85, 36


@dataclass(frozen=True)
class Session:
    """What an agent is sent, by parts, in their order.

    Args:
        instructions: with ``{clock}`` in it.
        tools: schemas by line.
        asked: what has been asked in the session itself, with ``{n}`` for the answers.
    """

    instructions: str
    clock: datetime
    tools: tuple[str, ...]
    notes: tuple[str, ...]
    past: tuple[Exchange, ...]
    asked: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        told = self.instructions.replace("{clock}", f"{self.clock:%A, %Y-%m-%d %H:%M:%S} UTC")
        tools, notes = "\n".join(self.tools), "\n".join(f"- {one}" for one in self.notes)
        return f"{told}\n\nTools, one a line:\n{tools}\n\nNotes from earlier sessions:\n{notes}"

    @property
    def user(self) -> str:
        """A template: what was answered in the session is filled in."""
        *before, now = self.asked
        answered = "".join(
            f"User: {literal(text)}\nAssistant: {{{number}}}\n\n"
            for number, text in enumerate(before, 1)
        )
        past = literal("".join(exchange.text for exchange in self.past))
        return f"The session so far:\n\n{past}{answered}User: {literal(now)}"


Edit = Callable[[Session, Random], Session]


def move_clock(session: Session, rng: Random) -> Session:
    """Some minutes later."""
    return replace(session, clock=session.clock + timedelta(seconds=rng.randrange(100, 3000)))


def remove_tool(session: Session, rng: Random) -> Session:
    """A tool is not on offer any more."""
    gone = rng.randrange(len(session.tools))
    return replace(session, tools=session.tools[:gone] + session.tools[gone + 1 :])


def drop_oldest(session: Session, rng: Random) -> Session:
    """The oldest turn is gone."""
    return replace(session, past=session.past[1:])


def prune_result(session: Session, rng: Random) -> Session:
    """The oldest result that is still there has become a tombstone."""
    past = list(session.past)
    oldest = next(n for n, exchange in enumerate(past) if not exchange.removed)
    past[oldest] = past[oldest].pruned
    return replace(session, past=tuple(past))


@dataclass(frozen=True)
class Kind:
    """A kind of session.

    Args:
        edits: by name, in their order.
        tools: how many are on offer at first, at least and at most.
    """

    edits: tuple[tuple[str, Edit], ...]
    tools: tuple[int, int] = (8, 9)


_CLOCK, _TOOL = ("clock", move_clock), ("tool removed", remove_tool)
_OLDEST, _RESULT = ("oldest turn dropped", drop_oldest), ("result pruned", prune_result)
MIXED = Kind((_CLOCK, _TOOL, _OLDEST, _RESULT) * 2)
KINDS = {
    "clock": Kind((_CLOCK,) * EDITS),
    "compaction": Kind((_OLDEST,) * EDITS),
    "pruned": Kind((_RESULT,) * EDITS),
    "tools": Kind((_TOOL,) * EDITS, tools=(12, 12)),
}


def begin(rng: Random, tools: tuple[int, int], input_tokens: int) -> Session:
    """A session of about so many tokens in which nothing has been asked yet."""
    names = [tool["name"] for tool in words()["tools"]]
    offered = rng.sample(names, rng.randint(*tools))
    told = words()["instructions"].replace("{shop}", one_of("shops", rng))
    session = Session(
        instructions=told.replace("{boss}", one_of("names", rng)),
        clock=datetime(2025, 1, 6) + timedelta(seconds=rng.randrange(300 * 86_400)),
        tools=tuple(schema(name) for name in names if name in offered),
        notes=tuple(note(text, rng) for text in rng.sample(words()["notes"], NOTES)),
        past=(),
    )
    room = input_tokens - about_tokens(session.system)
    # a longer session has longer results, hardly more of them
    rows = max(1, round((room / MOST_EXCHANGES - EXCHANGE_TOKENS) / ROW_TOKENS))
    past: list[Exchange] = []
    while len(past) < LEAST_EXCHANGES or room > 0:
        past.append(make_exchange(len(past), rng, rows))
        room -= about_tokens(past[-1].text)
    return replace(session, past=tuple(past))


def ask(session: Session, rng: Random) -> Session:
    """One more question, about one of the turns that are still there."""
    about = rng.choice(session.past[len(session.past) // 2 :]).about
    question = rng.choice(words()["questions"]).replace("{about}", about)
    return replace(session, asked=(*session.asked, question))


def turns(kind: Kind, seed: str, input_tokens: int) -> tuple[Turn, ...]:
    """The first prompt, and one for each edit, of about so many tokens in the mean."""
    found = _turns(kind, Random(seed), input_tokens)
    # edits make prompts longer or shorter: begin with so much less or more
    mean = sum(about_tokens(turn.system + turn.user) for turn in found) / len(found)
    return _turns(kind, Random(seed), 2 * input_tokens - round(mean))


def _turns(kind: Kind, rng: Random, first_tokens: int) -> tuple[Turn, ...]:
    session = ask(begin(rng, kind.tools, first_tokens), rng)
    found = [Turn(session.system, session.user, FIRST)]
    seen: Counter[str] = Counter()
    for name, edit in kind.edits:
        seen[name] += 1
        session = ask(edit(session, rng), rng)
        found.append(Turn(session.system, session.user, f"{name} {seen[name]}"))
    return tuple(found)


def session_task(
    number: int,
    seed: int,
    name: str,
    kind: Kind,
    input_tokens: int = 2250,
    output_tokens: int = 8,
) -> Task:
    """One session.

    Args:
        input_tokens: of the prompts, about, in SmolLM2's vocabulary.
        output_tokens: of each answer.
    """
    called = f"{name}-{number}"
    case = Case(called, turns(kind, f"{seed} {called}", input_tokens), group=called)
    return Task(case, output_tokens, fixed=True)


def note(text: str, rng: Random) -> str:
    """A line of an agent's notes, of a packaged one."""
    values = {
        "name": one_of("names", rng),
        "other": one_of("names", rng),
        "town": one_of("towns", rng),
        "thing": one_of("things", rng),
        "date": date(rng),
        "order": order_number(rng),
        "code": f"{rng.choice('LMNPQRS')}{rng.randrange(10, 99)}",
    }
    return text.format_map(values)


def _workload(name: str, title: str) -> Workload:
    tasks = partial(session_task, name=name, kind=KINDS[name])
    return Workload(name, title, tasks, options=OPTIONS, source="made-up sessions")


_EDITED = "One agent, whose session is edited near its head eight times: "
WORKLOADS = tuple(
    _workload(name, _EDITED + what)
    for name, what in {
        "clock": "a line with the time changes",
        "compaction": "the oldest turn is dropped",
        "pruned": "the oldest result becomes a tombstone",
        "tools": "a tool is removed",
    }.items()
)
