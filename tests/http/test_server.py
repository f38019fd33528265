# SPDX-License-Identifier: Apache-2.0
"""Promises to clients of a real ``vllm serve`` with the plugin, over the official OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the demo extra is not installed")

from serving import QUIET, WORDS, Agents, report, story, wait_until  # noqa: E402

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name  # noqa: E402
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]

CLIENTS = 8


def hints(**given: Any) -> dict[str, Any]:
    return {"extra_body": {"kv_transfer_params": {"kvcomm": given}}}


@pytest.fixture(scope="module")
def agents(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    """One server, set up the way a ``vllm serve --config FILE`` user would."""
    folder = tmp_path_factory.mktemp("server")
    ours, theirs = folder / "kvcomm.yaml", folder / "vllm.yaml"
    trace = f"trace:\n  file: {folder / 'trace.jsonl'}\n"
    ours.write_text(f"seam_tokens: 8\nreport: full\n{QUIET}{trace}")
    theirs.write_text(f"kv-connector: kvcomm\nkvcomm-config: {ours}\n")
    port = free_port()
    # with the routes for developers vLLM logs a traceback for every HTTP error, unless told not to
    extra = ["--config", str(theirs), "--no-log-error-stack"]
    command = serve_command(smollm2, port, on_gpu=False, connector=False, config=None, extra=extra)
    env = serve_env(smollm2, on_gpu=False)
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with running("test", command, port, env, folder / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        yield Agents(server, client, served_name(smollm2))


@pytest.fixture
def shared(request: pytest.FixtureRequest, agents: Agents) -> str:
    """Text that the agent "writer" has read; a text of its own for each test."""
    text = story(sum(request.node.nodeid.encode()))
    agents.ask("writer", text)
    return text


def assert_adds_up(answer: Any) -> None:
    told = report(answer)
    assert told["local"] + told["reused"] + told["computed"] == answer.usage.prompt_tokens
    assert told["prompt_tokens"] == answer.usage.prompt_tokens


def test_a_second_agent_reuses_what_the_first_has_read(agents: Agents) -> None:
    text = story(1)
    first = agents.ask("reader", text)
    second = agents.ask("editor", text)
    assert report(first)["reused"] == 0
    assert report(second)["reused"] > 0.7 * second.usage.prompt_tokens
    assert second.choices[0].message.content
    for answer in (first, second):
        assert_adds_up(answer)


def test_what_one_agent_wrote_is_reused_in_anothers_prompt(agents: Agents) -> None:
    written = agents.ask("poet", story(2, 40), tokens=120, extra_body={"min_tokens": 120})
    quoted = written.choices[0].message.content
    answer = agents.ask("critic", f"The poet wrote:\n{quoted}")
    assert report(answer)["reused"] > 60
    assert_adds_up(answer)


def test_counters_on_metrics_grow_by_what_the_response_says(agents: Agents, shared: str) -> None:
    assert wait_until(lambda: agents.running() == 0)
    before = agents.counters()
    answer = agents.ask("editor", shared)
    told = report(answer)
    assert told["reused"] > 0
    wanted = {f"tokens/{kind}": told[kind] for kind in ("local", "reused", "computed")}
    wanted["requests/reused"] = 1

    def grown() -> dict[str, int]:
        now = agents.counters()
        return {key: now[key] - before[key] for key in wanted}

    assert wait_until(lambda: grown() == wanted), grown()
    runs = {key: n - before[key] for key, n in agents.counters().items() if "runs/" in key}
    assert runs["runs/load"] == 1
    assert runs["runs/planning"] >= 1


def test_streamed_answers_reuse_and_are_whole(agents: Agents, shared: str) -> None:
    before = agents.counters()["requests/reused"]
    options = {"include_usage": True}
    stream = agents.ask("editor", shared, tokens=20, stream=True, stream_options=options)
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.prompt_tokens > 300
    assert wait_until(lambda: agents.counters()["requests/reused"] == before + 1)
    assert_adds_up(chunks[-1])
    assert report(chunks[-1])["reused"] > 0
    (end,) = [c for c in chunks if c.choices and c.choices[0].finish_reason]
    assert report(end) == report(chunks[-1])


@pytest.mark.parametrize("samples", [1, 3])
def test_streams_of_many_clients_at_once_have_each_its_own_report(
    agents: Agents, shared: str, samples: int
) -> None:
    """All of them named alike by their clients."""
    named = {"extra_headers": {"X-Request-Id": "the same"}}

    def ask(number: int) -> tuple[int, dict[int, Any]]:
        role, options = "editor " * number, {"n": samples, "temperature": 1.0}
        usage = {"stream_options": {"include_usage": True}}
        stream = agents.ask(role, shared, tokens=6, stream=True, **named, **usage, **options)
        chunks = list(stream)
        ends = [c for c in chunks if c.choices and c.choices[0].finish_reason]
        return chunks[-1].usage.prompt_tokens, {c.choices[0].index: report(c) for c in ends}

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, range(1, CLIENTS + 1)))
    lengths = [length for length, _ in found]
    assert sorted(set(lengths)) == lengths, "no two prompts are of one length"
    for length, reports in found:
        assert sorted(reports) == [*range(samples)]
        assert {told["prompt_tokens"] for told in reports.values()} == {length}
        assert all(
            told["local"] + told["reused"] + told["computed"] == length for told in reports.values()
        )


def test_a_client_may_opt_out(agents: Agents, shared: str) -> None:
    answer = agents.ask("editor", shared, **hints(mode="off"))
    told = report(answer)
    assert (told["mode"], told["reused"], told["declined"]) == ("off", 0, {"mode_off": 1})
    assert_adds_up(answer)


def test_hints_choose_the_mode_and_name_the_agent(agents: Agents, shared: str) -> None:
    told = report(agents.ask("editor", shared, **hints(mode="rotate", agent="ed")))
    assert (told["mode"], told["agent"], told["seam"]) == ("rotate", "ed", 0)
    assert told["reused"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "fast"}, "kvcomm.mode"),
        ({"mood": "off"}, "unknown hint 'mood'"),
        ({"spans": [[5, 2]]}, "kvcomm.spans[0]"),
        ("off", "must be an object"),
    ],
    ids=["value", "name", "span", "type"],
)
def test_malformed_hints_are_refused_with_the_reason(
    agents: Agents, given: object, said: str
) -> None:
    extra = {"kv_transfer_params": {"kvcomm": given}}
    for create in (
        lambda: agents.ask("editor", "hello", extra_body=extra),
        lambda: agents.client.completions.create(
            model=agents.model, prompt="hello", max_tokens=1, extra_body=extra
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create()
        assert said in str(caught.value)
    assert agents.ask("editor", "hello").choices[0].finish_reason


def test_several_samples_of_one_prompt_are_served(agents: Agents, shared: str) -> None:
    assert wait_until(lambda: agents.running() == 0)
    before = agents.counters()
    answer = agents.ask("editor", shared, n=2, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.content for choice in answer.choices)

    def grown(key: str) -> int:
        return agents.counters()[key] - before[key]

    # vLLM makes a request of each sample: one reuses the text, the other the first one's pages
    assert wait_until(lambda: grown("requests/reused") + grown("requests/declined") == 2)
    assert grown("requests/reused") >= 1


def test_a_request_for_prompt_logprobs_is_computed(agents: Agents, shared: str) -> None:
    answer = agents.ask("editor", shared, extra_body={"prompt_logprobs": 1})
    told = report(answer)
    assert (told["local"], told["reused"]) == (0, 0)
    assert told["declined"] == {"prompt_logprobs": 1}
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens


def test_tenants_with_another_salt_share_nothing(agents: Agents, shared: str) -> None:
    other = {"cache_salt": "another tenant"}
    apart = report(agents.ask("editor", shared, extra_body=other))
    assert (apart["local"], apart["reused"], apart["declined"]) == (0, 0, {"no_match": 1})
    assert report(agents.ask("critic", shared, extra_body=other))["reused"] > 0


def test_a_client_that_hangs_up_leaves_the_server_healthy(agents: Agents, shared: str) -> None:
    endless = {"ignore_eos": True}
    with agents.ask("editor", shared, tokens=2000, stream=True, extra_body=endless) as stream:
        next(iter(stream))
    assert wait_until(lambda: agents.running() == 0), "the request was not aborted"
    answer = agents.ask("critic", shared)
    assert report(answer)["reused"] > 0
    assert_adds_up(answer)


def test_concurrent_clients_lose_no_request(agents: Agents, shared: str) -> None:
    assert wait_until(lambda: agents.running() == 0)
    before = agents.counters()

    def finished() -> int:
        now = agents.counters()
        keys = [key for key in now if key.startswith("requests/")]
        return sum(now[key] - before[key] for key in keys)

    with ThreadPoolExecutor(CLIENTS) as pool:
        roles = [f"agent{number}" for number in range(CLIENTS)]
        answers = list(pool.map(lambda role: agents.ask(role, shared), roles))
    assert all(answer.choices[0].message.content for answer in answers)
    for answer in answers:
        assert_adds_up(answer)
        assert report(answer)["reused"] > 0
    assert wait_until(lambda: finished() == CLIENTS), finished()


@pytest.mark.parametrize("query", ["", "?reset_external=true"], ids=["pages", "everything"])
def test_nothing_stale_is_reused_after_a_reset(agents: Agents, shared: str, query: str) -> None:
    assert wait_until(lambda: agents.running() == 0)
    assert agents.post(f"/reset_prefix_cache{query}") == 200
    told = report(agents.ask("editor", shared))
    assert (told["local"], told["reused"]) == (0, 0)
    assert set(told["declined"]) <= {"no_match", "source_evicted"}
    assert report(agents.ask("critic", shared))["reused"] > 0


def test_the_trace_has_what_a_client_was_told(agents: Agents, shared: str) -> None:
    told = report(agents.ask("editor", shared, **hints(agent="traced")))
    path = agents.server.log.parent / "trace.jsonl"

    def found() -> list[dict[str, Any]]:
        lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in records if record.get("agent") == "traced"]

    assert wait_until(lambda: len(found()) == 1)
    (record,) = found()
    assert record["id"].startswith("chatcmpl-")
    assert (record["outcome"], record["output_tokens"]) == ("reused", 6)
    assert {name: record[name] for name in told} == told
    assert path.stat().st_mode & 0o777 == 0o600
    for word in WORDS:
        assert word not in path.read_text()


def test_the_log_says_once_that_reuse_is_on_and_nothing_went_wrong(agents: Agents) -> None:
    log: Path = agents.server.log
    lines = log.read_text().splitlines()
    said = [line for line in lines if "reuse is O" in line]
    assert len(said) == 1
    assert "reuse is ON, mode anchor, self-check passed: 30 layers in 1 group(s)" in said[0]
    assert any("seam_tokens=8*" in line for line in lines), "our file was not read"
    assert not [line for line in lines if "Traceback" in line]
