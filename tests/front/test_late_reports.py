# SPDX-License-Identifier: Apache-2.0
"""Promises of late reports: whichever way a request ends, its last output has the report that came
with the first, and no output before shows one. The front end is vLLM's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import front_requests
import pytest
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from kvcomm_vllm.compat import cli
from kvcomm_vllm.front.late_reports import report_choices, with_batch_reports, with_choices_reports

EARLY = {"kvcomm": {"reused": 7}}
FINAL = {"kvcomm": {"reused": 7, "declined": {}}}
STOP = 9


class FrontEnd:
    """vLLM's output processor with one request, whose stop string is token 9."""

    def __init__(self, tokenizer: Any, kind: RequestOutputKind, samples: int = 1) -> None:
        cli.wrap_front_end(serving=False)
        self.processor = OutputProcessor(tokenizer, log_stats=False)
        params = SamplingParams(stop=[f"w{STOP}"], output_kind=kind, n=samples, max_tokens=99)
        _, self.queue = front_requests.begin(self.processor, "r-1", "r", params)

    def hear(self, *outputs: EngineCoreOutput) -> list[str]:
        """Requests that vLLM aborts in the engine after these outputs of it."""
        return self.processor.process_outputs(list(outputs)).reqs_to_abort

    def answer(self) -> RequestOutput | None:
        answer = self.queue.get_nowait()
        assert answer is None or isinstance(answer, RequestOutput)
        return answer


def output(token: int, name: str = "r-1", **given: Any) -> EngineCoreOutput:
    return EngineCoreOutput(request_id=name, new_token_ids=[token], **given)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_stop_string_ends_a_request_with_its_report(
    tokenizer: Any, kind: RequestOutputKind
) -> None:
    front = FrontEnd(tokenizer, kind)
    front.hear(output(20, kv_transfer_params=EARLY))
    early = [front.answer()]
    front.hear(output(21))
    early.append(front.answer())
    assert front.hear(output(STOP)) == ["r-1"]
    last = front.answer()
    assert [a.kv_transfer_params for a in early if a] == [None] * len([a for a in early if a])
    assert last is not None
    assert last.outputs[0].finish_reason == "stop"
    assert last.kv_transfer_params == EARLY


def test_outputs_that_are_merged_keep_the_report(tokenizer: Any) -> None:
    """A client that reads slowly gets several outputs as one."""
    front = FrontEnd(tokenizer, RequestOutputKind.DELTA)
    front.hear(output(20, kv_transfer_params=EARLY))
    front.hear(output(21))
    front.hear(output(STOP))
    answer = front.answer()
    assert answer is not None
    assert answer.finished
    assert answer.kv_transfer_params == EARLY


def test_a_report_stands_beside_what_another_connector_tells_at_the_end(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer, RequestOutputKind.FINAL_ONLY)
    front.hear(output(20, kv_transfer_params=EARLY))
    theirs = {"remote_engine_id": "x"}
    front.hear(output(21, finish_reason=FinishReason.LENGTH, kv_transfer_params=theirs))
    answer = front.answer()
    assert answer is not None
    assert answer.kv_transfer_params == {**EARLY, **theirs}


def test_a_stop_string_in_the_first_output(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer, RequestOutputKind.FINAL_ONLY)
    assert front.hear(output(STOP, kv_transfer_params=EARLY)) == ["r-1"]
    answer = front.answer()
    assert answer is not None
    assert answer.kv_transfer_params == EARLY


@pytest.mark.parametrize("reason", list(FinishReason))
@pytest.mark.parametrize("final", [FINAL, None], ids=["with", "without"])
def test_an_end_in_the_engine_has_its_own_report_or_the_early_one(
    tokenizer: Any, reason: FinishReason, final: dict[str, Any] | None
) -> None:
    front = FrontEnd(tokenizer, RequestOutputKind.FINAL_ONLY)
    front.hear(output(20, kv_transfer_params=EARLY))
    front.hear(output(21, finish_reason=reason, kv_transfer_params=final))
    answer = front.answer()
    assert answer is not None
    assert answer.kv_transfer_params == (final or EARLY)


