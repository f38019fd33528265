# SPDX-License-Identifier: Apache-2.0
"""Promises of per-request hints: what is understood, what is refused, and what spans restrict."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.hints import MAX_SPANS, HintError, Hints, parse_hints
from kvcomm_vllm.hints_http import HintsMiddleware


@dataclass(frozen=True)
class Piece:
    """As much of an index match as clipping may touch."""

    prompt_start: int
    sequence_start: int
    length: int


cuts = st.lists(st.integers(0, 60), unique=True, max_size=12).map(sorted)
spans = cuts.map(lambda c: tuple(zip(c[::2], c[1::2], strict=False)))


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": True}, "kvcomm", ["kvcomm"]])
def test_requests_without_hints_get_none(params: object) -> None:
    assert parse_hints(params) == Hints()


def test_every_hint_is_understood() -> None:
    given_hints = {"mode": "rotate", "agent": "solver", "seam_tokens": 0, "spans": [[0, 8], [8, 9]]}
    hints = parse_hints({"kvcomm": given_hints, "other": 1})
    assert hints == Hints("rotate", "solver", 0, ((0, 8), (8, 9)))
    assert parse_hints({"kvcomm": {"spans": []}}).spans == ()


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        (None, "kvcomm: must be an object of hints, but is None"),
        ("off", "kvcomm: must be an object of hints, but is 'off'"),
        ({"modes": "off"}, "unknown hint 'modes'; known hints: mode, agent, seam_tokens, spans"),
        ({"mode": "fast"}, "kvcomm.mode: 'fast' is not allowed; allowed: one of off, rotate, seam"),
        ({"mode": ["off"]}, "kvcomm.mode: ['off'] is not allowed"),
        ({"agent": ""}, "kvcomm.agent: '' is not allowed; allowed: a name of 1 to 256 characters"),
        ({"agent": "x" * 257}, "kvcomm.agent: "),
        ({"agent": 7}, "kvcomm.agent: 7"),
        ({"seam_tokens": True}, "kvcomm.seam_tokens: True"),
        ({"seam_tokens": 1.5}, "kvcomm.seam_tokens: 1.5"),
        ({"seam_tokens": 4097}, "allowed: a whole number from 0 to 4096"),
        ({"spans": {"a": 1}}, "kvcomm.spans: {'a': 1}"),
        ({"spans": [[0, 1]] * (MAX_SPANS + 1)}, "a list of at most 1024 [start, end] pairs"),
        ({"spans": [[0, 1, 2]]}, "kvcomm.spans[0]: [0, 1, 2] is not allowed"),
        ({"spans": [[0, True]]}, "a pair [start, end] of whole numbers"),
        ({"spans": ["01"]}, "kvcomm.spans[0]: '01'"),
        ({"spans": [[-1, 4]]}, "kvcomm.spans[0]: [-1, 4] is not allowed; allowed: 0 <= start"),
        ({"spans": [[4, 4]]}, "0 <= start < end"),
        ({"spans": [[0, 10**12]]}, "end <= 2147483647"),
        (
            {"spans": [[5, 9], [0, 4]]},
            "kvcomm.spans[1]: [0, 4] is not allowed; allowed: a start at",
        ),
        ({"spans": [[0, 5], [4, 9]]}, "at or after 5, where the last ended"),
    ],
)
def test_malformed_hints_are_refused_with_the_reason(hints: Any, said: str) -> None:
    with pytest.raises(HintError, match=re.escape(said)) as caught:
        parse_hints({"kvcomm": hints})
    assert len(str(caught.value)) < 300


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "off", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("mode"), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(["mode", "agent", "seam_tokens", "spans", "x"]), json_values)
)
def test_nothing_but_a_hint_error_ever_comes_out_of_parsing(hints: dict[str, object]) -> None:
    try:
        parsed = parse_hints({"kvcomm": hints})
    except HintError:
        return
    assert parse_hints({"kvcomm": json.loads(json.dumps(hints))}) == parsed


@given(spans, spans, st.integers(0, 50))
def test_spans_restrict_matches_to_exactly_the_allowed_tokens(
    allowed: tuple[tuple[int, int], ...], matched: tuple[tuple[int, int], ...], shift: int
) -> None:
    matches = [Piece(a, a + shift, b - a) for a, b in matched]
    clipped = Hints(spans=allowed).clip(matches)  # type: ignore[arg-type]
    covered = [p for m in clipped for p in range(m.prompt_start, m.prompt_start + m.length)]
    wanted = {p for a, b in allowed for p in range(a, b)}
    assert covered == sorted(wanted & {p for a, b in matched for p in range(a, b)})
    assert all(m.length > 0 and m.sequence_start == m.prompt_start + shift for m in clipped)
    assert Hints().clip(matches) == matches  # type: ignore[arg-type, comparison-overlap]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(HintsMiddleware)

    @app.post("/v1/completions")
    async def complete(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        return body

    return TestClient(app)


def test_malformed_hints_are_answered_with_http_400_and_the_reason(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"kv_transfer_params": {"kvcomm": {"mode": 1}}})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("kv_transfer_params.kvcomm.mode: 1 is not allowed")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello"},
        {"prompt": 'the word "kvcomm" in a prompt'},
        {"kv_transfer_params": {"kvcomm": {"mode": "off"}}},
        {"kv_transfer_params": None, "kvcomm": 3},
    ],
)
def test_other_requests_reach_the_route_unchanged(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()) == (200, body)


def test_hints_are_found_in_a_body_that_comes_in_pieces(client: TestClient) -> None:
    text = json.dumps({"kv_transfer_params": {"kvcomm": {"spans": [[3, 1]]}}}).encode()
    answer = client.post(
        "/v1/completions",
        content=(text[i : i + 1] for i in range(len(text))),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert "kvcomm.spans[0]" in answer.json()["detail"]


def test_a_body_that_is_not_json_is_left_to_the_route(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=b'{"kvcomm": ', headers=headers)
    assert answer.status_code == 422
