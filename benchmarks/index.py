# SPDX-License-Identifier: Apache-2.0
"""What the block-hash index costs: search in a long prompt, and upkeep, by stored sequences.

Run: python benchmarks/index.py [--json FILE] [--prompt-tokens N] [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex

VOCABULARY = 49_152
BLOCK = 16
STORES = (1_000, 10_000)
SPANS = (0, 1, 8, 64)
NAMESPACE = b"benchmark"
SYSTEM_PROMPTS, SYSTEM_TOKENS = 20, 200  # stored sequences come from this many agents
I32 = NDArray[np.int32]
Row = dict[str, float | int | str]
T = TypeVar("T")


def tokens(rng: np.random.Generator, count: int) -> I32:
    return rng.integers(0, VOCABULARY, count, dtype=np.int32)


def add(index: SequenceIndex, text: I32, owner: str) -> Sequence:
    blocks = len(text) // BLOCK
    hashes = [b"%032d" % block for block in range(blocks)]
    return index.add(NAMESPACE, text[: blocks * BLOCK], hashes, len(text), None, True, owner)


def fill(count: int, rng: np.random.Generator) -> tuple[SequenceIndex, list[Sequence], float]:
    """An index of `count` sequences of 500 to 3,000 tokens, and the seconds one `add` took."""
    index = SequenceIndex(BLOCK)
    system = [tokens(rng, SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    texts = [
        np.concatenate([system[i % SYSTEM_PROMPTS], tokens(rng, int(rng.integers(300, 2800)))])
        for i in range(count)
    ]
    seconds = []
    sequences = []
    for i, text in enumerate(texts):
        began = time.perf_counter()
        sequences.append(add(index, text, str(i)))
        seconds.append(time.perf_counter() - began)
    return index, sequences, float(np.median(seconds))


def prompt(rng: np.random.Generator, stored: list[Sequence], spans: int, length: int) -> I32:
    """`length` tokens, `spans` stretches of 100 to 400 of which are stored, the rest new text."""
    pieces: list[I32] = []
    room = length // max(1, spans)
    for _ in range(spans):
        source = stored[int(rng.integers(len(stored)))].tokens[SYSTEM_TOKENS:]
        size = min(int(rng.integers(100, 400)), len(source))
        begin = int(rng.integers(0, len(source) - size + 1))
        pieces += [tokens(rng, room - size), source[begin : begin + size]]
    pieces.append(tokens(rng, length - sum(map(len, pieces))))
    return np.concatenate(pieces)


def median_ms(call: Callable[[T], object], arguments: Iterable[T]) -> float:
    """Each argument once, so that no measurement finds the last one's memory in the caches."""
    seconds = []
    for each in arguments:
        began = time.perf_counter()
        call(each)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) * 1e3


def worst_cases(rng: np.random.Generator, length: int) -> dict[str, tuple[SequenceIndex, I32]]:
    """Input made to be slow."""
    equal = SequenceIndex(BLOCK)
    for i in range(100):
        add(equal, np.zeros(3000, np.int32), str(i))
    periodic = SequenceIndex(BLOCK)
    period = tokens(rng, 37)
    for i in range(100):
        add(periodic, np.resize(period, 3000), str(i))
    everywhere = SequenceIndex(BLOCK)
    text = tokens(rng, length)
    for shift in range(BLOCK):
        add(everywhere, text[shift:], str(shift))
    system = SequenceIndex(BLOCK)
    shared = tokens(rng, SYSTEM_TOKENS)
    for i in range(10_000):
        own = tokens(rng, 56)
        add(system, np.concatenate([shared, own]), str(i))
    return {
        "all tokens equal": (equal, np.zeros(length, np.int32)),
        "period of 37 tokens": (periodic, np.resize(period, length)),
        "a stored window at every offset": (everywhere, text),
        "one system prompt in 10,000": (
            system,
            np.concatenate([shared, tokens(rng, length - 200)]),
        ),
    }


def searches(index: SequenceIndex, prompts: list[I32], count: int, spans: int) -> Row:
    """`find` and `leading` on fresh prompts, the median of each."""
    return {
        "sequences": count,
        "spans": spans,
        "matches": float(np.mean([len(index.find(NAMESPACE, p, 0, 32)) for p in prompts[:3]])),
        "find_ms": median_ms(lambda p: index.find(NAMESPACE, p, 0, 32), prompts),
        "leading_ms": median_ms(lambda p: index.leading(NAMESPACE, p), prompts),
    }


def measure(length: int, repeats: int) -> dict[str, list[Row]]:
    """All tables of this benchmark, by title."""
    rng = np.random.default_rng(0)
    search: list[Row] = []
    upkeep: list[Row] = []
    for count in STORES:
        index, stored, add_seconds = fill(count, rng)
        for spans in SPANS:
            prompts = [prompt(rng, stored, spans, length) for _ in range(repeats)]
            search.append(searches(index, prompts, count, spans))
        upkeep.append(
            {
                "sequences": count,
                "add_us": add_seconds * 1e6,
                "drop_us": 1e3 * median_ms(index.drop, stored[:200]),
                "index_bytes_per_token": index.bytes_per_token,
            }
        )
    took = {(row["sequences"], row["spans"]): float(row["find_ms"]) for row in search}
    growth: Row = {f"{n} spans": took[STORES[1], n] / took[STORES[0], n] for n in SPANS}
    worst: list[Row] = [
        {"input": name, "find_ms": searches(index, [text] * 5, len(index), 0)["find_ms"]}
        for name, (index, text) in worst_cases(rng, length).items()
    ]
    return {
        f"Search in a prompt of {length} tokens": search,
        f"find_ms with {STORES[1]} sequences / with {STORES[0]}": [growth],
        "Upkeep per sequence": upkeep,
        "Input made to be slow": worst,
    }


def show(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--prompt-tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    tables = measure(options.prompt_tokens, options.repeats)
    console = Console()
    for title, rows in tables.items():
        show(console, title, rows)
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
