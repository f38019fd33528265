# SPDX-License-Identifier: Apache-2.0
"""Teams of agents, and servers for them: what the benchmarks of tiers (``tiers*.py``) share."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Listing
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from kvcomm_vllm.cli.machine import describe_machine, describe_versions
from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.evaluation.serving.client import Answer, ChatClient
from kvcomm_vllm.evaluation.serving.counters import KVCommMeter
from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals
from kvcomm_vllm.evaluation.serving.screen import progress_bar, started
from kvcomm_vllm.evaluation.serving.server import Server, stop_at_sigterm
from kvcomm_vllm.evaluation.workloads.case import Message

ROLES = ("Reader", "Critic", "Planner", "Checker", "Writer")
WORDS = (
    *("river", "stone", "amber", "candle", "market", "winter", "engine", "paper", "garden"),
    *("silver", "bridge", "signal", "copper", "harbor", "letter", "window", "forest"),
)
COUNTS = ("local", "reused", "computed")
QUIET = {"audits": False, "heal": "off"}
MAX_TOKENS = 2048  # of a prompt and its answer; the smallest cache must hold them


def prompt(team: int, agent: int, said: list[str], words: int) -> list[Message]:
    """What an agent is asked, after so many of its team have spoken."""
    rng = random.Random(team)
    question = " ".join(rng.choice(WORDS) for _ in range(words))
    heard = "\n\n".join(f"{role} said: {text}" for role, text in zip(ROLES, said, strict=False))
    system = f"You are the {ROLES[agent]} of a team. " + f"The {ROLES[agent]} is brief. " * 5
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{question}\n\n{heard}\n\nWhat do you say?"},
    ]


def first_token(answer: Answer) -> float:
    """Time to it, ms."""
    assert answer.ttft_ms is not None  # a stream has one
    return answer.ttft_ms


@dataclass(frozen=True)
class Teams:
    """Teams of agents, and what they have said; all of one tenant.

    Args:
        words: of a question, about a token each.
        tokens: of an answer.
    """

    said: list[list[str]]
    words: int
    tokens: int
    salt: str = "teams"

    @classmethod
    def of(cls, options: argparse.Namespace, **given: Any) -> Teams:
        said: list[list[str]] = [[] for _ in range(options.teams)]
        return cls(**{"said": said, "words": options.words, "tokens": options.tokens, **given})

    def ask(self, client: ChatClient, team: int, agent: int) -> Answer:
        """An agent's question, as its team's talk stands; nothing is added to that."""
        messages = prompt(team, agent, self.said[team], self.words)
        return client.stream(messages, self.tokens, self.salt)

    def speak(self, client: ChatClient, team: int, agent: int) -> Answer:
        """An agent's question; its answer is quoted from now on."""
        answer = self.ask(client, team, agent)
        self.said[team].append(answer.text)
        return answer

    def rounds(self, client: ChatClient, agents: Iterable[int]) -> Iterator[tuple[int, Answer]]:
        """All teams' first ones, all second ones and so on: agent and answer."""
        for agent in agents:
            for team in range(len(self.said)):
                yield agent, self.speak(client, team, agent)

    def asked_once(self, client: ChatClient, url: str, agent: int) -> dict[str, Any]:
        """One question to each team: times to first tokens, and how its prompt's tokens came to
        be, team by team.
        """
        meter = KVCommMeter(url)
        row: dict[str, Any] = {name: [] for name in ("ttft_ms", "prompt_tokens", *COUNTS)}
        for team in range(len(self.said)):
            answer = self.ask(client, team, agent)
            row["ttft_ms"].append(first_token(answer))
            row["prompt_tokens"].append(answer.prompt_tokens)
            taken = meter.take(answer.prompt_tokens)
            for name in COUNTS:
                row[name].append(taken.get(name, 0))
        return row


def counted(url: str) -> dict[str, float]:
    """Tokens by what was done with them, and what tiers have copied."""
    page = read_page(url) or ""
    found = totals(page, "vllm:kvcomm_tokens_total", "treatment")
    pages = totals(page, "vllm:kvcomm_tier_pages_total", "event")
    copied = totals(page, "vllm:kvcomm_tier_bytes_total", "event")
    seconds = totals(page, "vllm:kvcomm_seconds_total", "phase")
    return {
        **{name: found.get(name, 0) for name in COUNTS},
        **{f"{name}_pages": pages.get(name, 0) for name in ("stored", "returned", "lost")},
        **{f"{name}_gb": copied.get(name, 0) / 2**30 for name in ("stored", "returned")},
        **{f"{name}_seconds": seconds.get(name, 0) for name in ("storing", "returning")},
    }


@dataclass(frozen=True)
class Bench:
    """Where servers are started.

    Args:
        folder: for their files, which are of no use afterwards.
        extra: arguments of all of them.
    """

    model: str
    folder: Path
    progress: Progress
    extra: Listing[str] = ()

    @contextmanager
    def serving(
        self, title: str, settings: dict[str, Any] | None, extra: list[str] | None = None
    ) -> Iterator[tuple[Server, ChatClient]]:
        """A server of its own, warmed up by a team of another tenant; None: plain vLLM."""
        name = title.replace(" ", "_")
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings or {}))
        with (
            started(
                title,
                self.model,
                self.folder / f"{name}.log",
                self.progress,
                connector=settings is not None,
                config=None if settings is None else config,
                extra=["--max-model-len", str(MAX_TOKENS), *self.extra, *(extra or [])],
            ) as server,
            closing(ChatClient(server.base_url, served_name(self.model))) as client,
        ):
            warm = Teams([[]], words=300, tokens=2, salt="warm up")
            list(warm.rounds(client, range(len(ROLES))))
            yield server, client

    def told(self, title: str, total: int) -> Callable[[], None]:
        """What is called after each of so many requests, for the screen."""
        task = self.progress.add_task(title, total=total)
        return lambda: self.progress.advance(task)


def asked_for(description: str | None, teams: int) -> argparse.ArgumentParser:
    """Arguments of all of them."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--teams", type=int, default=teams)
    parser.add_argument("--words", type=int, default=300, help="of a question, about a token each")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--host-gb", type=float, default=4.0)
    parser.add_argument("--server-arg", action="append", default=[], help="passed to vllm serve")
    parser.add_argument("--json", type=Path)
    return parser


@contextmanager
def bench(options: argparse.Namespace) -> Iterator[Bench]:
    """Files and the screen while servers work."""
    stop_at_sigterm()
    with TemporaryDirectory() as folder, progress_bar(Console(stderr=True)) as progress:
        yield Bench(options.model, Path(folder), progress, options.server_arg)


def write(options: argparse.Namespace, names: Iterable[str], found: dict[str, Any]) -> None:
    """What was found as JSON, if that was asked for, and under which conditions."""
    if options.json:
        conditions = {name: getattr(options, name) for name in (*names, "server_arg")}
        conditions |= {"machine": describe_machine(), "versions": describe_versions()}
        text = json.dumps({"conditions": conditions, **found}, indent=1)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
