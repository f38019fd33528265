# SPDX-License-Identifier: Apache-2.0
"""Promises to clients of a real ``vllm serve``, whichever endpoint they use: hints arrive, or are
refused if malformed, and an answer has its report, whichever way it ends.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

httpx = pytest.importorskip("httpx", reason="the demo extra is not installed")
openai = pytest.importorskip("openai", reason="the demo extra is not installed")

from serving import AS_ON_ONE_GPU, QUIET, Agents, story, wait_until  # noqa: E402
from ways import (  # noqa: E402
    BATCH,
    BEAMS,
    CHAT,
    OFF,
    TEXT,
    TOKENS_IN,
    WAYS,
    Body,
    Way,
    anthropic,
    batch,
    chat,
    chunks_of,
    post,
    prompts,
    responses,
    tokens,
)

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name  # noqa: E402
from kvcomm_vllm.evaluation.serving.server import free_port, running  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]

LATE = {"min_tokens": 8, "max_tokens": 60}  # so that a stop string is not in the first output
LETTERS = [*"aeit"]  # vLLM takes four stop strings
WORDS = 160
HANG_UPS = 3


@pytest.fixture(scope="module")
def agents(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    """A server for developers, which logs a traceback of what it takes for an error."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    config = folder / "kvcomm.yaml"
    config.write_text(f"mode: seam\nreport: full\n{QUIET}")
    extra = ["--dtype", "float32", "--enable-scale-out", AS_ON_ONE_GPU]
    command = serve_command(smollm2, port, on_gpu=False, connector=True, config=config, extra=extra)
    env = serve_env(smollm2, on_gpu=False)
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with running("test", command, port, env, folder / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        yield Agents(server, client, served_name(smollm2))


@pytest.fixture
def shared(request: pytest.FixtureRequest, agents: Agents) -> str:
    """Text that the agent "writer" has read; a text of its own for each test."""
    text = story(sum(n * byte for n, byte in enumerate(request.node.nodeid.encode())), WORDS)
    before = ended(agents)
    agents.ask("writer", text, tokens=1)
    assert wait_until(lambda: ended(agents) > before)
    return text


def ended(agents: Agents) -> int:
    """Requests of the engine that have been counted."""
    return sum(n for key, n in agents.counters().items() if key.startswith("requests/"))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture
def grown(agents: Agents) -> Callable[[], dict[str, int]]:
    """How our counters of requests and reused tokens have grown since the call before."""
    before, requests_before = agents.counters(), ended(agents)

    def growth(requests: int = 0) -> dict[str, int]:
        """After ``requests`` more have ended."""
        nonlocal before, requests_before
        requests_before += requests
        assert wait_until(lambda: ended(agents) >= requests_before and not agents.running())
        now = agents.counters()
        growing = {key: n - before[key] for key, n in now.items() if n > before[key]}
        before = now
        return growing

    return growth


# ---- in -----------------------------------------------------------------------------------------


def test_an_opt_out_holds(agents: Agents, way: Way, shared: str, grown: Any) -> None:
    if way.path == TOKENS_IN:  # a text of its own
        assert post(agents, way.path, WAYS["tokens"].body("reader", shared)).status_code == 200
        grown(1)
    answer = post(agents, way.path, {**way.body("editor", shared), **OFF})
    assert answer.status_code == 200, answer.text
    growth = grown(way.requests)
    assert growth["requests/off"] == growth["reasons/mode_off"] == way.requests, growth
    assert not {"tokens/reused", "requests/reused", "requests/declined"} & growth.keys()
    assert post(agents, way.path, way.body("critic", shared)).status_code == 200
    growth = grown(way.requests)
    assert growth["tokens/reused"] > WORDS / 2, "there was nothing to opt out of"
    assert "requests/off" not in growth


def test_malformed_hints_are_refused_and_counted(agents: Agents, way: Way, grown: Any) -> None:
    grown()
    bad = {"kv_transfer_params": {"kvcomm": {"mode": "nonsense"}}}
    answer = post(agents, way.path, {**way.body("editor", "hello"), **bad})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "BadRequestError"), answer.text
    assert error["param"] == "kv_transfer_params.kvcomm.mode"
    assert "'nonsense' is not allowed" in error["message"]
    assert grown() == {"reasons/bad_hints": 1}


