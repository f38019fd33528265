# SPDX-License-Identifier: Apache-2.0
"""Data-parallel ranks of a real ``vllm serve`` reuse each other's text over one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the demo extra is not installed")

from serving import QUIET, Agents, report, story, wait_until  # noqa: E402

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name  # noqa: E402
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]

RANKS = 2
TENANT, ANOTHER = ({"extra_body": {"cache_salt": salt}} for salt in ("tenant", "another"))


@pytest.fixture(scope="module")
def agents(short_smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    folder = tmp_path_factory.mktemp("ranks")
    config = folder / "kvcomm.yaml"
    disk = f"disk_path: {folder / 'kv'}\n  disk_gb: 1\n  wait_seconds: 600"
    trace = f"trace:\n  file: {folder / 'trace.jsonl'}\n"
    config.write_text(f"{QUIET}report: full\ntiers:\n  host_gb: 0.1\n  {disk}\n{trace}")
    port = free_port()
    extra = ["--data-parallel-size", str(RANKS), "--api-server-count", "2"]
    command = serve_command(
        short_smollm2, port, on_gpu=False, connector=True, config=config, extra=extra
    )
    env = serve_env(short_smollm2, on_gpu=False) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with running("test", command, port, env, folder / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        yield Agents(server, client, served_name(short_smollm2))


@pytest.fixture(scope="module")
def told(agents: Agents) -> dict[str, dict[str, Any]]:
    """What the second rank says of how it has served requests, after the first one has served
    others. It computes nothing long before the last one: so it does not know what that costs, and
    brings back whatever it can.
    """

    def ask(rank: int, role: str, seed: int, **options: Any) -> dict[str, Any]:
        headers = {"X-data-parallel-rank": str(rank)}
        return report(agents.ask(role, story(seed), extra_headers=headers, **options))

    first = [ask(0, "writer", 1), ask(0, "reader", 2), ask(0, "editor", 3, **TENANT)]
    assert [one["local"] + one["reused"] for one in first] == [0, 0, 0]
    pages = sum(one["prompt_tokens"] // 32 for one in first)
    folder = agents.server.log.parent / "kv"
    assert wait_until(lambda: len(list(folder.rglob("*.bin"))) >= pages)
    return {
        "quoted elsewhere": ask(1, "a critic of", 1),
        "the same prompt": ask(1, "reader", 2),
        "quoted by its tenant": ask(1, "a printer of", 3, **TENANT),
        "quoted by another": ask(1, "a printer of", 3, **ANOTHER),
    }


def most_of(told: dict[str, Any]) -> float:
    return 0.7 * float(told["prompt_tokens"])


@pytest.mark.support("reuse", "data parallel, shared tier")
def test_a_rank_reuses_elsewhere_what_another_one_has_computed(
    told: dict[str, dict[str, Any]],
) -> None:
    one = told["quoted elsewhere"]
    assert one["reused"] > most_of(one)


def test_what_one_rank_has_computed_is_another_ones_exact_beginning(
    told: dict[str, dict[str, Any]],
) -> None:
    one = told["the same prompt"]
    assert one["local"] > most_of(one)
    assert one["reused"] == 0


def test_tenants_are_the_same_in_all_ranks(told: dict[str, dict[str, Any]]) -> None:
    same, another = told["quoted by its tenant"], told["quoted by another"]
    assert same["reused"] > most_of(same)
    assert (another["local"], another["reused"]) == (0, 0)


def test_streams_have_reports_whichever_api_server_and_rank_they_meet(
    agents: Agents, told: dict[str, dict[str, Any]]
) -> None:
    for number in range(8):
        rank = {"X-data-parallel-rank": str(number % RANKS), "Connection": "close"}
        options = {"include_usage": True}
        text = story(10 + number, 40)
        stream = agents.ask("reader", text, stream=True, stream_options=options, extra_headers=rank)
        *_, last = stream
        assert report(last)["prompt_tokens"] == last.usage.prompt_tokens


def test_each_rank_has_a_trace_of_its_own(agents: Agents, told: dict[str, dict[str, Any]]) -> None:
    first, second = (agents.server.log.parent / f"trace{rank}.jsonl" for rank in ("", ".dp1"))
    assert wait_until(lambda: len(first.read_text().splitlines()) >= 3)
    assert wait_until(lambda: len(second.read_text().splitlines()) >= len(told))
    records = [json.loads(line) for line in second.read_text().splitlines()][: len(told)]
    for record, one in zip(records, told.values(), strict=True):
        assert {name: record[name] for name in one} == one
    assert any(record.get("promoted", {}).get("slower") for record in records)


def test_each_rank_has_a_pool_of_its_own(agents: Agents, told: dict[str, dict[str, Any]]) -> None:
    lines = agents.server.log.read_text().splitlines()
    opened = [line for line in lines if "kvcomm: tiers:" in line]
    assert len(opened) == RANKS
    assert all(any(f"EngineCore_DP{rank}" in line for line in opened) for rank in range(RANKS))
