# SPDX-License-Identifier: Apache-2.0
"""A real server for the tests of a module, agents that talk to it, and its counters."""

from __future__ import annotations

import random
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from kvcomm_vllm.evaluation.serving.server import Server

WORDS = [
    *("river", "stone", "amber", "candle", "market", "winter", "engine", "paper", "garden"),
    *("silver", "bridge", "mountain", "signal", "copper", "harbor", "letter", "window", "forest"),
]
# Servers of two tests run at once: with room for anchors of a few texts they fit into 16 GB.
FRUGAL = "anchor_memory_mb: 256\n"
# the server does nothing that no test has asked for
QUIET = f"audits: false\nheal: off\n{FRUGAL}"
PATIENCE_SECONDS = 60.0
# On one GPU vLLM's worker has no process of its own; told by name a server has none on a CPU
# either, and starts a third sooner.
AS_ON_ONE_GPU = "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor"
OURS = "vllm:kvcomm_"
VLLM_LABELS = ("model_name", "engine")


def story(seed: int, words: int = 320) -> str:
    """Text that no other seed shares a sentence with."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


@dataclass(frozen=True)
class Agents:
    """Clients of one server; each question goes out as an agent with a role of its own."""

    server: Server
    client: OpenAI
    model: str

    def ask(self, role: str, shared: str, tokens: int = 6, **options: Any) -> Any:
        """A greedy chat completion: the agent's role, then the shared text and a question."""
        return self.client.chat.completions.create(
            model=self.model,
            messages=[
                {"role": "system", "content": f"{role} " * 12},
                {"role": "user", "content": f"{shared}\nWhat does the {role} say?"},
            ],
            max_tokens=tokens,
            **{"temperature": 0, **options},
        )

    def counters(self) -> Counter[str]:
        """Our counters: ``"tokens/reused"`` -> value."""
        found: Counter[str] = Counter()
        for sample in self._samples():
            if sample.name.startswith(OURS) and sample.name.endswith("_total"):
                name = sample.name.removeprefix(OURS).removesuffix("_total")
                (label,) = (v for k, v in sample.labels.items() if k not in VLLM_LABELS)
                found[f"{name}/{label}"] += int(sample.value)
        return found

    def running(self) -> int:
        """Requests the engine holds."""
        return sum(
            int(sample.value)
            for sample in self._samples()
            if sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting")
        )

    def _samples(self) -> Iterator[Any]:
        with urllib.request.urlopen(f"{self.server.base_url}/metrics") as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            yield from family.samples

    def post(self, path: str) -> int:
        request = urllib.request.Request(f"{self.server.base_url}{path}", method="POST")
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)


def report(answer: Any) -> dict[str, Any]:
    """What the plugin says about a request in its response."""
    given: dict[str, Any] = answer.kv_transfer_params["kvcomm"]
    return given


def wait_until(true: Callable[[], bool]) -> bool:
    """Counters reach ``/metrics`` a moment after the response."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
