# SPDX-License-Identifier: Apache-2.0
"""Whoever operates a real ``vllm serve`` is answered at once, though much waits to be learned."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the demo extra is not installed")
psutil = pytest.importorskip("psutil", reason="vLLM brings it along")

from serving import Agents, report, story, wait_until  # noqa: E402

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name  # noqa: E402
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]

LESSONS = 3
WORDS = 1200
LAST_SECONDS = 20  # for the engine's loop to end; all lessons together take longer

# token by token: a lesson takes a thousand steps, and none ends while these tests run
CONFIG = "mode: anchor\nreport: full\naudit_idle_seconds: 0.1\naudit_tokens: 1\n"


@pytest.fixture(scope="module")
def agents(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    """A server that developers and operators may ask for more than answers."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "kvcomm.yaml"
    config.write_text(CONFIG)
    port = free_port()
    extra = ["--shutdown-timeout", str(LAST_SECONDS)]
    command = serve_command(smollm2, port, on_gpu=False, connector=True, config=config, extra=extra)
    env = serve_env(smollm2, on_gpu=False)
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with running("test", command, port, env, folder / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        yield Agents(server, client, served_name(smollm2))


def call(agents: Agents, path: str) -> dict[str, Any]:
    """What the server answers to a POST of nothing."""
    request = urllib.request.Request(f"{agents.server.base_url}{path}", method="POST")
    with urllib.request.urlopen(request) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def hear(agents: Agents, number: int) -> dict[str, Any]:
    text = story(number, words=WORDS)
    agents.ask("writer", text, tokens=1)
    return report(agents.ask("critic", text, tokens=1))


def waiting(agents: Agents) -> int:
    """Lessons that wait, the one under way included."""
    now = agents.counters()
    ended = sum(now[f"lessons/{how}"] for how in ("learned", "healed", "dropped", "failed"))
    return now["lessons/queued"] - ended


def pieces(agents: Agents) -> int:
    return agents.counters()["runs/learning"]


def let_it_learn(agents: Agents) -> None:
    """Until ``LESSONS`` lessons wait, and the engine is in the midst of one."""
    number = 0
    while waiting(agents) < LESSONS:
        hear(agents, number)
        number += 1
    before = pieces(agents)
    assert wait_until(lambda: pieces(agents) > before)


@pytest.mark.parametrize(
    ("stop", "go"),
    [
        ("/pause?mode=abort&clear_cache=false", "/resume"),
        ("/pause?mode=wait&clear_cache=false", "/resume"),
        ("/pause?mode=keep&clear_cache=false", "/resume"),
        ("/sleep?level=0", "/wake_up?tags=scheduling"),
    ],
)
def test_a_stop_is_answered_while_lessons_wait_and_they_go_on_behind_it(
    agents: Agents, stop: str, go: str
) -> None:
    let_it_learn(agents)
    call(agents, stop)
    assert waiting(agents) == LESSONS
    before = pieces(agents)
    time.sleep(1.0)  # an engine that went on learning would do some twenty pieces
    assert pieces(agents) == before
    call(agents, go)
    assert wait_until(lambda: pieces(agents) > before)
    assert waiting(agents) == LESSONS


@pytest.mark.parametrize("query", ["", "?reset_running_requests=true"])
def test_a_reset_succeeds_in_the_midst_of_a_lesson_and_ends_them_all(
    agents: Agents, query: str
) -> None:
    let_it_learn(agents)
    assert call(agents, f"/reset_prefix_cache{query}") == {"success": True}
    told = report(agents.ask("critic", story(0, words=WORDS), tokens=1))
    assert (told["local"], told["reused"], told["corrected"]) == (0, 0, 0)
    assert wait_until(lambda: waiting(agents) == 0)


def test_a_server_that_is_told_to_end_does_not_learn_first(agents: Agents) -> None:
    """Drains its requests, of which there are none; the last test here, as it ends the server."""
    let_it_learn(agents)
    server = psutil.Process(agents.server.pid)
    os.kill(server.pid, signal.SIGTERM)
    server.wait(6 * LAST_SECONDS)
    log = Path(agents.server.log).read_text()
    assert "[shutdown] EngineCore: request processing complete" in log, "it had to be killed"
