# SPDX-License-Identifier: Apache-2.0
"""Times to first token of agents that read each other, without decoding a message.

A message is put behind its agent's prompt and prefilled, which leaves the same KV in the same
place as decoding it would, in a twentieth of the time. Lengths are the paper's (KVCOMM, arXiv
2510.12872, Table 2), texts are random words, and every answer is one token.

``agents`` plays one team after the other: five agents, a sixth that hears what the fifth has
heard, one of a group chat over a long transcript, and a prompt that nobody shares. ``crowd`` has
a fifth agent per task, to be asked at once (``--burst``).
"""

from __future__ import annotations

from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, Turn
from kvcomm_vllm.evaluation.workloads.task import TOKENS, Task, Workload, rng_of
from kvcomm_vllm.evaluation.workloads.words import random_words

BETWEEN, TAIL = 15, 10  # words before each message, and behind all of them
OPTIONS = dict.fromkeys(("prefix_tokens", "input_tokens", "output_tokens"), TOKENS)


def _known(system: str, rng: Random) -> Turn:
    """The agent has answered another question before: its instructions are in the cache."""
    return Turn(system, random_words(3, rng))


def _team(
    number: int,
    seed: int,
    prefix_tokens: int = 512,
    input_tokens: int = 1024,
    output_tokens: int = 512,
) -> Task:
    """One team, whose texts nobody else has.

    Args:
        output_tokens: length of each message.
    """
    rng = rng_of(seed, f"agents {number}")
    heard, tail = random_words(input_tokens, rng), " " + random_words(TAIL, rng)
    turns: list[Turn] = []
    before: tuple[Turn, ...] = ()
    for agent in range(1, 6):
        system, message = random_words(prefix_tokens, rng), random_words(output_tokens, rng)
        primers = (*before, _known(system, rng))
        turns.append(Turn(system, heard + tail, f"agent {agent}", primers=primers))
        before = (Turn(system, heard + tail, reply=message),)
        if agent < 5:
            heard += f" {random_words(BETWEEN, rng)} {message}"
    system = random_words(prefix_tokens, rng)
    turns.append(Turn(system, heard + tail, "agent 6, as agent 5", primers=(_known(system, rng),)))
    turns.append(_chat(rng, prefix_tokens // 2, 3 * input_tokens, tail))
    system, new = random_words(prefix_tokens, rng), random_words(input_tokens, rng)
    alone = Turn(system, new + tail, "nothing shared")
    name = f"agents-{number}"
    return Task(Case(name, (*turns, alone), group=name), 1, fixed=True)


def _chat(rng: Random, prefix_tokens: int, transcript_tokens: int, tail: str) -> Turn:
    first, second = (random_words(prefix_tokens, rng) for _ in range(2))
    transcript = random_words(transcript_tokens, rng) + tail
    primers = (_known(second, rng), Turn(first, transcript))
    return Turn(second, transcript, "group chat", primers=primers)


def _fifth(
    number: int,
    seed: int,
    prefix_tokens: int = 512,
    input_tokens: int = 1024,
    output_tokens: int = 512,
) -> Task:
    """The fifth agent of a team whose fourth has read it all, and has answered."""
    roles = rng_of(seed, "crowd")
    fourth, fifth = (random_words(prefix_tokens, roles) for _ in range(2))
    rng = rng_of(seed, f"crowd {number}")
    heard = random_words(input_tokens + 3 * (BETWEEN + output_tokens), rng)
    message = random_words(output_tokens, rng)
    prompt = f"{heard} {random_words(BETWEEN, rng)} {message} {random_words(TAIL, rng)}"
    primers = (Turn(fourth, heard, reply=message), _known(fifth, rng))
    name = f"crowd-{number}"
    return Task(Case(name, (Turn(fifth, prompt, "agent 5", "", primers),), name), 1, fixed=True)


WORKLOAD = Workload(
    name="agents",
    title="Five agents and more read each other's messages, which are prefilled; one token each",
    tasks=_team,
    options=OPTIONS,
)
CROWD = Workload(
    name="crowd",
    title="The fifth agents of many teams; one token each",
    tasks=_fifth,
    options=OPTIONS,
)
