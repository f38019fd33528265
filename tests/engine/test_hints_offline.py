# SPDX-License-Identifier: Apache-2.0
"""Offline, hints reach every request that is made for whoever gave them, and every answer has a
report, whichever way it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import ask, connector, text
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

from kvcomm_vllm.front.carried_hints import hints

pytestmark = pytest.mark.engine

SHARED = text(301, 200)
OFF = {"kv_transfer_params": {"kvcomm": {"mode": "off"}}}
END = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}

Way = Callable[[LLM, int, dict[str, Any] | None], Any]


def prompt(seed: int) -> list[int]:
    return text(seed, 70) + SHARED + text(seed + 1, 5)


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def generate(llm: LLM, seed: int, extra: dict[str, Any] | None) -> Any:
    prompts = [{"prompt_token_ids": prompt(seed + 10 * n)} for n in range(2)]
    return llm.generate(prompts, SamplingParams(extra_args=extra, **END), use_tqdm=False)


def params_of_each(llm: LLM, seed: int, extra: dict[str, Any] | None) -> Any:
    params = [SamplingParams(extra_args=extra, **END) for _ in range(2)]
    prompts = [{"prompt_token_ids": prompt(seed + 10 * n)} for n in range(2)]
    return llm.generate(prompts, params, use_tqdm=False)


def raw_text(llm: LLM, seed: int, extra: dict[str, Any] | None) -> Any:
    params = SamplingParams(extra_args=extra, **END)
    return llm.generate(words(prompt(seed)), params, use_tqdm=False)


def chat(llm: LLM, seed: int, extra: dict[str, Any] | None) -> Any:
    messages: Any = [{"role": "user", "content": words(prompt(seed))}]
    return llm.chat(messages, SamplingParams(extra_args=extra, **END), use_tqdm=False)


def samples(llm: LLM, seed: int, extra: dict[str, Any] | None) -> Any:
    params = SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True, extra_args=extra)
    return llm.generate({"prompt_token_ids": prompt(seed)}, params, use_tqdm=False)


def beams(llm: LLM, seed: int, extra: dict[str, Any] | None) -> Any:
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    return llm.beam_search([{"prompt_token_ids": prompt(seed)}], params)


@pytest.fixture
def served(reusing: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engine's requests as they end: outcome and reused tokens."""
    found: list[Any] = []
    stats = connector(reusing)._scheduler.stats
    count = stats.count_request

    def watch(state: Any) -> None:
        found.append((state.outcome, state.report()["reused"]))
        count(state)

    ask(reusing, text(302, 70) + SHARED + text(303, 5))
    monkeypatch.setattr(stats, "count_request", watch)
    return found


@pytest.mark.parametrize("way", [generate, params_of_each, raw_text, chat, samples])
def test_an_opt_out_holds_on_every_way_in(
    reusing: LLM, served: list[Any], way: Way, request: pytest.FixtureRequest
) -> None:
    seed = 1000 + 100 * len(request.node.name)
    assert way(reusing, seed, OFF)
    count = len(served)
    assert served == [("off", 0)] * count
    assert way(reusing, seed + 50, None)
    assert len(served) == 2 * count
    assert any(reused for _, reused in served[count:]), "there was nothing to opt out of"


@pytest.mark.parametrize("way", [generate, raw_text, chat, samples, beams])
def test_hints_of_a_block_hold_for_all_that_is_asked_inside(
    reusing: LLM, served: list[Any], way: Way
) -> None:
    seed = 5000 + 100 * len(way.__name__)
    with hints(mode="off"):
        assert way(reusing, seed, None)
    count = len(served)
    assert served == [("off", 0)] * count
    assert way(reusing, seed + 50, None)
    assert any(reused for _, reused in served[count:]), "there was nothing to opt out of"


def test_a_requests_own_hints_win_over_those_of_a_block(reusing: LLM, served: list[Any]) -> None:
    with hints(mode="off"):
        assert generate(reusing, 7000, {"kv_transfer_params": {"kvcomm": {"mode": "seam"}}})
    assert all(outcome == "reused" for outcome, _ in served)


def test_an_answer_that_a_stop_string_ends_has_its_report_and_its_text_is_reused(
    reusing: LLM, served: list[Any]
) -> None:
    """The engine hears of it only afterwards."""
    asked = prompt(8000)
    (free,) = ask(reusing, asked, tokens=80, hints={"mode": "off"})
    said = [f"w{token}" for token in free.tokens]
    # to the last word that nothing before begins with: "w3" would end an answer at "w31"
    new = [
        n for n, word in enumerate(said) if not any(before.startswith(word) for before in said[:n])
    ]
    length, stop = new[-1] + 1, said[new[-1]]
    reusing.reset_prefix_cache(reset_connector=True)
    params = SamplingParams(
        **{**END, "max_tokens": 80}, stop=[stop], include_stop_str_in_output=True, extra_args=OFF
    )
    (answer,) = reusing.generate({"prompt_token_ids": asked}, params, use_tqdm=False)
    (output,) = answer.outputs
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert list(output.token_ids) == free.tokens[:length]
    report = answer.kv_transfer_params["kvcomm"]
    assert (report["mode"], report["computed"]) == ("off", len(asked))
    (listener,) = ask(reusing, text(8500, 70) + free.tokens[:length] + text(8501, 5))
    assert listener.report["reused"] >= length - 8
    assert len(served) == 3


def test_samples_that_a_stop_string_ends_have_a_report(reusing: LLM, served: list[Any]) -> None:
    stops = [f"w{token}" for token in range(3, 512, 8)]
    params = SamplingParams(n=3, seed=1, max_tokens=400, ignore_eos=True, stop=stops)
    (answer,) = reusing.generate({"prompt_token_ids": prompt(9000)}, params, use_tqdm=False)
    assert [output.finish_reason for output in answer.outputs] == ["stop"] * 3
    assert answer.kv_transfer_params["kvcomm"]["prompt_tokens"] == 275
    assert len(served) == 3
