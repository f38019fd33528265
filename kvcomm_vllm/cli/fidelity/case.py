# SPDX-License-Identifier: Apache-2.0
"""A case: agents that speak in turn and quote each other; the last one is scored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

_PLACE = re.compile(r"\{\{(\d+)\}\}|\{(\d+)\}")


class Answer(Enum):
    """How two answers to a case are compared, beside their tokens."""

    TEXT = "text"
    NUMBER = "number"
    CHOICE = "choice"


@dataclass(frozen=True)
class Turn:
    """One agent's instructions and prompt; ``{1}`` stands for the first agent's answer."""

    system: str
    user: str


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


def literal(text: str) -> str:
    """``text`` as part of a template, braces around numbers kept as they are."""
    return re.sub(r"\{(\d+)\}", r"{{\1}}", text)


def fill(template: str, messages: Sequence[str]) -> str:
    """The template with each ``{n}`` replaced by the n-th message, once: what a message contains
    is text. ``{{n}}`` gives ``{n}``.

    Raises:
        IndexError: there is no n-th message; see :func:`unspoken`.
    """

    def place(found: re.Match[str]) -> str:
        kept, number = found.groups()
        if kept is not None:
            return "{" + str(kept) + "}"
        if not 1 <= int(number) <= len(messages):
            raise IndexError(f"{{{number}}} stands for no earlier answer")
        return messages[int(number) - 1]

    return _PLACE.sub(place, template)


def unspoken(turns: Sequence[Turn]) -> tuple[int, int] | None:
    """(agent, number) of the first ``{number}`` for an agent that has not spoken; agents from 1."""
    for agent, turn in enumerate(turns, 1):
        for _, number in _PLACE.findall(turn.user):
            if number and not 1 <= int(number) < agent:
                return agent, int(number)
    return None
