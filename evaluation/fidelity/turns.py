# SPDX-License-Identifier: Apache-2.0
"""A session turn by turn: how far is each answer from the dense one to the same prompt?

Each turn reuses what the turns before have left in the cache, which were served with reuse
themselves: so it shows whether errors grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.evaluation.fidelity.bench import Bench, chat_prompt
from kvcomm_vllm.evaluation.fidelity.divergence import Divergence, divergence
from kvcomm_vllm.evaluation.modes import DENSE
from kvcomm_vllm.evaluation.workloads.case import Case, fill


@dataclass(frozen=True)
class TurnScore:
    """One turn in one mode, along the dense answer.

    Args:
        agent: the turn's name.
        report: the plugin's.
    """

    agent: str
    distance: Divergence
    report: dict[str, Any]

    @property
    def computed(self) -> float:
        """The share of the prompt that was computed."""
        return float(self.report["computed"] / self.report["prompt_tokens"])


def along(bench: Bench, case: Case, hints: dict[str, Any], tokens: int = 8) -> Iterator[TurnScore]:
    """Serve each turn of a case densely and with ``hints``, the dense answer of ``tokens`` tokens
    given to both.
    """
    said: list[str] = []
    for turn in case.turns:
        prompt = chat_prompt(bench.tokenizer, turn.system, fill(turn.user, said))
        dense = bench.run(prompt, DENSE, f"dense {case.id}", tokens=tokens, listen=tokens)
        mine = bench.follow(prompt, dense.tokens, hints, f"{hints} {case.id}")
        yield TurnScore(turn.agent, divergence(dense.steps, mine.steps), mine.report)
        said.append(bench.decode(dense.tokens))
