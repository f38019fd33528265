# SPDX-License-Identifier: Apache-2.0
"""Milliseconds and launches of loads and side forwards, and a reused prompt beside an exact hit.

    python tools/gpu_proof/steps.py --model FOLDER [--options JSON] RESULTS

Each time is the median of calls that wait for the device; `host` is how long the call itself took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpu_proof.engine import Engine
from gpu_proof.timeline import draw, profiled
from kvcomm_vllm.messages import HoleOp, LoadOp, RequestOps, StepMessage

LENGTHS = (16, 64, 512, 2048)
SPANS = 5
REQUESTS = (1, 8)
SPAN_TOKENS = 128
PREFIX, SHARED, TAIL = 512, 3072, 16


def median_ms(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """``host``: until the call returns; ``all``: until the device is done."""
    run()  # what is compiled or allocated once
    host, both = [], []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        run()
        host.append(time.perf_counter() - began)
        wait()
        both.append(time.perf_counter() - began)
    return {
        "host": round(statistics.median(host) * 1e3, 3),
        "all": round(statistics.median(both) * 1e3, 3),
    }


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Steps:
    """Messages as the scheduler half sends them, given to the worker half by hand."""

    def __init__(self, engine: Engine, repeats: int) -> None:
        self.engine = engine
        self.repeats = repeats

    def run(self, requests: list[RequestOps]) -> None:
        """A step.

        Raises:
            RuntimeError: the worker could not do it.
        """
        worker = self.engine.worker
        worker.run(StepMessage(requests))
        report = worker.take_report()
        worker.take_lost_blocks()
        if report is None or report.failed:
            raise RuntimeError("a step failed; the log says why")

    def hole(self, tokens: int) -> RequestOps:
        words = self.engine.text(tokens, tokens)
        return RequestOps(f"hole {tokens}", self.engine.pages(tokens), [], [HoleOp(0, words)])

    def loads(self, name: str, spans: int, tokens: int) -> RequestOps:
        sources = self.engine.pages(tokens)
        loads = [LoadOp(sources, 0, 0, n * tokens, tokens) for n in range(spans)]
        return RequestOps(name, self.engine.pages(spans * tokens), loads, [])

    def times(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for length in LENGTHS:
            hole, load = self.hole(length), self.loads(f"load {length}", 1, length)
            for name, one in (("side forward", hole), ("load", load)):
                key = f"{name} of {length} tokens, ms"
                found[key] = median_ms(partial(self.run, [one]), self.repeats)
        return found

    def launches(self) -> dict[str, Any]:
        found = {}
        for count in REQUESTS:
            ops = [self.loads(f"request {n}", SPANS, SPAN_TOKENS) for n in range(count)]
            self.run(ops)
            found[f"loads of {count} x {SPANS} spans"] = profiled(partial(self.run, ops))
        return found

    def reused(self, prefix: int, shared: int) -> dict[str, Any]:
        """A prompt that is reused but for its own prefix and last page, the same prompt as an exact
        hit, and all of it computed.
        """
        times: dict[str, list[float]] = {"reused": [], "exact hit": [], "computed": []}
        share = 0.0
        for number in range(self.repeats):
            text = self.engine.text(number, shared)
            own = self.engine.text(-1, prefix)
            tail = self.engine.text(-2, TAIL)
            salt = f"task {number}"
            self.engine.ask(self.engine.text(-3, prefix) + text + tail, "off", salt)
            self.engine.ask(own, "off", salt)  # an agent's own instructions are in the cache
            prompt = own + text + tail
            for name, mode, of in (
                ("reused", "rotate", salt),
                ("exact hit", "rotate", salt),
                ("computed", "off", f"nobody {number}"),
            ):
                began = time.perf_counter()
                report = self.engine.ask(prompt, mode, of)
                times[name].append(time.perf_counter() - began)
                if name == "reused":
                    share = report["reused"] / report["prompt_tokens"]
        medians = {
            f"{name}, ms": round(statistics.median(found) * 1e3, 2) for name, found in times.items()
        }
        ratio = statistics.median(times["reused"]) / statistics.median(times["exact hit"])
        return {**medians, "reused share": round(share, 3), "times an exact hit": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="of vLLM's LLM, as JSON")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0, help="of the reused prompt's length")
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    steps = Steps(Engine.start(args.model, args.options), args.repeats)
    trace = args.results.with_suffix(".trace.json")
    found = {**steps.times(), **steps.launches()}
    found["prompt"] = steps.reused(int(PREFIX * args.scale), int(SHARED * args.scale))
    one = [steps.loads("trace", SPANS, SPAN_TOKENS), steps.hole(64)]
    profiled(partial(steps.run, one), trace)
    picture = args.results.with_suffix(".png")
    draw(
        json.loads(trace.read_text(encoding="utf-8")), picture, "a step with five spans and a hole"
    )
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
