# SPDX-License-Identifier: Apache-2.0
"""Promises of reports in streams: which chunk has which of those that a response's requests have
told. The chunks are vLLM's own.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from stream_chunks import chat_chunk, event, report, text_chunk, usage_chunk
from vllm.entrypoints.anthropic.protocol import AnthropicStreamEvent

from kvcomm_vllm.front.stream_reports import Told, report_for


def told(*reports: tuple[str, int, int, int]) -> Told:
    found = Told()
    for name, sample, samples, number in reports:
        found.hear(name, sample, samples, report(number)["kvcomm"])
    return found


def given(line: str, heard: Told) -> Any:
    found = report_for(json.loads(line.removeprefix("data: ")), heard)
    return found and found["reused"]  # type: ignore[call-overload, index]


def test_the_chunk_that_ends_a_choice_has_its_report() -> None:
    heard = told(("chatcmpl-a", 0, 2, 1), ("chatcmpl-a", 1, 2, 2))
    assert [given(chat_chunk("chatcmpl-a", n, "stop"), heard) for n in range(3)] == [1, 2, None]
    assert given(chat_chunk("chatcmpl-a", 0), heard) is None


def test_of_several_prompts_and_samples_each_choice_has_its_own() -> None:
    heard = told(*((f"cmpl-a-{p}", s, 3, 10 * p + s) for p in range(2) for s in range(3)))
    found = [given(text_chunk("cmpl-a", choice, "length"), heard) for choice in range(7)]
    assert found == [0, 1, 2, 10, 11, 12, None]


def test_the_chunk_with_the_usage_has_the_first_ones() -> None:
    assert given(usage_chunk("chatcmpl-a"), told(("chatcmpl-a", 0, 1, 7))) == 7
    assert given(usage_chunk("cmpl-a"), told(("cmpl-a-1", 0, 1, 8), ("cmpl-a-0", 0, 1, 7))) == 7
    assert given(usage_chunk("cmpl-a"), told(("cmpl-a-1", 0, 1, 8))) is None


def test_steps_on_the_way_to_an_answer_are_no_report_of_it() -> None:
    """As the requests of a beam search."""
    heard = told(*((f"beam_search-a-beam-{n}", 0, 1, n) for n in range(4)))
    assert given(text_chunk("cmpl-a", 0, "length"), heard) is None
    assert given(usage_chunk("cmpl-a"), heard) is None


def test_a_message_of_one_request_has_its_report_where_it_ends() -> None:
    ends = event(AnthropicStreamEvent(type="message_delta"))
    assert given(ends, told(("chatcmpl-a", 0, 1, 7))) == 7
    assert given(ends, told(("a", 0, 1, 7), ("b", 0, 1, 8))) is None
    assert given(event(AnthropicStreamEvent(type="message_stop")), told(("a", 0, 1, 7))) is None


def test_tokens_are_named_by_their_request() -> None:
    chunk = {"request_id": "generate-tokens-a", "choices": [{"index": 0, "finish_reason": "stop"}]}
    assert report_for(chunk, told(("generate-tokens-a", 0, 1, 7))) == {"reused": 7}


@pytest.mark.parametrize(
    "chunk",
    [
        {},
        {"choices": None, "id": "a"},
        {"choices": {"index": 0}, "id": "a"},
        {"choices": [None, 3], "id": "a"},
        {"choices": [{"finish_reason": "stop"}], "id": "a"},
        {"choices": [{"index": "0", "finish_reason": "stop"}], "id": "a"},
        {"choices": [{"index": 0, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "finish_reason": "stop"}], "id": ["a"]},
        {"choices": [{"index": -1, "finish_reason": "stop"}], "id": "a"},
        {"choices": [], "usage": None, "id": "a"},
        {"choices": [{"index": 0, "finish_reason": "stop"}], "id": "a", "kv_transfer_params": None},
        {"error": {"message": "no"}, "id": "a"},
    ],
    ids=repr,
)
def test_what_is_no_end_of_a_choice_has_none(chunk: dict[str, Any]) -> None:
    assert report_for(chunk, told(("a", 0, 1, 7))) is None
