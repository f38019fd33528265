# SPDX-License-Identifier: Apache-2.0
"""Teams of agents take turns in a KV cache that is too small for them: what is reused, and how soon
first tokens come, with tiers and without.

``python benchmarks/tiers.py --model DIR [--teams N] [--pages N] [--host-gb N] [--json F]``

All teams' first agents speak, then all second ones, and so on: what an agent is to quote has left
the cache by then. One server after the other: plain vLLM, kvcomm without tiers, kvcomm with a host
pool, and kvcomm with a cache in which everything has room. vLLM's own host offloading does not run
on CPUs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvcomm_vllm.cli.machine import describe_machine, describe_versions
from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.evaluation.serving.client import ChatClient
from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals
from kvcomm_vllm.evaluation.serving.screen import progress_bar, started
from kvcomm_vllm.evaluation.serving.server import stop_at_sigterm
from kvcomm_vllm.evaluation.workloads.case import Message

ROLES = ("Reader", "Critic", "Planner", "Checker", "Writer")
WORDS = (
    *("river", "stone", "amber", "candle", "market", "winter", "engine", "paper", "garden"),
    *("silver", "bridge", "signal", "copper", "harbor", "letter", "window", "forest"),
)
COUNTS = ("prompt_tokens", "local", "reused", "computed")
QUIET = {"audits": False, "heal": "off"}


def columns(options: argparse.Namespace) -> dict[str, tuple[bool, int | None, dict[str, Any]]]:
    """By title: whether the plugin is on, pages of the cache (None: all that fit), settings."""
    pool = {"host_gb": options.host_gb}
    if options.disk:
        pool |= {"disk_path": str(options.disk)}
    return {
        "plain vLLM": (False, options.pages, {}),
        "without tiers": (True, options.pages, QUIET),
        "host pool": (True, options.pages, QUIET | {"tiers": pool}),
        "unbounded": (True, None, QUIET),
    }


def prompt(team: int, agent: int, said: list[str], words: int) -> list[Message]:
    rng = random.Random(team)
    question = " ".join(rng.choice(WORDS) for _ in range(words))
    heard = "\n\n".join(f"{role} said: {text}" for role, text in zip(ROLES, said, strict=False))
    system = f"You are the {ROLES[agent]} of a team. " + f"The {ROLES[agent]} is brief. " * 5
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{question}\n\n{heard}\n\nWhat do you say?"},
    ]


def play(client: ChatClient, options: argparse.Namespace, salt: str, done: Any) -> dict[str, Any]:
    """All agents of all teams; times to the first token by agent, ms, and tokens in all."""
    said: list[list[str]] = [[] for _ in range(options.teams)]
    times: list[list[float]] = [[] for _ in ROLES]
    tokens = 0
    for agent in range(len(ROLES)):
        for team in range(options.teams):
            messages = prompt(team, agent, said[team], options.words)
            answer = client.stream(messages, options.tokens, salt)
            said[team].append(answer.text)
            assert answer.ttft_ms is not None  # a stream has one
            times[agent].append(answer.ttft_ms)
            tokens += answer.prompt_tokens
            done()
    return {"ttft_ms": times, "prompt_tokens": tokens}


def counted(url: str) -> dict[str, float]:
    page = read_page(url) or ""
    found = totals(page, "vllm:kvcomm_tokens_total", "treatment")
    returned = totals(page, "vllm:kvcomm_tier_bytes_total", "event")
    seconds = totals(page, "vllm:kvcomm_seconds_total", "phase")
    return {
        **{name: found.get(name, 0) for name in COUNTS[1:]},
        **{f"{name}_gb": returned.get(name, 0) / 2**30 for name in ("stored", "returned")},
        **{f"{name}_seconds": seconds.get(name, 0) for name in ("storing", "returning")},
    }


def measure(options: argparse.Namespace, folder: Path, progress: Progress) -> dict[str, Any]:
    found = {}
    for title, (connector, pages, settings) in columns(options).items():
        config = folder / "kvcomm.yaml"
        config.write_text(yaml.safe_dump(settings))
        extra = ["--max-model-len", "2048"]  # which the smallest cache must hold
        extra += [] if pages is None else ["--num-gpu-blocks-override", str(pages)]
        log = folder / f"{title}.log"
        with (
            started(
                title,
                options.model,
                log,
                progress,
                connector=connector,
                config=config if connector else None,
                extra=extra,
            ) as server,
            closing(ChatClient(server.base_url, served_name(options.model))) as client,
        ):
            warm = argparse.Namespace(**{**vars(options), "teams": 1, "tokens": 2})
            play(client, warm, "warm up", lambda: None)
            before = counted(server.base_url)
            task = progress.add_task(title, total=options.teams * len(ROLES))
            row = play(client, options, "teams", partial(progress.advance, task))
            after = counted(server.base_url)
            found[title] = row | {name: after[name] - before[name] for name in after}
    return found


def show(console: Console, found: dict[str, Any]) -> None:
    table = Table("", "TTFT, sum", "fifth agent", "reused or local", "against plain")
    plain = sum(map(sum, found["plain vLLM"]["ttft_ms"]))
    for title, row in found.items():
        total = sum(map(sum, row["ttft_ms"]))
        share = (row["local"] + row["reused"]) / row["prompt_tokens"]
        fifth = statistics.median(row["ttft_ms"][-1])
        known = f"{share:.1%}" if row["computed"] else ""
        table.add_row(
            title, f"{total / 1e3:.1f} s", f"{fifth:.0f} ms", known, f"{plain / total:.2f}x"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--teams", type=int, default=20)
    parser.add_argument("--words", type=int, default=300, help="of a question, about a token each")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--pages", type=int, default=380, help="of 32 tokens in the small cache")
    parser.add_argument("--host-gb", type=float, default=4.0)
    parser.add_argument("--disk", type=Path, help="keep pages in this folder, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stop_at_sigterm()
    with TemporaryDirectory() as folder, progress_bar(Console(stderr=True)) as progress:
        found = measure(options, Path(folder), progress)
    show(Console(), found)
    if options.json:
        names = ("teams", "words", "tokens", "pages", "host_gb")
        conditions = {name: getattr(options, name) for name in names}
        conditions |= {"machine": describe_machine(), "versions": describe_versions()}
        text = json.dumps({"conditions": conditions, **found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
