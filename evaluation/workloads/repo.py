# SPDX-License-Identifier: Apache-2.0
"""One agent that reads code: functions and classes of a repository, quoted in shifting places.

Coding agents show the objects that seem to matter first, and what matters changes with every
question: here the object that is asked about moves to the front, and the others go on in their
order. From the first object on, all of it is new to a prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import yaml

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.edits import EDITS, FIRST, OPTIONS
from kvcomm_vllm.evaluation.workloads.lengths import about_tokens
from kvcomm_vllm.evaluation.workloads.rows import DATA
from kvcomm_vllm.evaluation.workloads.task import Task, Workload

CLASSES = 5  # every fifth object is one


@cache
def words() -> dict[str, Any]:
    """The packaged words, by kind."""
    found: dict[str, Any] = yaml.safe_load((DATA / "code.yaml").read_text(encoding="utf-8"))
    return found


def one_of(kind: str, rng: Random) -> str:
    return str(rng.choice(words()[kind]))


@dataclass(frozen=True)
class CodeObject:
    """A function or a class, and how it is quoted."""

    name: str
    text: str


def _function(name: str, rng: Random, indent: str = "", first: str = "") -> list[str]:
    things, thing, limit, kept = rng.sample(words()["nouns"], 4)
    start, step = rng.randrange(2, 90), rng.randrange(2, 9)
    compared, folded = rng.choice(("<", ">", "<=", ">=", "!=")), rng.choice(("+", "-", "*", "|"))
    head = f"def {name}({first}{things}s, {limit}={start}):"
    skipped = [
        f"        if {thing}.{one_of('nouns', rng)} {compared} {limit}:",
        f"            {rng.choice(('continue', 'break', f'{limit} {folded}= {step}'))}",
    ]
    found = [
        f'    """{one_of("verbs", rng).title()} every {thing} up to its {limit}."""',
        f"    {kept} = {rng.choice(('[]', 'set()', 'Counter()'))}",
        f"    for {thing} in {one_of('verbs', rng)}_{thing}({things}s, {step}):",
        *(skipped if rng.random() < 0.5 else []),
        f"        {kept}.{rng.choice(('append', 'add', 'update'))}"
        f"({thing}.{one_of('verbs', rng)}({limit} {folded} {rng.randrange(3, 60)}))",
        f"    return {rng.choice(('sorted', 'list', 'tuple', 'len'))}({kept})",
    ]
    return [indent + line for line in (head, *found)]


def _class(name: str, rng: Random) -> list[str]:
    one, other = rng.sample(words()["nouns"], 2)
    lines = [
        f"class {name}:",
        f'    """Holds a {one} and its {other}."""',
        "",
        f"    def __init__(self, {one}, {other}=None):",
        f"        self.{one} = {one}",
        f"        self.{other} = {other} or {rng.randrange(2, 99)}",
        "",
    ]
    return lines + _function(one_of("verbs", rng), rng, "    ", "self, ")


def code_object(number: int, name: str, rng: Random) -> CodeObject:
    """The ``number``-th of a repository; ``name`` is a verb and a noun, joined."""
    if number % CLASSES == CLASSES - 1:
        name = name.title().replace("_", "")
        lines = _class(name, rng)
    else:
        lines = _function(name, rng)
    place = f"{one_of('folders', rng)}/{one_of('nouns', rng)}s.py, line {rng.randrange(10, 900)}"
    return CodeObject(name, f"# {place}\n" + "\n".join(lines) + "\n\n")


def repository(rng: Random, tokens: int) -> list[CodeObject]:
    """Objects of about so many tokens, more than there are edits, with different names."""
    names = [f"{verb}_{noun}" for verb in words()["verbs"] for noun in words()["nouns"]]
    rng.shuffle(names)
    found: list[CodeObject] = []
    while len(found) <= EDITS or tokens > 0:
        found.append(code_object(len(found), names[len(found)], rng))
        tokens -= about_tokens(found[-1].text)
    return found


def _shown(objects: Sequence[CodeObject], asked: Sequence[str], label: str) -> Turn:
    code = literal("".join(one.text for one in objects))
    *before, now = asked
    answered = "".join(
        f"Question: {text}\nAnswer: {{{number}}}\n\n" for number, text in enumerate(before, 1)
    )
    return Turn(words()["system"], f"Objects:\n\n{code}{answered}Question: {now}", label)


def _task(number: int, seed: int, input_tokens: int = 2250, output_tokens: int = 8) -> Task:
    """One repository, and nine questions about it.

    Args:
        input_tokens: of the prompts, about, in SmolLM2's vocabulary.
        output_tokens: of each answer.
    """
    name = f"repo-{number}"
    rng = Random(f"{seed} {name}")
    questions = rng.sample(words()["questions"], EDITS)
    spent = about_tokens(words()["system"] + " ".join(questions)) + EDITS * output_tokens // 2
    objects = repository(rng, input_tokens - spent)
    asked = [one_of("questions", rng).format(objects[0].name)]
    turns = [_shown(objects, asked, FIRST)]
    for edit, question in enumerate(questions, 1):
        # not one of the first few: what stands in front of it moves behind it
        chosen = objects.pop(rng.randrange(len(objects) // 3, len(objects)))
        objects.insert(0, chosen)
        asked.append(question.format(chosen.name))
        turns.append(_shown(objects, asked, f"object to the front {edit}"))
    return Task(Case(name, tuple(turns), group=name), output_tokens, fixed=True)


WORKLOAD = Workload(
    name="repo",
    title="One agent is asked about code, and the object in question moves to the front each time",
    tasks=_task,
    options=OPTIONS,
    source="made-up code",
)
