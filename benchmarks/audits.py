# SPDX-License-Identifier: Apache-2.0
"""What an engine does while it is idle (audits, lessons, healing): what it costs those who are
served.

Two servers that differ in that alone, and correct nothing, take turns: blocks of requests with the
same texts at the same random moments. What is left to do after a block is waited for.

``python benchmarks/audits.py --model DIR [--blocks N] [--texts N] [--gap SECONDS] [--json F]``
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pairs import added_by
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvcomm_vllm.cli.machine import describe_machine, describe_versions
from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.evaluation.serving.client import ChatClient
from kvcomm_vllm.evaluation.serving.counters import KVCommMeter
from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals
from kvcomm_vllm.evaluation.serving.screen import progress_bar, started
from kvcomm_vllm.evaluation.serving.server import stop_at_sigterm

WORDS = (
    *("river", "stone", "amber", "candle", "market", "winter", "engine", "paper", "garden"),
    *("silver", "bridge", "signal", "copper", "harbor", "letter", "window", "forest"),
)
COLUMNS: dict[str, dict[str, Any]] = {
    "silent": {"audits": False, "heal": "off"},
    "auditing": {},
}
READERS = ("writer", "critic", "editor", "lawyer", "clerk")
ASKED = (
    "blocks",
    "texts",
    "readers",
    "words",
    "pause",
    "gap",
    "idle",
    "tokens",
    "seed",
    "server_arg",
)
# Never corrected, so that nothing else differs.
SETTINGS = {"min_anchors": 1000, "max_anchors": 1000, "anchor_seam_tokens": 16}


def messages(role: str, text: str) -> list[dict[str, str]]:
    system = f"You are the {role} of a team. " + f"The {role} is brief. " * 20
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def block(client: ChatClient, options: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """Times to the first and the last token, ms: texts arrive at random, some agents read each."""
    rng = random.Random(seed)
    times = []
    for _ in range(options.texts):
        text = " ".join(rng.choice(WORDS) for _ in range(options.words))
        time.sleep(rng.uniform(0, 2 * options.pause))
        for role in READERS[: options.readers]:
            time.sleep(rng.expovariate(1 / options.gap))
            answer = client.stream(messages(role, text), options.tokens)
            assert answer.ttft_ms is not None  # a stream has one
            times.append((answer.ttft_ms, answer.total_ms))
    return times


def counted(url: str) -> dict[str, float]:
    """Lessons by how they ended, and seconds of idle time that took."""
    page = read_page(url) or ""
    lessons = totals(page, "vllm:kvcomm_lessons_total", "outcome")
    return {
        **{name: lessons.get(name, 0) for name in ("queued", "learned", "healed", "dropped")},
        "seconds": totals(page, "vllm:kvcomm_seconds_total", "phase").get("learning", 0),
        "pieces": totals(page, "vllm:kvcomm_runs_total", "phase").get("learning", 0),
    }


@contextmanager
def column(
    name: str, options: argparse.Namespace, folder: Path, progress: Progress
) -> Iterator[tuple[str, ChatClient]]:
    """A server of its own, and a client of it."""
    config = folder / f"{name}.yaml"
    idle = {"audit_idle_seconds": options.idle}
    config.write_text(yaml.safe_dump({**SETTINGS, **idle, **COLUMNS[name]}))
    log = folder / f"{name}.log"
    with (
        started(
            f"vLLM with kvcomm, {name}",
            options.model,
            log,
            progress,
            config=config,
            extra=options.server_arg,
        ) as server,
        closing(ChatClient(server.base_url, served_name(options.model))) as client,
    ):
        yield server.base_url, client


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        progress = stack.enter_context(progress_bar(Console(stderr=True)))
        servers = {
            name: stack.enter_context(column(name, options, folder, progress)) for name in COLUMNS
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in COLUMNS}
        for number in range(-1, options.blocks):  # the first one warms everything up
            for name in list(COLUMNS)[:: 1 if number % 2 else -1]:
                url, client = servers[name]
                seed = 1000 * options.seed + 1 + number
                found = block(client, options, seed)
                if number >= 0:
                    times[name] += found
                KVCommMeter(url).settle(limit=600)
        return {**times, **counted(servers["auditing"][0])}


def show(
    console: Console, what: str, silent: list[float], auditing: list[float], readers: int
) -> None:
    table = Table("", "mean", "median", "p90", title=f"{what}, ms")
    for column, times in zip(COLUMNS, (silent, auditing), strict=True):
        p90 = statistics.quantiles(times, n=10)[-1]
        table.add_row(
            column, *(f"{x:.1f}" for x in (statistics.mean(times), statistics.median(times), p90))
        )
    console.print(table)
    # the requests of a text belong together
    added = added_by(auditing, silent, together=readers)
    console.print(f"Median of paired differences: {added.middle:+.1f} ms")
    console.print(f"Added in all: {added.share}")
    if added.between:
        console.print(f"95% interval: {added.between}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", type=int, default=4, help="of each kind")
    parser.add_argument("--texts", type=int, default=5, help="in a block")
    parser.add_argument(
        "--readers", type=int, default=2, help=f"of each text, up to {len(READERS)}"
    )
    parser.add_argument("--words", type=int, default=400, help="of each text")
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds before each text")
    parser.add_argument("--gap", type=float, default=2.0, help="mean seconds between requests")
    parser.add_argument("--idle", type=float, default=5.0, help="audit_idle_seconds")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-arg", action="append", default=[], help="passed to vllm serve")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stop_at_sigterm()
    found = measure(options)
    console = Console()
    for index, what in enumerate(("Time to first token", "Time to last token")):
        silent, auditing = ([pair[index] for pair in found[column]] for column in COLUMNS)
        show(console, what, silent, auditing, options.readers)
    console.print({key: found[key] for key in ("queued", "learned", "healed", "pieces", "seconds")})
    if options.json:
        conditions = {
            **{key: getattr(options, key) for key in ASKED},
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"conditions": conditions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
