# SPDX-License-Identifier: Apache-2.0
"""Two runs of the cases are compared request by request, and the stream with boilerplate is one."""

from __future__ import annotations

import json
from pathlib import Path

from kvcomm_vllm.evaluation.cases.boilerplate import AGENTS, ROUNDS, stream
from kvcomm_vllm.evaluation.cases.case import load_cases
from kvcomm_vllm.evaluation.cases.compare import compare


def row(number: int, reused: int | None, kl: float | None, top: bool | None) -> dict[str, object]:
    local = None if reused is None else 32
    row = {"case": "quoted", "number": number, "prompt": 900, "local": local, "reused": reused}
    return row | {"kl": kl, "same_top": top, "clear": True, "declined": "", "faults": []}


def run(*rows: dict[str, object]) -> dict[str, object]:
    keys = ("compared", "kl_mean", "kl_median", "kl_p95", "top_kept_where_clear")
    sums = dict.fromkeys((*keys, "reused_tokens", "computed_tokens"), 1)
    return {"summary": sums, "requests": list(rows)}


def test_a_row_says_what_was_cached_and_how_far_off_it_was_then_and_now() -> None:
    table = compare(
        run(row(1, 100, 0.5, False)), run(row(1, 200, 0.25, True), row(2, 0, 0.0, None))
    )
    assert "| quoted | 1 | 900 | 132 | 232 | 0.5000 | 0.2500 | NO | yes |  |" in table
    assert "| quoted | 2 | 900 |  | 32 |  | 0.0000 |  |  |  |" in table


def test_what_no_report_says_stays_empty() -> None:
    table = compare(run(row(1, None, None, None)), run(row(1, None, None, None)))
    assert "| quoted | 1 | 900 |  |  |  |  |  |  |  |" in table


def test_the_stream_has_boilerplate_first_and_long_texts_of_its_agents_behind_it(
    tmp_path: Path,
) -> None:
    made = stream()
    (tmp_path / "one.json").write_text(json.dumps({"requests": made}))
    (case,) = load_cases(tmp_path)
    assert len(case.requests) == AGENTS * ROUNDS
    systems = [r.body["messages"][0]["content"].split("\n") for r in case.requests]
    assert len({rules for _, rules, _ in systems}) == 1
    assert len({own for _, _, own in systems}) == AGENTS
    assert all(len(own) > 4 * len(rules) for _, rules, own in systems)
