# SPDX-License-Identifier: Apache-2.0
"""A server with a disk tier is killed at work and starts again: what the first request of each team
finds there, and how soon its first token comes.

``python benchmarks/tiers_restart.py --model DIR [--teams N] [--host-gb N] [--json F]``

Teams of five agents speak; while other clients are being served the server gets SIGKILL. The one
that starts next is asked one question by each team's first agent, which quotes all five. Plain vLLM
is asked the same when it has just started, too: it has nothing from before.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from statistics import median
from typing import Any

from tiers_work import QUIET, ROLES, Bench, Teams, asked_for, bench, counted, write

from kvcomm_vllm.cli.failure import UserError
from kvcomm_vllm.evaluation.report.table import markdown
from kvcomm_vllm.evaluation.serving.client import ChatClient, RequestError
from kvcomm_vllm.evaluation.serving.server import Server

LOAD = 1000  # requests of a client that is served when the server is killed


def kill_at_work(server: Server, client: ChatClient, options: argparse.Namespace) -> None:
    """Two clients ask without a pause until there is no server any more."""

    others = Teams.of(options, said=[[]] * 3 * LOAD)

    def work(first: int) -> None:
        with suppress(RequestError):
            for team in range(first, first + LOAD):
                others.ask(client, team, 0)

    with ThreadPoolExecutor(2) as pool:
        at_work = [pool.submit(work, LOAD * number) for number in (1, 2)]
        time.sleep(options.load_seconds)
        if any(one.done() for one in at_work):
            raise UserError("The server had no load any more: ask for fewer --load-seconds.")
        os.killpg(server.pid, signal.SIGKILL)  # API server, engine, workers


def measure(options: argparse.Namespace, at: Bench) -> dict[str, Any]:
    tiers = {"host_gb": options.host_gb, "disk_path": str(at.folder / "kv")}
    teams = Teams.of(options)
    with at.serving("before", QUIET | {"tiers": tiers}) as (server, client):
        done = at.told("before", options.teams * len(ROLES))
        for _ in teams.rounds(client, range(len(ROLES))):
            done()
        before = counted(server.base_url)
        kill_at_work(server, client, options)
    with at.serving("after", QUIET | {"tiers": tiers}) as (server, client):
        start = counted(server.base_url)
        after = teams.asked_once(client, server.base_url, 0)
        end = counted(server.base_url)
        after |= {
            name: end[name] - start[name]
            for name in ("returned_pages", "returned_gb", "returning_seconds")
        }
    with at.serving("plain vLLM", None) as (server, client):
        plain = teams.asked_once(client, server.base_url, 0)
    stored = {name: before[name] for name in ("stored_pages", "stored_gb", "storing_seconds")}
    return {"before": stored, "after": after, "plain vLLM": plain}


def table(found: dict[str, Any]) -> str:
    after, plain = found["after"], found["plain vLLM"]
    rows = []
    for team, (ours, theirs) in enumerate(zip(after["ttft_ms"], plain["ttft_ms"], strict=True)):
        kept, tokens = after["reused"][team] + after["local"][team], after["prompt_tokens"][team]
        share = f"{kept} of {tokens}"
        rows.append(
            [f"team {team}", share, f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.2f}x"]
        )
    kept, tokens = sum(after["reused"] + after["local"]), sum(after["prompt_tokens"])
    middle, plainly = median(after["ttft_ms"]), median(plain["ttft_ms"])
    ratio = sum(plain["ttft_ms"]) / sum(after["ttft_ms"])
    last = ["all, median", f"{kept / tokens:.1%}", f"{middle:.0f}", f"{plainly:.0f}"]
    rows.append([*last, f"{ratio:.2f}x"])
    head = ["", "reused or local", "first token, ms", "plain vLLM, ms", "against plain"]
    return markdown(head, rows, labels=1)


def main() -> None:
    parser = asked_for(__doc__, teams=10)
    parser.add_argument("--load-seconds", type=float, default=3.0, help="before the server dies")
    options = parser.parse_args()
    with bench(options) as at:
        found = measure(options, at)
    print(table(found))
    write(options, ("teams", "words", "tokens", "host_gb", "load_seconds"), found)


if __name__ == "__main__":
    main()
