# SPDX-License-Identifier: Apache-2.0
"""The demo's agents and the prompts they are given."""

from dataclasses import dataclass

import yaml

from kvcomm_vllm.cli.client import Message
from kvcomm_vllm.cli.rows import DATA


@dataclass(frozen=True)
class Agent:
    """A role with its own system prompt."""

    name: str
    system: str


@dataclass(frozen=True)
class Note:
    """What one agent has written for the agents after it."""

    author: str
    text: str


def load_agents() -> list[Agent]:
    """The five roles in the order in which they speak."""
    rows = yaml.safe_load((DATA / "agents.yaml").read_text(encoding="utf-8"))
    return [Agent(row["name"], " ".join(row["system"].split())) for row in rows]


def agent_messages(agent: Agent, task: str, notes: list[Note]) -> list[Message]:
    """The prompt of one agent: own system prompt, the task, every earlier note, own turn.

    The task and the notes are the shared text: all agents receive them word for word, at a
    different position each time, because the system prompts differ in length.
    """
    parts = [f"Here is the task of today.\n\n{task}"]
    parts += [
        f"The {note.author} has left this note for the team:\n\n{note.text}" for note in notes
    ]
    parts.append(f"It is your turn. Write your note as the {agent.name}.")
    return [
        {"role": "system", "content": agent.system},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def rehearsal_messages(agent: Agent) -> list[Message]:
    """A prompt that loads the agent's system prompt and some shared text of no further use."""
    text = (DATA / "rehearsal.txt").read_text(encoding="utf-8")
    return agent_messages(agent, text, [])
