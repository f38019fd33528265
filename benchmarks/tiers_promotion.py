# SPDX-License-Identifier: Apache-2.0
"""How fast pages come back from the host pool, against plain copies of the same bytes.

``python benchmarks/tiers_promotion.py --model DIR [--teams N] [--pages N] [--json F]``

Teams take turns in a cache that is too small for them, as in ``tiers.py``; the server counts bytes
and seconds of what comes back, beside the forwards. Then the same number of bytes is copied by
torch, in this process, while nothing else works: page by page and layer by layer, as they lie, and
all at once, by one thread, as the pool's pages are. A copy beside forwards has to share the cores
with them; these have not.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiers_work import QUIET, ROLES, Bench, Teams, asked_for, bench, counted, write

from kvcomm_vllm.cli.failure import UserError
from kvcomm_vllm.evaluation.report.table import markdown

COPIES = 5  # of which the fastest one counts
MOST_BYTES = 1 << 30
COPIED = {"returned": "returning", "stored": "storing"}


def measure(options: argparse.Namespace, at: Bench) -> dict[str, float]:
    """What the server's page says has come back from the pool, and been stored in it."""
    settings = QUIET | {"tiers": {"host_gb": options.host_gb}}
    extra = ["--num-gpu-blocks-override", str(options.pages)]
    with at.serving("host pool", settings, extra) as (server, client):
        done = at.told("host pool", options.teams * len(ROLES))
        for _ in Teams.of(options).rounds(client, range(len(ROLES))):
            done()
        found = counted(server.base_url)
    if not found["returned_pages"]:
        raise UserError("Nothing has come back: ask for more --teams, or fewer --pages.")
    return found


def plain_copies(pages: int, page_bytes: int, layers: int) -> dict[str, float]:
    """GiB/s of torch's copies of so many pages, from places in any order to others."""
    torch.set_num_threads(1)
    pages = max(1, min(pages, MOST_BYTES // page_bytes))
    part = page_bytes // layers
    # a cache has a tensor for each layer; the pool has the layers of a page side by side
    pool = torch.ones((pages, layers, part), dtype=torch.int8)
    cache = torch.zeros((layers, pages, part), dtype=torch.int8)
    targets = random.Random(0).sample(range(pages), pages)

    def by_page() -> None:
        for layer in range(layers):
            for page, target in enumerate(targets):
                cache[layer, target].copy_(pool[page, layer])

    flat = torch.zeros_like(pool)
    ways = {"page by page": by_page, "all at once": lambda: flat.copy_(pool)}
    size = pool.nbytes / 2**30
    return {name: size / fastest(way) for name, way in ways.items()}


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of it."""
    seconds = []
    for _ in range(COPIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def table(found: dict[str, Any]) -> str:
    host = found["host pool"]
    speeds = {name: host[f"{name}_gb"] / host[f"{doing}_seconds"] for name, doing in COPIED.items()}
    rows = [[f"pages {name}", f"{speed:.2f} GiB/s"] for name, speed in speeds.items()]
    rows += [[f"torch, {name}", f"{speed:.2f} GiB/s"] for name, speed in found["torch"].items()]
    return markdown(["", "speed"], rows, labels=1)


def main() -> None:
    parser = asked_for(__doc__, teams=10)
    parser.add_argument("--pages", type=int, default=95, help="of 32 tokens in the cache")
    options = parser.parse_args()
    with bench(options) as at:
        host = measure(options, at)
    page_bytes = round(host["returned_gb"] * 2**30 / host["returned_pages"])
    config = json.loads((Path(options.model) / "config.json").read_text())
    layers = config["num_hidden_layers"]
    copies = plain_copies(int(host["returned_pages"]), page_bytes, layers)
    found = {"host pool": host, "page_bytes": page_bytes, "torch": copies}
    print(table(found))
    write(options, ("teams", "words", "tokens", "pages", "host_gb"), found)


if __name__ == "__main__":
    main()
