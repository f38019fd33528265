# SPDX-License-Identifier: Apache-2.0
"""What it costs those who are served that pages are stored: kvcomm without tiers, with a host pool,
and with a disk behind it take turns with the same requests.

``python benchmarks/tiers_storing.py --model DIR [--teams N] [--rest SECONDS] [--json F]``

All servers stand at once, one works. Team after team speaks to each of them, in another order each
time; nothing leaves the KV cache, so nothing comes back. Asked for: at most 3% are added.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from typing import Any

from pairs import added_by
from tiers_work import (
    COUNTS,
    QUIET,
    ROLES,
    Bench,
    Teams,
    asked_for,
    bench,
    counted,
    first_token,
    write,
)

from kvcomm_vllm.cli.failure import UserError
from kvcomm_vllm.evaluation.report.table import markdown
from kvcomm_vllm.evaluation.serving.client import ChatClient
from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals

OFF, HOST, DISK = "without tiers", "host pool", "host pool and disk"
KINDS = ("ttft_ms", "total_ms")


def columns(options: argparse.Namespace, at: Bench) -> dict[str, dict[str, Any]]:
    """Settings of each server by its title."""
    pool = {"host_gb": options.host_gb}
    disk = {**pool, "disk_path": str(at.folder / "kv")}
    return {OFF: QUIET, HOST: QUIET | {"tiers": pool}, DISK: QUIET | {"tiers": disk}}


def room(url: str) -> int:
    """Tokens for which the KV cache has pages."""
    info = "vllm:cache_config_info"
    page = read_page(url) or ""
    # both stand in labels of a sample whose value says nothing
    pages, size = (next(iter(totals(page, info, of))) for of in ("num_gpu_blocks", "block_size"))
    return int(pages) * int(size)


def block(client: ChatClient, teams: Teams, team: int) -> list[tuple[float, float]]:
    """All agents of a team: times to the first and last token, ms."""
    answers = [teams.speak(client, team, agent) for agent in range(len(ROLES))]
    return [(first_token(one), one.total_ms) for one in answers]


def measure(options: argparse.Namespace, at: Bench) -> dict[str, Any]:
    with ExitStack() as stack:
        servers = {
            title: stack.enter_context(at.serving(title, settings))
            for title, settings in columns(options, at).items()
        }
        before = {title: counted(server.base_url) for title, (server, _) in servers.items()}
        teams = {title: Teams.of(options) for title in servers}
        served: dict[str, list[tuple[float, float]]] = {title: [] for title in servers}
        done = at.told("teams", options.teams * len(servers))
        order = list(servers)
        for team in range(options.teams):
            turn = team % len(order)
            for title in order[turn:] + order[:turn]:
                served[title] += block(servers[title][1], teams[title], team)
                time.sleep(options.rest)  # what is still being copied is nobody else's cost
                done()
        found = {}
        for title, (server, _) in servers.items():
            after = counted(server.base_url)
            asked = sum(after[name] for name in COUNTS) + len(served[title]) * options.tokens
            if after["returned_pages"] or asked > room(server.base_url):
                raise UserError("Not everything had room in the KV cache: ask for fewer --teams.")
            counts = {name: after[name] - before[title][name] for name in after}
            first, last = zip(*served[title], strict=True)
            found[title] = {"ttft_ms": first, "total_ms": last, **counts}
        return found


def table(found: dict[str, Any]) -> str:
    """What is added to kvcomm without tiers."""
    rows = []
    for title in (HOST, DISK):
        row = found[title]
        for kind, what in zip(KINDS, ("first token", "last token"), strict=True):
            times = row[kind]
            # the requests of a team belong together
            added = added_by(times, found[OFF][kind], together=len(ROLES))
            mean = sum(found[OFF][kind]) / len(times)
            cells = [f"{mean:.0f} ms", f"{added.middle:+.1f} ms", added.share, added.between]
            rows.append([title, what, *cells, f"{row['stored_gb']:.2f} GiB"])
    head = ["", "time to", "mean without", "median of differences", "added", "95%", "stored"]
    return markdown(head, rows, labels=2)


def main() -> None:
    parser = asked_for(__doc__, teams=12)
    parser.add_argument("--rest", type=float, default=2.0, help="seconds after each team")
    parser.set_defaults(host_gb=2.0)  # twice, beside three caches
    options = parser.parse_args()
    with bench(options) as at:
        found = measure(options, at)
    print(table(found))
    write(options, ("teams", "words", "tokens", "host_gb", "rest"), found)


if __name__ == "__main__":
    main()