def test_an_abort_in_the_front_end_is_answered_with_the_report(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer, RequestOutputKind.FINAL_ONLY)
    front.hear(output(20, kv_transfer_params=EARLY))
    assert front.processor.abort_requests(["r"], internal=False) == ["r-1"]
    answer = front.answer()
    assert answer is not None
    assert answer.outputs[0].finish_reason == "abort"
    assert answer.kv_transfer_params == EARLY


def test_samples_answer_with_the_report_of_the_last_to_end(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer, RequestOutputKind.FINAL_ONLY, samples=2)
    first, second = ({"kvcomm": {"reused": n}} for n in (1, 2))
    front.hear(output(20, "0_r-1", kv_transfer_params=first))
    front.hear(output(20, "1_r-1", kv_transfer_params=second))
    front.hear(output(STOP, "1_r-1"))
    assert front.answer() is None
    front.hear(output(STOP, "0_r-1"))
    answer = front.answer()
    assert answer is not None
    assert len(answer.outputs) == 2
    assert answer.kv_transfer_params == first


def test_params_of_another_connector_pass_as_they_are(tokenizer: Any) -> None:
    front = FrontEnd(tokenizer, RequestOutputKind.CUMULATIVE)
    front.hear(output(20, kv_transfer_params={"remote_block_ids": [1]}))
    answer = front.answer()
    assert answer is not None
    assert answer.kv_transfer_params == {"remote_block_ids": [1]}


# ---- several prompts, one response --------------------------------------------------------------


def result(number: int, samples: int = 1) -> Any:
    params = {"kvcomm": {"reused": number}}
    return SimpleNamespace(kv_transfer_params=params, outputs=[None] * samples)


def response(choices: int) -> Any:
    return SimpleNamespace(choices=[SimpleNamespace() for _ in range(choices)])


def reused(choice: Any) -> int:
    return int(choice.kv_transfer_params["kvcomm"]["reused"])


def test_each_choice_has_the_report_of_its_prompt() -> None:
    given = response(5)
    report_choices(given.choices, [result(1, 2), result(2, 2), result(3)])
    assert [reused(choice) for choice in given.choices] == [1, 1, 2, 2, 3]


def test_choices_that_do_not_fit_the_results_get_none() -> None:
    given = response(3)
    report_choices(given.choices, [result(1), result(2)])
    assert not any(hasattr(choice, "kv_transfer_params") for choice in given.choices)


@pytest.mark.parametrize(("prompts", "have"), [(1, False), (2, True)])
def test_a_list_of_prompts_has_a_report_for_each(prompts: int, have: bool) -> None:
    respond = with_choices_reports(lambda self, results, *rest: response(len(results)))
    given = respond(None, [result(n) for n in range(prompts)], "request")
    assert [hasattr(choice, "kv_transfer_params") for choice in given.choices] == [have] * prompts


@pytest.mark.parametrize("failed", [False, True])
def test_a_batch_has_a_report_for_each_conversation_and_leaves_no_generator_open(
    failed: bool,
) -> None:
    closed: list[int] = []

    async def generate(number: int) -> AsyncIterator[Any]:
        try:
            yield result(number)
            yield result(number + 1)
        finally:
            closed.append(number)

    async def respond(self: Any, request: Any, generators: Any, *rest: Any) -> Any:
        assert (request, rest) == ("request", ("id", "model"))
        for generator in generators:
            if failed:
                await anext(generator)
                await generator.aclose()
            else:
                assert [output async for output in generator]
        return SimpleNamespace(error="gone") if failed else response(len(generators))

    wrapped = with_batch_reports(respond)
    given = asyncio.run(wrapped(None, "request", [generate(10), generate(20)], "id", "model"))
    assert closed == [10, 20]
    if failed:
        assert vars(given) == {"error": "gone"}
    else:
        assert reused(given) == 11
        assert [reused(choice) for choice in given.choices] == [11, 21]
