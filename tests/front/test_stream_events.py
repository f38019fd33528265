# SPDX-License-Identifier: Apache-2.0
"""Promises of events as they pass: however their bytes are cut, each piece leaves as a piece, and
without what was put in they are what came.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcomm_vllm.front.stream_events import MOST_BYTES, Events

MARK = b',"added":"\xc3\xa9"'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def addition(content: dict[str, Any]) -> bytes:
    """Something for every object that asks."""
    return MARK if content.get("end") is True else b""


def data(content: object, head: str = "", blanks: str = "") -> bytes:
    return f"{head}data: {json.dumps(content, ensure_ascii=False)}{blanks}\n\n".encode(
        "utf-8", "surrogatepass"
    )


# what vLLM sends, and what it does not
ASKS = st.builds(lambda rest: data({**rest, "end": True}), st.dictionaries(st.text(), JSON))
EVENT = st.one_of(
    ASKS,
    st.builds(lambda rest: data({**rest, "end": True}, "event: x\n", " "), st.just({"a": {}})),
    st.builds(data, JSON),
    st.sampled_from([b"data: [DONE]\n\n", b": keep-alive\n\n", b"\n", b"\n\n\n", b"data:\n\n"]),
    st.sampled_from([b'data: {"end": true}\r\n\r\n', b'data: {"end"\ndata: : true}\n\n']),
    st.sampled_from([b'data: {"end": true,}\n\n', b'data: {"end": true}}\n\n', b"\xff\xfe\n\n"]),
    st.binary(max_size=20),
)


def cut(text: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(
    st.lists(EVENT, max_size=8),
    st.lists(st.integers(0, 10**6), max_size=12),
    st.integers(0, 12),
)
@example([b'data: {"end": true}\n\n'], [19], 0)
def test_without_what_is_added_everything_is_as_it_came(
    parts: list[bytes], places: list[int], armed: int
) -> None:
    """``armed``: the number of the piece from which on something may be put in."""
    came = cut(b"".join(parts), places)
    events, left = Events(addition), []
    for number, piece in enumerate(came):
        if number < armed:
            events.follow(piece)
            left.append(piece)
        else:
            left.append(events.passing(piece))
    for piece, gone in zip(came, left, strict=True):
        assert gone.replace(MARK, b"") == piece.replace(MARK, b"")
        assert gone[-1:] == piece[-1:], "nothing is held back"


@given(st.lists(ASKS | st.sampled_from([b"data: [DONE]\n\n"]), min_size=1, max_size=6))
def test_whole_events_get_it_and_are_still_json(parts: list[bytes]) -> None:
    events = Events(addition)
    gone = b"".join(events.passing(part) for part in parts)
    assert gone == Events(addition).passing(b"".join(parts)), "one by one, or all in one piece"
    found = [line.removeprefix(b"data: ") for line in gone.split(b"\n\n") if line]
    contents = [json.loads(text) for text in found if text != b"[DONE]"]
    assert len(contents) == len([part for part in parts if b"[DONE]" not in part])
    for content, came in zip(contents, [p for p in parts if b"[DONE]" not in p], strict=True):
        assert content.pop("added") == "é"
        before = json.loads(came.removeprefix(b"data: "))
        before.pop("added", None)
        assert content == before


@given(st.integers(0, 18), st.booleans())
def test_an_event_in_two_pieces_gets_it_as_long_as_its_end_is_not_gone(
    place: int, followed: bool
) -> None:
    text = b'data: {"end": true}\n\n'
    events = Events(addition)
    if followed:  # as long as there is nothing to put in
        events.follow(text[:place])
        gone = text[:place]
    else:
        gone = events.passing(text[:place])
    gone += events.passing(text[place:])
    assert gone == text.replace(b"}", MARK + b"}")
    events = Events(addition)
    assert events.passing(text[:19]) + events.passing(text[19:]) == text, "it is gone"


def test_an_event_whose_beginning_was_too_long_passes_and_the_next_gets_it() -> None:
    events, text = Events(addition), b'data: {"end": true}\n\n'
    long = b"data: " + b" " * MOST_BYTES
    events.follow(long)
    assert events.passing(b'x{"end": true}\n\n' + text) == b'x{"end": true}\n\n' + text.replace(
        b"}", MARK + b"}"
    )


@pytest.mark.parametrize("text", [b"data: {}\n\n", b"data: {} {}\n\n", b"data: " + b"[" * 10**5])
def test_what_has_no_member_or_is_no_object_is_left_alone(text: bytes) -> None:
    events = Events(lambda content: MARK)
    assert events.passing(text) == text


def test_json_too_deep_to_be_read_passes() -> None:
    text = b'data: {"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}\n\n"
    assert Events(lambda content: MARK).passing(text) == text