@pytest.mark.parametrize("name", ["kvcomm", "\\u006bvcomm", "k\\u0076comm", "kvcom\\u006D"])
def test_hints_may_be_spelled_with_escapes(agents: Agents, name: str) -> None:
    """The scheduler would understand them, so the one who refuses has to."""
    for mode, status in (("off", 200), ("nonsense", 400)):
        hints = f'"kv_transfer_params": {{"{name}": {{"mode": "{mode}"}}}}'
        text = f'{{"model": "{agents.model}", "prompt": "hi", "max_tokens": 1, {hints}}}'
        answer = post(agents, TEXT, text.encode())
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "kv_transfer_params.kvcomm.mode"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_hints_are_read_in_every_encoding_of_json(
    agents: Agents, encoding: str, grown: Any
) -> None:
    body = {"model": agents.model, "prompt": "hé", "max_tokens": 1, **OFF, **BEAMS}
    answer = post(agents, TEXT, json.dumps(body, ensure_ascii=False).encode(encoding))
    assert answer.status_code == 200, answer.text
    assert grown(1)["requests/off"] == 1


def test_a_body_in_chunks_is_read_as_one(agents: Agents, grown: Any) -> None:
    text = json.dumps({"model": agents.model, "prompt": "hi", "max_tokens": 1, **OFF}).encode()
    url, headers = agents.server.base_url + TEXT, {"content-type": "application/json"}
    pieces = (text[i : i + 7] for i in range(0, len(text), 7))
    assert httpx.post(url, content=pieces, headers=headers, timeout=60).status_code == 200
    assert grown(1)["requests/off"] == 1


def test_a_client_that_hangs_up_within_its_body_harms_nobody(agents: Agents, grown: Any) -> None:
    address = urlsplit(agents.server.base_url)
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    for _ in range(HANG_UPS):
        with socket.create_connection((address.hostname, address.port)) as client:
            part = f'{{"model": "{agents.model}", {json.dumps(OFF)[1:-1]}, "prompt": "'
            client.sendall(f"{head}content-length: 9999\r\n\r\n{part}".encode())
    body = {"prompt": "hi", "max_tokens": 1}
    assert post(agents, TEXT, body).status_code == 200
    assert "requests/off" not in grown(1)


# ---- out ----------------------------------------------------------------------------------------


def assert_adds_up(params: Any, prompt_tokens: int | None = None) -> Body:
    report: Body = params["kvcomm"]
    assert report["local"] + report["reused"] + report["computed"] == report["prompt_tokens"]
    assert prompt_tokens in (None, report["prompt_tokens"])
    return report


@pytest.mark.parametrize(
    ("path", "ending", "reason"),
    [
        (CHAT, {"stop": ["\nObservation:", *LETTERS[1:]], **LATE}, "stop"),
        (CHAT, {"stop": LETTERS, **LATE, "n": 2, "temperature": 1.0, "seed": 3}, "stop"),
        (CHAT, {"stop_token_ids": list(range(3000)), **LATE}, "stop"),
        (CHAT, {"stop": ["\nObservation:"]}, "length"),
        (TEXT, {"stop": LETTERS, **LATE}, "stop"),
        ("/v1/messages", {"stop_sequences": [" the", "."], "max_tokens": 60}, "stop_sequence"),
        (TOKENS_IN, {}, "length"),
        ("/v1/responses", {}, "incomplete"),
    ],
    ids=lambda given: given if isinstance(given, str) else "+".join(given),
)
def test_an_answer_has_its_report_however_it_ends(
    agents: Agents, shared: str, path: str, ending: Body, reason: str
) -> None:
    ways = [chat(), prompts(), anthropic(), tokens(), responses()]
    (way,) = [way for way in ways if way.path == path]
    answer = post(agents, path, {**way.body("editor", shared), **ending}).json()
    report = assert_adds_up(answer["kv_transfer_params"])
    assert report["prompt_tokens"] > WORDS
    ends = {choice["finish_reason"] for choice in answer.get("choices", [])}
    assert ends or {answer.get("stop_reason"), answer.get("status")} >= {reason}
    assert ends <= {reason}
    if path == "/v1/messages":
        assert answer["usage"]["output_tokens"] > 1, "a stop string in the first output is easy"


