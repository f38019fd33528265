# SPDX-License-Identifier: Apache-2.0
"""What a server shows of itself: counters and gauges, the memory of its processes, its log."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals
from kvcomm_vllm.evaluation.serving.server import Server

ADDED = re.compile(r"Added request (\S+?)\.?$", re.MULTILINE)
PREEMPTED = "vllm:num_preemptions_total"
WRONG = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback|AssertionError")
# What vLLM 0.32 itself writes: a 404 is logged as an error; an echo with log-probabilities that
# is aborted before it has any ends with a traceback and HTTP 500.
KNOWN = re.compile(
    r"^.*The model `another` does not exist.*$"
    r"|^ERROR: +Exception in ASGI application\nTraceback(?:.*\n)(?: .*\n)*?"
    r".*_create_completion_logprobs\n(?: .*\n)*IndexError: list index out of range$",
    re.MULTILINE,
)
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Reading:
    """One look at ``/metrics``; an empty page reads as nothing."""

    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lessons: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    preemptions: int = 0
    alive: int = 0
    usage: float = 0.0

    @property
    def prompt_tokens_treated(self) -> int:
        return sum(self.tokens[kind] for kind in ("local", "reused", "computed"))

    @property
    def aborted(self) -> int:
        """Requests that ended in no way of their own."""
        return self.requests.total() - sum(self.finished[how] for how in ("stop", "length"))


def read(base_url: str) -> Reading:
    page = read_page(base_url) or ""

    def count(name: str, label: str = "") -> Counter[str]:
        return Counter({key: int(value) for key, value in totals(page, name, label).items()})

    running, waiting = count("vllm:num_requests_running"), count("vllm:num_requests_waiting")
    return Reading(
        requests=count("vllm:kvcomm_requests_total", "outcome"),
        tokens=count("vllm:kvcomm_tokens_total", "treatment"),
        reasons=count("vllm:kvcomm_reasons_total", "reason"),
        lessons=count("vllm:kvcomm_lessons_total", "outcome"),
        finished=count("vllm:request_success_total", "finished_reason"),
        prompt_tokens=count("vllm:prompt_tokens_total").total(),
        preemptions=count(PREEMPTED).total(),
        alive=running.total() + waiting.total(),
        usage=sum(totals(page, "vllm:kv_cache_usage_perc").values()),
    )


def memory_mb(server: Server) -> dict[str, float]:
    """Resident memory of the server's processes by title, in MB; equal titles are added up."""
    found: Counter[str] = Counter()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) != server.pid:
                continue
            title = (folder / "comm").read_text().strip()
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        found[title] += pages * PAGE
    return {title: round(size / 1e6, 1) for title, size in found.items()}


def wrong_lines(path: Path) -> list[str]:
    """Lines of a log that no server should write."""
    text = KNOWN.sub("", path.read_text(errors="replace"))
    return [line for line in text.splitlines() if WRONG.search(line)]


class Log:
    """The requests in a server's log, which is read piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.added = 0  # requests handed to the engine so far

    def follow(self) -> None:
        with self._path.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        self.added += len(ADDED.findall(new.decode(errors="replace")))
