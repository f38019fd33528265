# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` that is killed in the midst of its work finds its text on disk again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="the demo extra is not installed")
psutil = pytest.importorskip("psutil", reason="vLLM brings it along")

from serving import Agents, report, story, wait_until  # noqa: E402

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name  # noqa: E402
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]
TEAMS = range(3)


@contextmanager
def serving(model: str, folder: Path, log: str) -> Iterator[Agents]:
    config = folder / "kvcomm.yaml"
    config.write_text(
        "audits: false\nheal: off\nreport: full\n"
        f"tiers:\n  host_gb: 1\n  disk_path: {folder / 'kv'}\n  disk_gb: 2\n"
    )
    port = free_port()
    command = serve_command(model, port, on_gpu=False, connector=True, config=config, extra=[])
    env = serve_env(model, on_gpu=False)
    with running("test", command, port, env, folder / log) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        yield Agents(server, client, served_name(model))


def test_a_server_killed_under_load_reuses_from_disk_when_it_is_back(
    smollm2: str, tmp_path: Path
) -> None:
    with serving(smollm2, tmp_path, "first.log") as agents:
        for team in TEAMS:
            agents.ask("writer", story(team))
        stored = sorted(path.name for path in (tmp_path / "kv").rglob("*.bin"))
        assert wait_until(lambda: len(list((tmp_path / "kv").rglob("*.bin"))) > 3 * 10), stored

        def work(number: int) -> None:
            with suppress(openai.OpenAIError):
                for round_ in range(20):
                    agents.ask(f"agent {number}", story(100 * number + round_, 150))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: agents.running() > 1)
        for process in reversed(psutil.Process(agents.server.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(agents.server.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(120)

    with serving(smollm2, tmp_path, "second.log") as agents:
        for team in TEAMS:
            told = report(agents.ask("critic", story(team)))
            assert told["reused"] > 200, told
        counters = agents.counters()
        assert counters["tier_pages/returned"] >= 30
        assert agents.running() == 0