def test_a_batch_has_a_report_for_each_conversation(agents: Agents, shared: str) -> None:
    for ending in ({}, {"stop": LETTERS, **LATE}):
        answer = post(agents, BATCH, {**batch("editor", shared), **ending}).json()
        reports = [choice["kv_transfer_params"]["kvcomm"] for choice in answer["choices"]]
        assert answer["kv_transfer_params"]["kvcomm"] == reports[0]
        assert (
            sum(report["prompt_tokens"] for report in reports) == answer["usage"]["prompt_tokens"]
        )
        for report in reports:
            assert_adds_up({"kvcomm": report})


def test_each_of_several_prompts_has_a_report(agents: Agents, shared: str) -> None:
    way = prompts(count=2, n=2, temperature=1.0, stop=LETTERS, **LATE)
    answer = post(agents, TEXT, way.body("editor", shared)).json()
    params = [choice["kv_transfer_params"] for choice in answer["choices"]]
    assert len(params) == 4
    assert params[0] == params[1] == answer["kv_transfer_params"]
    assert params[2] == params[3] != params[0]


STREAMS = {
    "chat": chat(stream=True, stop=LETTERS, **LATE),
    "chat, by SageMaker's route": chat("/invocations", stream=True, stop=LETTERS, **LATE),
    "text": prompts(stream=True, stop=LETTERS, **LATE),
}


@pytest.mark.parametrize("usage", [False, True], ids=["", "with usage"])
@pytest.mark.parametrize("way", STREAMS.values(), ids=STREAMS)
def test_the_chunk_that_ends_a_stream_has_the_report(
    agents: Agents, way: Way, usage: bool, shared: str
) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = chunks_of(post(agents, way.path, {**way.body("editor", shared), **options}))
    told = [chunk for chunk in chunks if "kv_transfer_params" in chunk]
    assert told == chunks[-2 if usage else -1 :]
    assert told[0]["choices"][0]["finish_reason"] == "stop"
    assert_adds_up(told[0]["kv_transfer_params"])
    if usage:
        assert told[1]["kv_transfer_params"] == told[0]["kv_transfer_params"]
        assert_adds_up(told[1]["kv_transfer_params"], told[1]["usage"]["prompt_tokens"])


def test_of_a_stream_of_several_prompts_and_samples_each_choice_has_its_report(
    agents: Agents, shared: str
) -> None:
    options = {"stream_options": {"include_usage": True}}
    way = prompts(count=2, n=2, temperature=1.0, stop=LETTERS, stream=True, **LATE, **options)
    chunks = chunks_of(post(agents, TEXT, way.body("editor", shared)))
    ends = {
        chunk["choices"][0]["index"]: chunk["kv_transfer_params"]["kvcomm"]
        for chunk in chunks
        if chunk["choices"] and chunk["choices"][0]["finish_reason"]
    }
    assert sorted(ends) == [0, 1, 2, 3]
    assert chunks[-1]["kv_transfer_params"]["kvcomm"] == ends[0]
    lengths = [ends[index]["prompt_tokens"] for index in range(4)]
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3]
    assert lengths[0] + lengths[2] == chunks[-1]["usage"]["prompt_tokens"]
    for told in ends.values():
        assert_adds_up({"kvcomm": told})


