# SPDX-License-Identifier: Apache-2.0
"""A case: agents that speak in turn and quote each other; the last one's answer is the case's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

Message = dict[str, str]
Role = tuple[str, str, str]  # name, instructions, what to do
_QUOTE = re.compile(r"\{\{(\d+)\}\}|\{(\d+)\}")


class Answer(Enum):
    """How two answers to a case are compared, beside their tokens."""

    TEXT = "text"
    NUMBER = "number"
    CHOICE = "choice"


@dataclass(frozen=True)
class Turn:
    """One agent's instructions and prompt; ``{1}`` stands for the first agent's answer.

    Args:
        agent: name; the same agent begins every prompt with the same instructions.
        reply: text that the agent is taken to have answered already.
        primers: turns that the server has seen before this one; nobody waits for their answers.
    """

    system: str
    user: str
    agent: str = ""
    reply: str = ""
    primers: tuple[Turn, ...] = ()

    def messages(self, said: Sequence[str] = ()) -> list[Message]:
        """The chat that is sent, with earlier answers in their places."""
        parts = (("system", self.system), ("user", fill(self.user, said)))
        chat = [*parts, ("assistant", self.reply)]
        return [{"role": role, "content": text} for role, text in chat if text]


@dataclass(frozen=True)
class Probe:
    """What the last answer of a case says if it follows an edit, and if it does not.

    Args:
        lead: its beginning, which is given to the model.
        right, stale: how it goes on by the edited prompt, and by the one before the edit.
        form: of the question, by name.
    """

    lead: str
    right: str
    stale: str
    form: str


@dataclass(frozen=True)
class Case:
    """Turns in the order of speaking.

    Args:
        group: name of the question; cases of one group must not be on both sides of a comparison.
        candidates: for a choice, the agent (from 1) behind each letter.
    """

    id: str
    turns: tuple[Turn, ...]
    group: str
    answer: Answer = Answer.TEXT
    candidates: tuple[int, ...] = ()
    probe: Probe | None = None


def literal(text: str) -> str:
    """``text`` as part of a template, braces around numbers kept as they are."""
    return re.sub(r"\{(\d+)\}", r"{{\1}}", text)


def fill(template: str, messages: Sequence[str]) -> str:
    """The template with each ``{n}`` replaced by the n-th message, once: what a message contains
    is text. ``{{n}}`` gives ``{n}``.

    Raises:
        IndexError: there is no n-th message; see :func:`unspoken`.
    """

    def quoted(found: re.Match[str]) -> str:
        kept, number = found.groups()
        if kept is not None:
            return "{" + str(kept) + "}"
        if not 1 <= int(number) <= len(messages):
            raise IndexError(f"{{{number}}} stands for no earlier answer")
        return messages[int(number) - 1]

    return _QUOTE.sub(quoted, template)


def unspoken(turns: Sequence[Turn]) -> tuple[int, int] | None:
    """(agent, number) of the first ``{number}`` for an agent that has not spoken; agents from 1."""
    for agent, turn in enumerate(turns, 1):
        for _, number in _QUOTE.findall(turn.user):
            if number and not 1 <= int(number) < agent:
                return agent, int(number)
    return None


def chain(heading: str, text: str, roles: Iterable[Role]) -> tuple[Turn, ...]:
    """A turn for each role, in their order, about ``text`` under a heading such as "Question";
    each reads all that was said before it.
    """
    user = f"{heading}:\n{literal(text)}\n\n"
    turns = []
    for number, (name, system, task) in enumerate(roles, 1):
        turns.append(Turn(system, user + task, name))
        user += f"The {name} said:\n{{{number}}}\n\n"
    return tuple(turns)
