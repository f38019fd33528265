# SPDX-License-Identifier: Apache-2.0
"""Promises of per-request hints: what is understood, what is refused, and what spans restrict."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
from any_values import HUGE, LONG, is_short_line, json_values, nested
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.config import MODES
from kvcomm_vllm.front.hints_http import HintsMiddleware
from kvcomm_vllm.hints import MAX_SPANS, HintError, Hints, parse_hints
from kvcomm_vllm.wording import shown


@dataclass(frozen=True)
class Piece:
    """As much of an index match as clipping may touch."""

    prompt_start: int
    sequence_start: int
    length: int
    lead: int = 0


cuts = st.lists(st.integers(0, 60), unique=True, max_size=12).map(sorted)
spans = cuts.map(lambda c: tuple(zip(c[::2], c[1::2], strict=False)))


@pytest.mark.parametrize("params", [{}, {"do_remote_decode": True}, "kvcomm", ["kvcomm"]])
def test_requests_without_hints_get_none(params: object) -> None:
    assert parse_hints(params) == Hints()


@pytest.mark.parametrize(
    "params",
    [None, {"kvcomm": None}, {"kvcomm": {}}]
    + [{"kvcomm": {name: None}} for name in Hints.__dataclass_fields__]
    + [{"kvcomm": dict.fromkeys(Hints.__dataclass_fields__)}],
    ids=repr,
)
def test_null_is_as_good_as_not_given_at_every_level(params: object) -> None:
    assert parse_hints(params) == Hints()
    assert parse_hints(json.loads(json.dumps(params))) == Hints()


@pytest.mark.parametrize("agent", ["solver", "résumé writer", "軍師　二", "👩‍🔬", "x" * 256])
def test_an_agent_may_have_any_name_on_one_line(agent: str) -> None:
    assert parse_hints({"kvcomm": {"agent": agent}}).agent == agent


def test_every_hint_is_understood() -> None:
    given_hints = {"mode": "rotate", "agent": "solver", "seam_tokens": 0, "spans": [[0, 8], [8, 9]]}
    hints = parse_hints({"kvcomm": given_hints, "other": 1})
    assert hints == Hints("rotate", "solver", 0, ((0, 8), (8, 9)))
    assert parse_hints({"kvcomm": {"spans": []}}).spans == ()


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        (False, "kvcomm: must be an object of hints, but is False"),
        ([], "kvcomm: must be an object of hints, but is []"),
        (0, "kvcomm: must be an object of hints, but is 0"),
        ("", "kvcomm: must be an object of hints, but is ''"),
        (HUGE, "kvcomm: must be an object of hints, but is <number of about 5001 digits>"),
        (nested(100_000), "kvcomm: must be an object of hints, but is [[[...]]]"),
        ("off", "kvcomm: must be an object of hints, but is 'off'"),
        ({"modes": "off"}, "unknown hint 'modes'; known hints: mode, agent, seam_tokens, spans"),
        ({LONG: 1}, "kvcomm: unknown hint 'longlonglong"),
        ({"mode\n": 1}, r"kvcomm: unknown hint 'mode\n'; known hints: mode, agent"),
        ({str(number): number for number in range(10**5)}, "kvcomm: unknown hint '0'"),
        ({"mode": "fast"}, "kvcomm.mode: 'fast' is not allowed; allowed: one of off, rotate, seam"),
        ({"mode": ["off"]}, "kvcomm.mode: ['off'] is not allowed"),
        ({"agent": ""}, "kvcomm.agent: '' is not allowed; allowed: a name of 1 to 256 characters"),
        ({"agent": "x" * 257}, "kvcomm.agent: "),
        ({"agent": LONG}, "kvcomm.agent: 'longlonglong"),
        ({"agent": 7}, "kvcomm.agent: 7"),
        ({"agent": "two\nlines"}, r"kvcomm.agent: 'two\nlines' is not allowed"),
        ({"agent": "\u2028"}, r"kvcomm.agent: '\u2028' is not allowed"),
        ({"agent": "\x1b[31m"}, r"kvcomm.agent: '\x1b[31m' is not allowed"),
        ({"agent": "half \ud83d"}, r"kvcomm.agent: 'half \ud83d' is not allowed"),
        ({"agent": "nul\0"}, "none of them a control character"),
        ({"seam_tokens": True}, "kvcomm.seam_tokens: True"),
        ({"seam_tokens": 1.5}, "kvcomm.seam_tokens: 1.5"),
        ({"seam_tokens": 4097}, "allowed: a whole number from 0 to 4096"),
        ({"seam_tokens": HUGE}, "kvcomm.seam_tokens: <number of about 5001 digits>"),
        ({"seam_tokens": math.nan}, "kvcomm.seam_tokens: nan is not allowed"),
        ({"seam_tokens": math.inf}, "kvcomm.seam_tokens: inf is not allowed"),
        ({"learn": 1}, "kvcomm.learn: 1 is not allowed; allowed: true or false"),
        ({"spans": [None]}, "kvcomm.spans[0]: None is not allowed; allowed: a pair"),
        ({"spans": [[0, math.nan]]}, "kvcomm.spans[0]: [0, nan] is not allowed; allowed: a pair"),
        ({"spans": [[0, HUGE]]}, "kvcomm.spans[0]: [0, <number of about 5001 digits>]"),
        ({"spans": [[0, 1], LONG]}, "kvcomm.spans[1]: 'longlonglong"),
        ({"spans": [[n, n + 1] for n in range(10**5)]}, "a list of at most 1024 [start, end]"),
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
    ids=shown,
)
def test_malformed_hints_are_refused_with_the_reason(hints: Any, said: str) -> None:
    with pytest.raises(HintError, match=re.escape(said)) as caught:
        parse_hints({"kvcomm": hints})
    assert is_short_line(str(caught.value))


agents = st.text(max_size=4) | st.sampled_from(["\ud800", "a\nb", "x" * 256])
plausible = st.fixed_dictionaries(
    {},
    optional={
        "mode": json_values | st.sampled_from(MODES),
        "agent": json_values | agents,
        "seam_tokens": json_values | st.integers(0, 4096),
        "spans": json_values | st.lists(st.lists(st.integers(0, 99) | json_values, max_size=3)),
        "learn": json_values | st.booleans(),
    },
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3) | st.just("kvcomm"), json_values)
    | st.dictionaries(st.just("kvcomm"), plausible | json_values)
)
def test_any_json_at_all_gives_hints_within_bounds_or_one_short_line(params: object) -> None:
    try:
        hints = parse_hints(params)
    except HintError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert refused.startswith("kvcomm")
        assert is_short_line(refused)
        return
    assert hints.mode in (None, *MODES)
    assert hints.agent is None or len(hints.agent.encode().decode().splitlines()) == 1
    assert hints.seam_tokens is None or (
        type(hints.seam_tokens) is int and 0 <= hints.seam_tokens <= 4096
    )
    flat = [place for span in hints.spans or () for place in span]
    assert flat == sorted(flat)
    assert all(type(place) is int and 0 <= place < 2**31 for place in flat)
    assert type(hints.learn) is bool


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
    "hints",
    [
        '{"seam_tokens": 1e400}',
        '{"spans": [[0, NaN]]}',
        r'{"agent": "\ud800"}',
        r'{"\n": 1}',
        f'{{"seam_tokens": {10**400}}}',
        "[" * 400 + "]" * 400,
    ],
    ids=shown,
)
def test_what_only_json_can_say_is_answered_like_any_other_malformed_hint(
    client: TestClient, hints: str
) -> None:
    answer = client.post(
        "/v1/completions",
        content='{"kv_transfer_params": {"kvcomm": ' + hints + "}}",
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("kv_transfer_params.kvcomm")
    assert is_short_line(answer.json()["detail"])


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello"},
        {"prompt": 'the word "kvcomm" in a prompt'},
        {"kv_transfer_params": {"kvcomm": {"mode": "off"}}},
        {"kv_transfer_params": None, "kvcomm": 3},
        {"kv_transfer_params": {"kvcomm": None}},
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