@pytest.mark.parametrize("usage", [False, True], ids=["", "with usage"])
def test_beams_come_in_a_stream_of_chat_as_vllm_sends_them(
    agents: Agents, usage: bool, shared: str
) -> None:
    """Each at once, in the chunk that ends its choice. The requests on the way to them have
    reports, which belong nowhere.
    """
    body = {**chat(**BEAMS).body("editor", shared), **OFF}
    whole = post(agents, CHAT, body).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = chunks_of(post(agents, CHAT, {**body, "stream": True, **options}))
    assert not [chunk for chunk in chunks if {"error", "kv_transfer_params"} & chunk.keys()]
    if usage:
        assert chunks.pop()["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    begins, ends = chunks[:2], chunks[2:]
    assert [chunk["choices"][0]["delta"]["role"] for chunk in begins] == ["assistant"] * 2
    told = [(chunk["choices"][0]["finish_reason"], said(chunk)) for chunk in ends]
    assert told == [("length", choice["message"]["content"]) for choice in whole["choices"]]


def said(chunk: Body) -> str:
    """The piece of text in a chunk of a chat."""
    text: str = chunk["choices"][0]["delta"]["content"]
    return text


def test_beams_in_a_stream_of_text_are_refused_as_vllm_does_it(
    agents: Agents, shared: str, grown: Any
) -> None:
    grown()
    answer = post(agents, TEXT, prompts(stream=True, **BEAMS).body("editor", shared))
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert answer.json()["error"]["type"] == "BadRequestError"
    assert answer.json().keys() == {"error"}
    assert not grown()


def test_a_stream_that_ends_with_an_error_is_as_vllm_has_it(agents: Agents, shared: str) -> None:
    """More beams than vLLM gives log-probabilities for, which it finds when it has answered 200."""
    way = chat(stream=True, **{**BEAMS, "n": 11})
    (chunk,) = chunks_of(post(agents, CHAT, way.body("editor", shared)))
    assert chunk.keys() == {"error"}
    assert chunk["error"]["type"] == "BadRequestError"


def test_a_message_that_is_streamed_has_the_report_where_it_ends(
    agents: Agents, shared: str
) -> None:
    way = anthropic(stream=True)
    text = post(agents, way.path, way.body("editor", shared)).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    (told,) = [event for event in events if "kv_transfer_params" in event]
    assert told["type"] == "message_delta"
    assert_adds_up(told["kv_transfer_params"])
    assert events[-1]["type"] == "message_stop"


def test_tokens_that_are_streamed_have_the_report_where_they_end(agents: Agents) -> None:
    way = tokens(stream=True)
    *_, last = chunks_of(post(agents, way.path, way.body("editor", story(5, WORDS))))
    assert last["choices"][0]["finish_reason"]
    assert_adds_up(last["kv_transfer_params"])


def test_a_client_that_hangs_up_on_its_stream_takes_nothing_from_the_next(
    agents: Agents, shared: str
) -> None:
    body = {"model": agents.model, **chat(stream=True, max_tokens=4000).body("editor", shared)}
    url = agents.server.base_url + CHAT
    with httpx.stream("POST", url, json={**body, "ignore_eos": True}, timeout=300) as answer:
        assert next(answer.iter_lines()).startswith("data: {")
    assert wait_until(lambda: agents.running() == 0)
    chunks = chunks_of(post(agents, CHAT, chat(stream=True).body("critic", shared)))
    assert_adds_up(chunks[-1]["kv_transfer_params"])


def test_the_last_event_of_a_streamed_response_has_the_report(agents: Agents, shared: str) -> None:
    way = responses(stream=True)
    text = post(agents, way.path, way.body("editor", shared)).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    last = events[-1]["response"]
    assert_adds_up(last["kv_transfer_params"], last["usage"]["input_tokens"])


def test_what_an_agent_said_before_its_stop_string_is_reused(agents: Agents) -> None:
    """As a ReAct agent does: another one reads its thought, in a prompt of its own."""
    text = story(77, 60)
    answer = post(
        agents, CHAT, chat(max_tokens=90, min_tokens=60, stop=LETTERS).body("poet", text)
    ).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] in LETTERS
    written = answer["usage"]["completion_tokens"]
    assert_adds_up(answer["kv_transfer_params"], answer["usage"]["prompt_tokens"])
    quoted = f"The poet wrote:\n{choice['message']['content']}"
    listener = post(agents, CHAT, chat().body("critic", quoted)).json()
    report = assert_adds_up(listener["kv_transfer_params"], listener["usage"]["prompt_tokens"])
    assert report["reused"] > 0.6 * written


def test_seams_and_gaps_are_not_counted_as_cached(agents: Agents, shared: str) -> None:
    answer = post(agents, CHAT, chat().body("editor", shared)).json()
    report = assert_adds_up(answer["kv_transfer_params"], answer["usage"]["prompt_tokens"])
    assert report["seam"] > 0
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == report["local"] + report["reused"]


def test_nothing_of_all_that_left_a_traceback(agents: Agents) -> None:
    """But for bodies that their clients gave up, which vLLM logs as errors, with their cause."""
    log = agents.server.log.read_text()
    assert log.count("Traceback (most recent call last)") <= 2 * HANG_UPS
    assert "kvcomm_vllm/" not in log
    assert "cannot be wrapped" not in log
