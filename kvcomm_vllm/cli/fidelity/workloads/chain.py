# SPDX-License-Identifier: Apache-2.0
"""Agents in a row, each of which reads the task and all that was said before it."""

from collections.abc import Sequence

from kvcomm_vllm.cli.fidelity.case import Turn, literal

Role = tuple[str, str, str]  # name, instructions, what to do


def chain(heading: str, text: str, roles: Sequence[Role]) -> tuple[Turn, ...]:
    """A turn for each role, in their order, about ``text`` under a heading such as "Question"."""
    user = f"{heading}:\n{literal(text)}\n\n"
    turns = []
    for number, (name, system, task) in enumerate(roles, 1):
        turns.append(Turn(system, user + task))
        user += f"The {name} said:\n{{{number}}}\n\n"
    return tuple(turns)
