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
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tiers_work import QUIET, ROLES, Bench, Teams, asked_for, bench, counted, first_token, write

PLAIN = "plain vLLM"


def columns(
    options: argparse.Namespace,
) -> dict[str, tuple[int | None, dict[str, Any] | None]]:
    """By title: pages of the cache (None: all that fit), settings (None: plain vLLM)."""
    pool = {"host_gb": options.host_gb}
    if options.disk:
        pool |= {"disk_path": str(options.disk)}
    all_of_them: dict[str, tuple[int | None, dict[str, Any] | None]] = {
        PLAIN: (options.pages, None),
        "without tiers": (options.pages, QUIET),
        "host pool": (options.pages, QUIET | {"tiers": pool}),
        "unbounded": (None, QUIET),
    }
    return {title: all_of_them[title] for title in options.columns or all_of_them}


def measure(options: argparse.Namespace, at: Bench) -> dict[str, Any]:
    found = {}
    for title, (pages, settings) in columns(options).items():
        extra = [] if pages is None else ["--num-gpu-blocks-override", str(pages)]
        with at.serving(title, settings, extra) as (server, client):
            before = counted(server.base_url)
            done = at.told(title, options.teams * len(ROLES))
            times: list[list[float]] = [[] for _ in ROLES]
            tokens = 0
            for agent, answer in Teams.of(options).rounds(client, range(len(ROLES))):
                times[agent].append(first_token(answer))
                tokens += answer.prompt_tokens
                done()
            after = counted(server.base_url)
            row = {"ttft_ms": times, "prompt_tokens": tokens}
            found[title] = row | {name: after[name] - before[name] for name in after}
    return found


def show(console: Console, found: dict[str, Any]) -> None:
    table = Table("", "TTFT, sum", "fifth agent", "reused or local", "against plain")
    plain = sum(map(sum, found[PLAIN]["ttft_ms"])) if PLAIN in found else None
    for title, row in found.items():
        total = sum(map(sum, row["ttft_ms"]))
        share = (row["local"] + row["reused"]) / row["prompt_tokens"]
        fifth = statistics.median(row["ttft_ms"][-1])
        known = f"{share:.1%}" if row["computed"] else ""
        sooner = f"{plain / total:.2f}x" if plain else ""
        table.add_row(title, f"{total / 1e3:.1f} s", f"{fifth:.0f} ms", known, sooner)
    console.print(table)


def main() -> None:
    parser = asked_for(__doc__, teams=20)
    parser.add_argument("--pages", type=int, default=380, help="of 32 tokens in the small cache")
    parser.add_argument("--columns", nargs="+", help="of the table, if not all")
    parser.add_argument("--disk", type=Path, help="keep pages in this folder, too")
    options = parser.parse_args()
    with bench(options) as at:
        found = measure(options, at)
    show(Console(), found)
    write(options, ("teams", "words", "tokens", "pages", "host_gb"), found)


if __name__ == "__main__":
    main()
