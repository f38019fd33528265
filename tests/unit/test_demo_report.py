# SPDX-License-Identifier: Apache-2.0
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvcomm_vllm.cli.agents import Agent
from kvcomm_vllm.cli.client import Answer
from kvcomm_vllm.cli.pipeline import LiveCall, Replay, TracedCall, equal_leading_share
from kvcomm_vllm.cli.report import agent_rows, headline, render_table, sooner, write_json
from kvcomm_vllm.cli.treatment import Treatment

IDS = st.lists(st.integers(0, 3), max_size=12).map(tuple)


def answer(ttft_ms: float, ids: tuple[int, ...] = (1, 2, 3, 4), prompt_tokens: int = 100) -> Answer:
    return Answer("text", ids, prompt_tokens, 0, ttft_ms, ttft_ms + 50, {})


def call(question: str, agent: str, ttft_ms: float, treatment: Treatment | None) -> LiveCall:
    return LiveCall(question, Agent(agent, "system"), [], answer(ttft_ms), treatment)


CALLS = [
    call("q1", "Reader", 100, Treatment(10, 0, 90)),
    call("q1", "Editor", 10, Treatment(10, 80, 10)),
    call("q2", "Reader", 300, Treatment(30, 0, 70)),
    call("q2", "Editor", 30, Treatment(10, 60, 30)),
]
REPLAYS = [
    Replay(cold=answer(1000, ids=(1, 2, 9, 9)), warm=answer(500, ids=(1, 2, 9, 0))),
    Replay(cold=answer(2000), warm=answer(800)),
    Replay(cold=answer(3000, ids=(1, 2, 3, 4)), warm=answer(700, ids=(1, 2, 3, 4))),
    Replay(cold=answer(4000), warm=answer(1600)),
]


@given(IDS, IDS)
def test_agreement_is_one_for_equal_answers_only(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    share = equal_leading_share(first, second)
    assert 0 <= share <= 1
    assert (share == 1) == (first == second)
    assert share == equal_leading_share(second, first)


@given(IDS, IDS, IDS)
def test_agreement_counts_leading_tokens_and_nothing_after_the_first_difference(
    common: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    one, other = (*common, 7, *first), (*common, 8, *second)
    assert equal_leading_share(one, other) == len(common) / max(len(one), len(other))


def test_rows_are_medians_over_questions_with_ratios_of_medians() -> None:
    reader, editor = agent_rows(CALLS, REPLAYS)
    assert (reader.agent, editor.agent) == ("Reader", "Editor")
    assert (reader.local, reader.reused, reader.computed) == (20, 0, 80)
    assert (reader.ttft_plain_ms, reader.ttft_cached_ms, reader.ttft_kvcomm_ms) == (2000, 600, 200)
    assert (reader.speedup_plain, reader.speedup_cached) == (10, 3)
    assert reader.agreement == pytest.approx((0.5 + 1) / 2)
    assert reader.plain_agreement == pytest.approx((0.75 + 1) / 2)
    assert editor.speedup_cached == 60


def test_uncounted_tokens_are_not_reported_as_zero() -> None:
    calls = [*CALLS[:3], call("q2", "Editor", 30, None)]
    reader, editor = agent_rows(calls, REPLAYS)
    assert reader.reused == 0
    assert editor.reused is None
    assert " - " in printed(calls)


def printed(calls: list[LiveCall]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_table(agent_rows(calls, REPLAYS), 2, 256))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_a_terminal_of_80_columns_without_cutting_anything() -> None:
    wide = [
        LiveCall(
            c.question,
            c.agent,
            [],
            answer(99_999.0, prompt_tokens=8_192),
            Treatment(*[8_192] * 3),
        )
        for c in CALLS
    ]
    text = printed(wide)
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("8,192") == 8
    assert text.count("99,999") == 2


def test_the_headline_compares_with_prefix_caching_and_not_with_the_weaker_baseline() -> None:
    text = headline(agent_rows(CALLS, REPLAYS))
    assert "0.2 s instead of 1.8 s with prefix caching" in text
    assert "60.0x sooner (20 ms instead of 1,200 ms)" in text


def test_a_loss_is_not_called_a_gain() -> None:
    assert sooner(2.0) == "2.0x sooner"
    assert sooner(0.5) == "2.0x later"
    assert sooner(0.99) == sooner(1.01) == "as soon"


def test_json_holds_the_settings_the_rows_and_every_call(tmp_path: Path) -> None:
    traced = [TracedCall(Agent("Reader", "s"), answer(1), {"spans": [[0, 100, "local"]]})]
    file = tmp_path / "demo.json"
    write_json(file, {"model": "m"}, agent_rows(CALLS, REPLAYS), CALLS, REPLAYS, traced)
    report = json.loads(file.read_text())
    assert report["model"] == "m"
    assert [row["agent"] for row in report["agents"]] == ["Reader", "Editor"]
    assert report["calls"][1]["ttft_ms"] == {"plain": 2000, "prefix_cache": 800, "kvcomm": 10}
    treatment = report["calls"][1]["treatment"]
    assert (treatment["local"], treatment["reused"], treatment["computed"]) == (10, 80, 10)
    assert report["trace"][0]["report"]["spans"] == [[0, 100, "local"]]
