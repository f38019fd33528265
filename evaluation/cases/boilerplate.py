# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation.cases.boilerplate FOLDER``: a stream with boilerplate.

Each prompt begins with a role and house rules that stand in all of them; then come long
instructions of the agent's own, a document that some of them share, and a question. So there is a
little to gain ahead of a long text of one's own, which reuse would make private.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from kvcomm_vllm.evaluation.soak.texts import ROLES, story

RULES, OWN, DOCUMENT = 60, 450, 220  # words
AGENTS, ROUNDS, DOCUMENTS = 4, 3, 2


def stream(seed: int = 0) -> list[dict[str, Any]]:
    """``AGENTS * ROUNDS`` requests; all but the first are compared with exact serving."""
    rng = random.Random(seed)
    rules = story(rng, RULES)
    own = [story(rng, OWN) for _ in range(AGENTS)]
    documents = [story(rng, DOCUMENT) for _ in range(DOCUMENTS)]
    requests: list[dict[str, Any]] = []
    for turn in range(ROUNDS):
        for agent in range(AGENTS):
            system = f"You are the {ROLES[agent]}.\n{rules}\n{own[agent]}"
            document = documents[(turn + agent) % DOCUMENTS]
            user = f"{document}\nQuestion {turn}: which word comes first?"
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            expect = {"kl": 1} if requests else {}
            path = "/v1/chat/completions"
            requests.append({"path": path, "body": {"messages": messages}, "expect": expect})
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "boilerplate.json"
    path.write_text(json.dumps({"requests": stream()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
