# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` with the connectors of docs/connectors.md: the command line that stands
there starts, reuses, and says so in responses, streams and metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the demo extra is not installed")

from serving import AS_ON_ONE_GPU, Agents, report, story, wait_until  # noqa: E402

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name  # noqa: E402
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "connectors.md"
SMALL = {"report": "full", "anchor_memory_mb": 256, "audits": False, "heal": "off"}
# vLLM's own worker copies from GPUs alone
ON_CPU = {"spec_name": "HostPoolSpec", "spec_module_path": "kvcomm_vllm.worker.host_pool"}


def transfer_config() -> str:
    """The manual's ``--kv-transfer-config``, for this machine's memory."""
    said = MANUAL.read_text().partition("--kv-transfer-config '")[2].partition("'")[0]
    given = json.loads(said)
    ours, pool = given["kv_connector_extra_config"]["connectors"]
    assert (ours["kv_connector"], pool["kv_connector"]) == ("kvcomm", "OffloadingConnector")
    ours["kv_connector_extra_config"] = SMALL
    pool["kv_connector_extra_config"] |= {"cpu_bytes_to_use": 64 << 20, **ON_CPU}
    return json.dumps(given)


@pytest.fixture(scope="module")
def agents(short_smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    extra = [AS_ON_ONE_GPU, "--dtype", "float32", "--kv-transfer-config", transfer_config()]
    command = serve_command(
        short_smollm2, port, on_gpu=False, connector=False, config=None, extra=extra
    )
    env = serve_env(short_smollm2, on_gpu=False)
    with running("test", command, port, env, folder / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        yield Agents(server, client, served_name(short_smollm2))


def test_the_manuals_command_line_reuses_and_says_beside_whom(agents: Agents) -> None:
    (said,) = [line for line in agents.server.log.read_text().splitlines() if "reuse is" in line]
    assert "reuse is ON" in said
    assert ", beside OffloadingConnector: " in said
    text = story(1)
    agents.ask("writer", text)
    told = report(agents.ask("critic", text))
    assert told["reused"] > told["computed"]
    assert wait_until(lambda: agents.counters()["tokens/reused"] == told["reused"])


def test_a_stream_has_its_report_beside_another_connector_as_well(agents: Agents) -> None:
    text = story(2)
    agents.ask("writer", text)
    chunks: list[Any] = list(agents.ask("critic", text, stream=True))
    assert report(chunks[-1])["reused"] > 0
    assert not [chunk for chunk in chunks[:-1] if hasattr(chunk, "kv_transfer_params")]


def test_nothing_of_all_that_left_a_traceback_beside_another_connector(agents: Agents) -> None:
    assert wait_until(lambda: agents.running() == 0)
    assert "Traceback" not in agents.server.log.read_text()
