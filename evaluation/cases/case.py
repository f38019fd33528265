# SPDX-License-Identifier: Apache-2.0
"""A case: requests of one kind, in order, with what must hold of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class CaseRequest:
    """One request: the path of its endpoint, its body, and what is expected of it (see
    ``judge.py``).
    """

    path: str
    body: Body
    expect: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Requests that are sent in order to a server that has seen nothing else."""

    name: str
    requests: tuple[CaseRequest, ...]


def load_cases(folder: Path) -> list[Case]:
    """The cases in a folder, by name; files whose requests are made by a script are left out.

    Raises:
        FileNotFoundError: there are none.
    """
    cases = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content.get("requests")
        if isinstance(rows, list):
            requests = (CaseRequest(r["path"], r["body"], r.get("expect") or {}) for r in rows)
            cases.append(Case(path.stem, tuple(requests)))
    if not cases:
        raise FileNotFoundError(f"there are no cases in {folder}")
    return cases


def fill(body: Body, answers: Mapping[int, str]) -> Body:
    """The body with earlier answers put in: ``{{answer:0}}`` as it is, ``{{answer_json:0}}`` as in
    a JSON string.
    """
    text = json.dumps(body)
    for number, answer in answers.items():
        quoted = json.dumps(answer)[1:-1]
        text = text.replace(f"{{{{answer:{number}}}}}", quoted)
        text = text.replace(f"{{{{answer_json:{number}}}}}", json.dumps(quoted)[1:-1])
    filled: Body = json.loads(text)
    return filled
