# SPDX-License-Identifier: Apache-2.0
"""Time to first token of cooperating agents: plain vLLM against kvcomm, interleaved in one run.

Two engines in processes of their own, same settings; every figure is the wall time of
``LLM.generate`` for one token.

five agents   512-token agent prefix, 1,024-token question, 512 tokens from each earlier agent,
              short texts between (the paper's setting). An agent's message is appended to its
              prompt and prefilled, which puts the same KV into the same place as decoding it
              would, in a twentieth of the time.
all reused    another agent hears what the fifth one has heard; nothing but its last token is new.
group chat    256-token agent prefix, a 3,072-token transcript that the previous speaker's request
              holds.
8 at once     eight fifth agents of eight teams, sent together: time until all have their first
              token.
nothing       1,546 tokens that nobody shares: what the plugin costs where it cannot help.

"plain hit" is the same prompt once more on plain vLLM: its own prefix cache has all of it.
Tokens are random, so nothing is shared by accident. ``python benchmarks/agents.py --model DIR
[--repeats N] [--json F]``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm import LLM, SamplingParams, __version__
from vllm.config import KVTransferConfig

PREFIX, QUESTION, MESSAGE, GAP, TAIL = 512, 1024, 512, 15, 10
CHAT_PREFIX, TRANSCRIPT = 256, 3072
MODES: dict[str, dict[str, Any]] = {
    "rotate": {"mode": "rotate"},
    "seam4": {"mode": "seam", "seam_tokens": 4},
    "seam": {"mode": "seam"},
}
EIGHT = ("plain warm", "rotate", "seam")  # more teams of eight do not fit into the KV cache
# vLLM's processes poll their shared memory for a second after the last request (SpinCondition), on
# cores that the other engine would need.
SPIN_SECONDS = 1.2
AGENTS = range(1, 6)

Times = dict[tuple[str, str], list[float]]


class Driver:
    """Sends one request at a time and notes how long it took."""

    def __init__(self, model: str, eager: bool, block_size: int) -> None:
        options: dict[str, Any] = {
            "model": model,
            "block_size": block_size,
            "max_model_len": 8192,
            "enforce_eager": eager,
            "disable_log_stats": True,
        }
        self.plain = LLM(**options)
        self.kvcomm = LLM(
            kv_transfer_config=KVTransferConfig(
                kv_connector="kvcomm",
                kv_role="kv_both",
                kv_connector_extra_config={"mode": "seam"},  # nothing is learned beside the clock
            ),
            **options,
        )
        self.times: Times = defaultdict(list)
        self.reports: dict[tuple[str, str], dict[str, Any]] = {}

    def ask(
        self, column: str, row: str | None, *prompts: list[int], salt: str | None = None
    ) -> None:
        """One token for each prompt, sent together; counted under (row, column) unless row is
        None.
        """
        is_plain = column.startswith("plain")
        llm = self.plain if is_plain else self.kvcomm
        hints = {"kvcomm": MODES.get(column, MODES["seam"])}
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            ignore_eos=True,
            extra_args=None if is_plain else {"kv_transfer_params": hints},
        )
        requests: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in prompts]
        for request in requests:
            if salt is not None:
                request["cache_salt"] = salt
        if row is not None:
            time.sleep(SPIN_SECONDS)
        began = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        elapsed = 1e3 * (time.perf_counter() - began)
        if len(outputs) != len(prompts) or not all(o.outputs[0].token_ids for o in outputs):
            raise RuntimeError(f"{len(prompts)} requests sent, {len(outputs)} answered")
        output = outputs[-1]
        if row is not None:
            self.times[row, column].append(elapsed)
            report = (output.kv_transfer_params or {}).get("kvcomm", {})
            keep = ("prompt_tokens", "local", "reused", "computed", "seam", "gap", "declined")
            self.reports[row, column] = {key: report[key] for key in keep if key in report}


def random_text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(length)]


def five_agents(driver: Driver, rng: random.Random, name: str) -> None:
    prefixes = {i: random_text(rng, PREFIX) for i in AGENTS}
    question = random_text(rng, QUESTION)
    gaps = {i: random_text(rng, GAP) for i in AGENTS}
    messages = {i: random_text(rng, MESSAGE) for i in AGENTS}
    tail = random_text(rng, TAIL)
    for i in AGENTS:  # agents have answered other questions before
        for column in ("plain warm", *MODES):
            driver.ask(column, None, prefixes[i] + random_text(rng, 3), salt=_salt(name, column))
    for i in AGENTS:
        said = [token for j in range(1, i) for token in gaps[j] + messages[j]]
        prompt = prefixes[i] + question + said + tail
        row = f"agent {i}"
        driver.ask("plain", row, prompt, salt=f"{name} plain {i}")
        for column in rng.sample(["plain warm", *MODES], 1 + len(MODES)):
            salt = _salt(name, column)
            driver.ask(column, row, prompt, salt=salt)
            driver.ask(column, None, prompt + messages[i] + [7], salt=salt)
        driver.ask("plain hit", row, prompt, salt=_salt(name, "plain warm"))
    all_reused(driver, rng, name, question + said + tail)


def all_reused(driver: Driver, rng: random.Random, name: str, heard: list[int]) -> None:
    """One more agent hears exactly what agent 5 has heard: only its last token is computed."""
    prefix = random_text(rng, PREFIX)
    prompt = prefix + heard
    for column in ("plain warm", "rotate"):
        salt = _salt(name, column)
        driver.ask(column, None, prefix + random_text(rng, 3), salt=salt)
        driver.ask(column, "all reused", prompt, salt=salt)
    driver.ask("plain hit", "all reused", prompt, salt=_salt(name, "plain warm"))


def group_chat(driver: Driver, rng: random.Random, name: str) -> None:
    speakers = [random_text(rng, CHAT_PREFIX) for _ in range(2)]
    transcript, tail = random_text(rng, TRANSCRIPT), random_text(rng, TAIL)
    for column in ("plain warm", *MODES):
        salt = _salt(name, column)
        for speaker in speakers:
            driver.ask(column, None, speaker + random_text(rng, 3), salt=salt)
        driver.ask(column, None, speakers[0] + transcript + tail, salt=salt)
    prompt = speakers[1] + transcript + tail
    driver.ask("plain", "group chat", prompt, salt=f"{name} plain chat")
    for column in ("plain warm", *MODES):
        driver.ask(column, "group chat", prompt, salt=_salt(name, column))
    driver.ask("plain hit", "group chat", prompt, salt=_salt(name, "plain warm"))


def eight_at_once(driver: Driver, rng: random.Random, name: str) -> None:
    prefixes = [random_text(rng, PREFIX) for _ in range(2)]
    between, tail = random_text(rng, GAP), random_text(rng, TAIL)
    prompts = []
    for _ in range(8):
        heard = random_text(rng, QUESTION + 3 * (GAP + MESSAGE))
        message = random_text(rng, MESSAGE)
        for column in EIGHT:  # the fourth agent has read it all, and has answered
            said = prefixes[0] + heard + tail + message + [7]
            driver.ask(column, None, said, salt=_salt(name, column))
        prompts.append(prefixes[1] + heard + between + message + tail)
    for column in EIGHT:
        salt = _salt(name, column)
        driver.ask(column, None, prefixes[1] + random_text(rng, 3), salt=salt)
        driver.ask(column, "8 at once", *prompts, salt=salt)


def nothing_shared(driver: Driver, rng: random.Random) -> None:
    for column in rng.sample(["plain", "seam"], 2):
        driver.ask(column, "nothing", random_text(rng, PREFIX + QUESTION + TAIL))


def _salt(name: str, column: str) -> str:
    return f"{name} {column}"


def measure(driver: Driver, repeats: int, seed: int) -> None:
    rng = random.Random(seed)
    five_agents(driver, rng, "warm-up")
    driver.times.clear()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=repeats)
        for repeat in range(repeats):
            five_agents(driver, rng, f"five {repeat}")
            group_chat(driver, rng, f"chat {repeat}")
            for _ in range(3):
                nothing_shared(driver, rng)
            progress.advance(task)
        eight_at_once(driver, rng, "eight")


def summary(driver: Driver) -> list[dict[str, Any]]:
    """Medians in ms; ratios are medians of ratios within a repeat, so that drift of the machine
    cancels.
    """
    rows = []
    for row in [
        *(f"agent {i}" for i in AGENTS),
        "all reused",
        "group chat",
        "8 at once",
        "nothing",
    ]:
        columns = {c: t for (r, c), t in driver.times.items() if r == row}
        entry: dict[str, Any] = {
            "row": row,
            "ms": {c: statistics.median(t) for c, t in columns.items()},
        }
        for base in ("plain", "plain warm"):
            if base in columns:
                entry[f"{base} /"] = {
                    c: statistics.median(a / b for a, b in zip(columns[base], t, strict=True))
                    for c, t in columns.items()
                    if not c.startswith("plain")
                }
        entry["tokens"] = {
            c: driver.reports[row, c] for c in columns if driver.reports.get((row, c))
        }
        rows.append(entry)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = ["plain", "plain warm", *MODES, "plain hit"]
    table = Table(
        title="Time to first token, ms (median); x = times faster than plain, prefix warm"
    )
    for column in ["", "tokens", "reused", "computed", *columns, *(f"{mode} x" for mode in MODES)]:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        tokens = row["tokens"].get("seam") or row["tokens"].get("rotate", {})
        ratios = row.get("plain warm /", row.get("plain /", {}))
        table.add_row(
            row["row"],
            *(str(tokens.get(key, "")) for key in ("prompt_tokens", "reused", "computed")),
            *(f"{row['ms'][c]:.0f}" if c in row["ms"] else "" for c in columns),
            *(f"{ratios[c]:.2f}" if c in ratios else "" for c in MODES),
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    driver = Driver(options.model, not options.compiled, options.block_size)
    measure(driver, options.repeats, options.seed)
    rows = summary(driver)
    show(rows)
    if options.json:
        conditions = {
            "vllm": __version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            **{key: str(value) for key, value in vars(options).items() if key != "json"},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
