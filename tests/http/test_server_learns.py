# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` in mode anchor learns by itself while nobody asks it anything."""

from __future__ import annotations

from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="the demo extra is not installed")
psutil = pytest.importorskip("psutil", reason="vLLM brings it along")

from serving import AS_ON_ONE_GPU, Agents, report, story, wait_until  # noqa: E402

from kvcomm_vllm.cli.serve_command import (  # noqa: E402
    CPU_BLOCK_TOKENS,
    serve_command,
    serve_env,
    served_name,
)
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]


def test_an_idle_server_learns_a_template_and_then_corrects(smollm2: str, tmp_path: Path) -> None:
    config = tmp_path / "kvcomm.yaml"
    config.write_text("mode: anchor\naudit_idle_seconds: 0.1\nreport: full\n")
    port, extra = free_port(), [AS_ON_ONE_GPU]
    command = serve_command(smollm2, port, on_gpu=False, connector=True, config=config, extra=extra)
    env = serve_env(smollm2, on_gpu=False)
    with running("test", command, port, env, tmp_path / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        agents = Agents(server, client, served_name(smollm2))

        def hear(number: int) -> dict[str, int]:
            text = story(number)
            agents.ask("writer", text)
            return report(agents.ask("critic", text))

        told = hear(0)
        assert told["reused"]
        assert not told["corrected"]
        for number in range(1, 4):
            told = hear(number)
            assert wait_until(lambda n=number: agents.counters()["lessons/learned"] >= n)
        told = hear(9)
        # of the critic's own page, behind its prefix hit
        exact = told["reused"] - told["corrected"]
        assert 0 <= exact < CPU_BLOCK_TOKENS
        counters = agents.counters()
        assert counters["lessons/failed"] == 0
        assert counters["placeholders/gained"] >= 1
        assert counters["anchors/gained"] >= counters["lessons/learned"] >= 3
        assert agents.running() == 0


def test_an_engine_killed_while_it_learns_leaves_nothing_behind(
    smollm2: str, tmp_path: Path
) -> None:
    """Its server ends as vLLM's do, and the next one starts and serves as if nothing had been."""
    config = tmp_path / "kvcomm.yaml"
    config.write_text("audit_idle_seconds: 0\naudit_share: 1\naudit_tokens: 1\n")
    answers = []
    for attempt in range(2):
        port = free_port()
        command = serve_command(
            smollm2, port, on_gpu=False, connector=True, config=config, extra=[]
        )
        env = serve_env(smollm2, on_gpu=False)
        log = tmp_path / f"server-{attempt}.log"
        with running("test", command, port, env, log) as server:
            client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
            agents = Agents(server, client, served_name(smollm2))
            for number in range(2):
                agents.ask("writer", story(number))
                answer = agents.ask("critic", story(number))
            answers.append((report(answer)["reused"], answer.choices[0].message.content))
            started = agents.counters()["runs/learning"]
            assert wait_until(lambda n=started, a=agents: a.counters()["runs/learning"] > n)
            assert not agents.counters()["lessons/learned"]
            process = psutil.Process(server.pid)
            (engine,) = [p for p in process.children(recursive=True) if "EngineCore" in p.name()]
            engine.kill()
            process.wait(60)
    assert answers[0] == answers[1]
