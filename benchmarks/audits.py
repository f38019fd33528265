# SPDX-License-Identifier: Apache-2.0
"""What learning while idle costs those who are served: one server that does not, one that does.

The same requests at the same random moments (open loop, exponential gaps) to both, one after the
other. The second one learns from all of them and never corrects, so that nothing else differs.

``python benchmarks/audits.py --model DIR [--requests N] [--gap SECONDS] [--json F]``
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from kvcomm_vllm.cli.client import ChatClient
from kvcomm_vllm.cli.machine import describe_machine, describe_versions, is_cpu_build
from kvcomm_vllm.cli.metrics_page import read_page, totals
from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name
from kvcomm_vllm.cli.server import free_port, running

WORDS = (
    *("river", "stone", "amber", "candle", "market", "winter", "engine", "paper", "garden"),
    *("silver", "bridge", "signal", "copper", "harbor", "letter", "window", "forest"),
)
TEXT_WORDS = 400
COLUMNS = {
    "silent": {"audits": False},
    "learning": {"audits": True, "min_anchors": 1000, "max_anchors": 1000},
}


def messages(role: str, text: str) -> list[dict[str, str]]:
    system = f"You are the {role} of a team. " + f"The {role} is brief. " * 20
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def serve(client: ChatClient, requests: int, gap: float, seed: int) -> list[float]:
    """Times to first token, ms: texts arrive at random, and two agents read each."""
    rng = random.Random(seed)
    times = []
    for number in range(requests + 4):
        text = " ".join(rng.choice(WORDS) for _ in range(TEXT_WORDS))
        for role in ("writer", "critic"):
            time.sleep(rng.expovariate(1 / gap))
            answer = client.stream(messages(role, text), 4)
            if number >= 4 and answer.ttft_ms is not None:  # the first ones warm everything up
                times.append(answer.ttft_ms)
    return times


def measure(model: str, requests: int, gap: float, seed: int) -> dict[str, Any]:
    on_gpu = not is_cpu_build()
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for column, settings in COLUMNS.items():
            config = Path(folder) / f"{column}.yaml"
            config.write_text(yaml.safe_dump({"mode": "anchor", **settings}))
            port = free_port()
            command = serve_command(
                model, port, on_gpu=on_gpu, connector=True, config=config, extra=[]
            )
            env = serve_env(model, on_gpu=on_gpu)
            with running(column, command, port, env, Path(folder) / f"{column}.log") as server:
                with closing(ChatClient(server.base_url, served_name(model))) as client:
                    times = serve(client, requests, gap, seed)
                page = read_page(server.base_url) or ""
            found[column] = {
                "ttft_ms": times,
                "lessons": totals(page, "vllm:kvcomm_lessons_total", "outcome"),
                "pieces": totals(page, "vllm:kvcomm_runs_total", "phase").get("learning", 0),
                "seconds": totals(page, "vllm:kvcomm_seconds_total", "phase").get("learning", 0),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=40, help="texts; two requests each")
    parser.add_argument("--gap", type=float, default=2.0, help="mean seconds between requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.model, options.requests, options.gap, options.seed)
    silent, learning = (found[column]["ttft_ms"] for column in COLUMNS)
    table = Table("", "mean", "median", "p90", title="Time to first token, ms")
    for column in COLUMNS:
        times = found[column]["ttft_ms"]
        p90 = statistics.quantiles(times, n=10)[-1]
        table.add_row(
            column, *(f"{x:.1f}" for x in (statistics.mean(times), statistics.median(times), p90))
        )
    console = Console()
    console.print(table)
    paired = [b - a for a, b in zip(silent, learning, strict=True)]
    added = statistics.median(paired) / statistics.median(silent)
    console.print(
        f"Median of paired differences: {statistics.median(paired):+.1f} ms ({added:+.1%})"
    )
    console.print({k: v for k, v in found["learning"].items() if k != "ttft_ms"})
    if options.json:
        conditions = {
            "requests": options.requests,
            "gap_seconds": options.gap,
            "seed": options.seed,
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"conditions": conditions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
