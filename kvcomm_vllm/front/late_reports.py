# SPDX-License-Identifier: Apache-2.0
"""Reports of requests that vLLM's front end ends by itself, and of prompts that come as a list.

vLLM answers with the ``kv_transfer_params`` of a request's last output. A stop string is found in
the front end, which answers at once; that the request is over the engine hears later, so its last
output is one like any other. The engine therefore tells each report with the first output already
(:meth:`kvcomm_vllm.scheduler.half.SchedulerHalf.tell`), and the front end keeps it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from kvcomm_vllm.front.stream_reports import tell_listener
from kvcomm_vllm.hints import FIELD

KEPT = "kvcomm_report"


def with_kept_report(make_output: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``RequestState.make_request_output``: only the last output shows a report, and it
    shows the one that came first if it brings none, beside what other connectors tell.
    """

    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        if finish_reason is not None:
            kept = getattr(self, KEPT, None) or {}
            kv_transfer_params = {**kept, **(kv_transfer_params or {})} or None
            tell_listener(self, kv_transfer_params)
        elif kv_transfer_params is not None and FIELD in kv_transfer_params:
            setattr(self, KEPT, kv_transfer_params)
            kv_transfer_params = None
        return make_output(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            kv_transfer_params,
            *rest,
            **named,
        )

    return make_request_output


def with_batch_reports(respond: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``OpenAIServingChatBatch.chat_completion_full_generator_batch``: the response gets
    the first conversation's report, as vLLM has it for a list of prompts, each choice its own.
    """

    async def chat_completion_full_generator_batch(
        self: Any, request: Any, generators: Sequence[Any], *rest: Any, **named: Any
    ) -> Any:
        results: list[Any] = [None] * len(generators)

        async def watch(number: int, generator: Any) -> AsyncIterator[Any]:
            async with aclosing(generator) as outputs:  # what the client gives up is to be aborted
                async for output in outputs:
                    results[number] = output
                    yield output

        watched = [watch(number, generator) for number, generator in enumerate(generators)]
        response = await respond(self, request, watched, *rest, **named)
        if hasattr(response, "choices"):  # no error
            response.kv_transfer_params = results[0].kv_transfer_params
            report_choices(response.choices, results)
        return response

    return chat_completion_full_generator_batch


def with_choices_reports(respond: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``OpenAIServingCompletion.request_output_to_completion_response``: of a list of
    prompts, each choice gets its report.
    """

    def request_output_to_completion_response(
        self: Any, results: Sequence[Any], *rest: Any, **named: Any
    ) -> Any:
        response = respond(self, results, *rest, **named)
        if len(results) > 1:
            report_choices(response.choices, results)
        return response

    return request_output_to_completion_response


def report_choices(choices: Sequence[Any], results: Sequence[Any]) -> None:
    """Give each choice the ``kv_transfer_params`` of the result it is from: results are in order,
    and each has one choice per sample.
    """
    params = [result.kv_transfer_params for result in results for _ in result.outputs]
    if len(params) == len(choices):
        for choice, given in zip(choices, params, strict=True):
            if given is not None:
                choice.kv_transfer_params = given
