# SPDX-License-Identifier: Apache-2.0
"""Twenty edits of one agent's prompt, one after the other: do errors grow?

Usage: python benchmarks/edit_turns.py --model models/SmolLM2-135M-Instruct [--sessions 3]

Clock, oldest turn dropped, result pruned and tool removed in turn. Each prompt is served with reuse
from what the prompts before have left in the cache, and densely; KL of the first token, and the
mean over the first eight, along the dense answer. One engine in this process, float32.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

from kvcomm_vllm.evaluation.fidelity.bench import Bench
from kvcomm_vllm.evaluation.fidelity.turns import TurnScore, along
from kvcomm_vllm.evaluation.workloads.case import Case
from kvcomm_vllm.evaluation.workloads.edits import MIXED, Kind, turns


def shown(number: int, score: TurnScore) -> str:
    d = score.distance
    return (
        f"| {number} | {score.agent} | {score.report['prompt_tokens']} | {score.computed:.1%} "
        f"| {d.kl1:.4f} | {d.kl_mean:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--input-tokens", type=int, default=1500)
    parser.add_argument("--hints", type=json.loads, default={"mode": "seam"})
    parser.add_argument("--config", type=json.loads, default={}, help="of the plugin, as JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kind = Kind(tuple(MIXED.edits[n % 4] for n in range(args.edits)), tools=(9, 9))
    bench = Bench(args.model, args.config, dtype="float32")
    rows: list[dict[str, Any]] = []
    print("| turn | edit | tokens | computed | KL, first token | KL, 8 tokens |")
    print("|---|---|---|---|---|---|")
    for session in range(args.sessions):
        name = f"{session} twenty"
        case = Case(name, turns(kind, name, args.input_tokens), name)
        for number, score in enumerate(along(bench, case, args.hints)):
            print(shown(number, score), flush=True)
            d = score.distance
            row = {"session": session, "turn": number, "edit": score.agent, "first": d.kl1}
            rows.append(row | {"mean": d.kl_mean, "computed": score.computed})
    edits = [row for row in rows if row["turn"]]
    first = sorted(row["first"] for row in edits)
    by_turn = {n: fmean(r["first"] for r in edits if r["turn"] == n) for n in (2, args.edits)}
    print(
        f"\nKL of the first token: mean {fmean(first):.4f}, median {median(first):.4f}, 95th "
        f"percentile {first[int(0.95 * len(first))]:.4f}; by turn {by_turn}; computed "
        f"{fmean(row['computed'] for row in edits):.1%}"
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bench.close()


if __name__ == "__main__":
    main()
