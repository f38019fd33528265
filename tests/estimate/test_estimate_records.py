# SPDX-License-Identifier: Apache-2.0
"""A line of a log is a request, whichever program has written it; or it is skipped, by a name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from any_values import is_short_line
from hypothesis import given, settings
from log_lines import LINES

from kvcomm_vllm.estimate.flaws import Flaw, SkippedError
from kvcomm_vllm.estimate.record import Record, records

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
BODY = {"model": "m", "messages": MESSAGES}
SAID = {"choices": [{"message": {"role": "assistant", "content": "Hi"}}]}
READ = [{"role": "system", "content": ["Be brief."]}, {"role": "user", "content": ["Hello"]}]


def one(value: object) -> Record:
    (record,) = records(value)
    assert isinstance(record, Record), record
    return record


def flaw(value: object) -> Flaw:
    (skipped,) = records(value)
    assert isinstance(skipped, SkippedError)
    assert is_short_line(skipped.detail)
    return skipped.flaw


@pytest.mark.parametrize(
    "line",
    [
        {**BODY, "response": SAID},
        {"custom_id": "1", "url": "/v1/chat/completions", "body": BODY, "response": {"body": SAID}},
        {"request_body": BODY, "response_body": SAID},
        {"request_body": json.dumps(BODY), "response_body": json.dumps(SAID)},
        {"model": "m", "messages": json.dumps(MESSAGES), "response": SAID, "call_type": "x"},
        {"request": {"method": "POST", "body": BODY}, "response": {"status": 200, "body": SAID}},
        {**BODY, "response": "Hi"},
        {
            "name": "chat m",
            "attributes": {
                "gen_ai.request.model": "m",
                "gen_ai.system_instructions": json.dumps(
                    [{"type": "text", "content": "Be brief."}]
                ),
                "gen_ai.input.messages": json.dumps(
                    [{"role": "user", "parts": [{"type": "text", "content": "Hello"}]}]
                ),
                "gen_ai.output.messages": json.dumps(
                    [{"role": "assistant", "parts": [{"type": "text", "content": "Hi"}]}]
                ),
            },
        },
        {
            "attributes": [
                {"key": "gen_ai.request.model", "value": {"stringValue": "m"}},
                {"key": "gen_ai.prompt.0.role", "value": {"stringValue": "system"}},
                {"key": "gen_ai.prompt.0.content", "value": {"stringValue": "Be brief."}},
                {"key": "gen_ai.prompt.1.content", "value": {"stringValue": "Hello"}},
                {"key": "gen_ai.completion.0.content", "value": {"stringValue": "Hi"}},
            ]
        },
    ],
    ids=lambda line: ",".join(line)[:40],
)
def test_a_request_is_found_wherever_it_stands(line: dict[str, Any]) -> None:
    record = one(line)
    assert (record.model, record.messages) == ("m", READ)
    assert record.answer == {"role": "assistant", "content": ["Hi"]}


def test_completions_are_texts_tokens_or_several_of_them() -> None:
    assert one({"prompt": "text", "response": {"choices": [{"text": "more"}]}}).answer == "more"
    assert one({"prompt": [1, 2, 3]}).prompt == [1, 2, 3]
    found = list(records({"prompt": ["one", [4, 5]], "response": "of which?"}))
    assert [(r.prompt, r.answer) for r in found] == [("one", None), ([4, 5], None)]


def test_a_line_may_hold_several_bodies() -> None:
    kinds = [type(found) for found in records([BODY, 7, BODY])]
    assert kinds == [Record, SkippedError, Record]


@pytest.mark.parametrize(
    "line",
    [
        {**BODY, "kv_transfer_params": {"kvcomm": {"agent": "planner"}}},
        {**BODY, "metadata": {"agent": "planner"}},
        {**BODY, "agent": "planner"},
        {"request_body": BODY, "agent_name": "planner"},
        {"attributes": {"gen_ai.agent.name": "planner"}, **BODY},
    ],
)
def test_an_agent_is_known_by_its_name(line: dict[str, Any]) -> None:
    assert one(line).agent == "planner"


def test_salt_hints_tools_and_scoring_are_the_bodys() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    hints = {"kvcomm": {"mode": "off"}}
    line = {**BODY, "tools": tools, "cache_salt": "s", "kv_transfer_params": hints}
    record = one({"request_body": line})
    assert (record.tools, record.salt, record.hints) == (tools, "s", hints)
    assert not record.scored
    assert one({"prompt": "x", "echo": True, "logprobs": 1}).scored


def test_arguments_of_tool_calls_are_read_as_vllm_reads_them() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    line = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (message,) = one(line).messages or []
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({}, Flaw.NO_REQUEST),
        ([[]], Flaw.NO_REQUEST),
        ("text", Flaw.NO_REQUEST),
        ({"messages": []}, Flaw.EMPTY),
        ({"messages": [{"role": "user", "content": ""}]}, Flaw.EMPTY),
        ({"prompt": ""}, Flaw.EMPTY),
        ({"prompt": []}, Flaw.EMPTY),
        ({"messages": "hello"}, Flaw.WRONG_TYPE),
        ({"messages": [7]}, Flaw.WRONG_TYPE),
        ({"messages": [{"role": 7, "content": "x"}]}, Flaw.WRONG_TYPE),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, Flaw.WRONG_TYPE),
        ({"prompt": {"a": 1}}, Flaw.WRONG_TYPE),
        ({"prompt": [1, -2]}, Flaw.WRONG_TYPE),
        ({"prompt": "x", "cache_salt": 7}, Flaw.WRONG_TYPE),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            Flaw.MEDIA,
        ),
    ],
)
def test_what_cannot_be_used_has_a_name(line: object, kind: Flaw) -> None:
    assert flaw(line) is kind


@pytest.mark.slow
@given(LINES)
@settings(max_examples=400, deadline=None)
def test_nothing_breaks_the_reading(line: object) -> None:
    for found in records(line):
        if isinstance(found, SkippedError):
            assert is_short_line(found.detail)
        else:
            assert found.characters or found.messages
