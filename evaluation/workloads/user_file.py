# SPDX-License-Identifier: Apache-2.0
"""Cases from a user's own file."""

from pathlib import Path

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, unspoken
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row, read_file


def user_cases(path: Path) -> list[Case]:
    """One case a line: ``{"agents": [{"system": ..., "user": ...}, ...]}``, the last one scored.

    ``{1}`` in a user text stands for the first agent's answer, ``{{1}}`` for itself. "system" may
    be left out.

    Raises:
        DataError: unreadable, malformed, or an answer quoted before it is given.
    """
    rows = read_file(path, {"agents": list})
    return [_case(row, f"{path}, {row['id']}") for row in rows]


def _case(row: Row, where: str) -> Case:
    turns = []
    for number, agent in enumerate(row["agents"], 1):
        if not isinstance(agent, dict) or not isinstance(agent.get("user"), str):
            raise DataError(f'{where}: agent {number} needs a text "user"')
        system = agent.get("system", "")
        if not isinstance(system, str):
            raise DataError(f'{where}: "system" of agent {number} is no text')
        turns.append(Turn(system, agent["user"]))
    if not turns:
        raise DataError(f"{where}: no agents")
    if (early := unspoken(turns)) is not None:
        agent, quoted = early
        raise DataError(f"{where}: agent {agent} quotes {{{quoted}}}, which is no earlier agent")
    return Case(str(row["id"]), tuple(turns), group=str(row["id"]))
