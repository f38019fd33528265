# SPDX-License-Identifier: Apache-2.0
"""Promises of carried hints: they reach every engine request made for whoever gave them, and no
other; no object of a caller is changed.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from kvcomm_vllm.compat import cli
from kvcomm_vllm.front.carried_hints import carry, hints, with_carried_hints
from kvcomm_vllm.hints import HintError

OFF = {"mode": "off"}


def hints_of(params: SamplingParams) -> Any:
    return ((params.extra_args or {}).get("kv_transfer_params") or {}).get("kvcomm")


@pytest.mark.parametrize(
    "extra",
    [
        None,
        {},
        {"other": 1},
        {"kv_transfer_params": None},
        {"kv_transfer_params": {"do_remote_decode": True}},
    ],
)
def test_a_request_without_hints_gets_the_carried_ones(extra: Any) -> None:
    params = SamplingParams(extra_args=extra, stop=["end"], seed=3)
    before = copy.deepcopy(params)
    with hints(**OFF):
        given = with_carried_hints(params)
    assert hints_of(given) == OFF
    assert params == before, "the caller's object is not ours to change"
    given.extra_args["kv_transfer_params"].pop("kvcomm")
    kept = {k: v or {} for k, v in (extra or {}).items()}
    assert given.extra_args == {"kv_transfer_params": {}, **kept}
    assert (given.stop, given.seed) == (["end"], 3)


@pytest.mark.parametrize("own", [{"mode": "seam"}, {}, None])
def test_hints_of_its_own_are_never_overwritten(own: Any) -> None:
    params = SamplingParams(extra_args={"kv_transfer_params": {"kvcomm": own}})
    with hints(**OFF):
        assert with_carried_hints(params) is params


def test_without_hints_nothing_is_touched() -> None:
    params = SamplingParams()
    assert with_carried_hints(params) is params
    with carry():
        assert with_carried_hints(params) is params
    with hints():
        assert with_carried_hints(params) is params


def test_pooling_requests_come_back_as_they_are() -> None:
    params = PoolingParams()
    with hints(**OFF):
        assert with_carried_hints(params) is params


def test_malformed_hints_are_refused_at_once() -> None:
    with pytest.raises(HintError, match=r"kvcomm\.mode"), hints(mode="fast"):
        pass


def test_the_inner_block_counts_and_ends_where_it_ends() -> None:
    found = []
    with hints(mode="seam"):
        with hints(**OFF):
            found.append(hints_of(with_carried_hints(SamplingParams())))
        found.append(hints_of(with_carried_hints(SamplingParams())))
    found.append(hints_of(with_carried_hints(SamplingParams())))
    assert found == [OFF, {"mode": "seam"}, None]


def test_tasks_inherit_the_hints_of_who_started_them_and_no_others() -> None:
    """Many requests at once, each with tasks of its own that outlive it, as beams do."""
    shared = SamplingParams()

    async def beam() -> Any:
        await asyncio.sleep(0)
        return hints_of(with_carried_hints(shared))

    async def request(number: int) -> list[asyncio.Task[Any]]:
        with carry() as carried:
            await asyncio.sleep(0)  # the others begin
            carried.given = {"agent": f"a{number}"} if number % 2 else None
            return [asyncio.create_task(beam()) for _ in range(3)]

    async def main() -> list[list[Any]]:
        requests = await asyncio.gather(*map(request, range(6)))
        return [await asyncio.gather(*tasks) for tasks in requests]

    for number, beams in enumerate(asyncio.run(main())):
        assert beams == [{"agent": f"a{number}"} if number % 2 else None] * 3


@pytest.mark.parametrize(("engine", "serving"), [(LLMEngine, False), (AsyncLLM, True)])
def test_every_request_of_an_engine_of_ours_comes_by(
    monkeypatch: pytest.MonkeyPatch, engine: type, serving: bool
) -> None:
    asked: list[Any] = []

    def add_request(self: Any, request_id: str, prompt: Any, params: Any, *rest: Any) -> None:
        asked.append((request_id, prompt, hints_of(params), *rest))

    monkeypatch.setattr(engine, "add_request", add_request)
    cli.wrap_front_end(serving)
    with hints(**OFF):
        engine.add_request(None, "r", "text", SamplingParams(), 1.5)
        engine.add_request(None, request_id="r", prompt="text", params=SamplingParams())
    assert asked == [("r", "text", OFF, 1.5), ("r", "text", OFF)]


def test_the_front_end_is_wrapped_once() -> None:
    cli.wrap_front_end(True)
    once = AsyncLLM.add_request
    cli.wrap_front_end(True)
    assert AsyncLLM.add_request is once
    assert once.__wrapped__.__name__ == "add_request"
    assert not hasattr(once.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("broken", [None, lambda self, prompt, params: None])
def test_a_front_end_that_is_not_as_expected_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cli.logger, "warning", lambda text, *a: said.append(text % a))
    monkeypatch.setattr(LLMEngine, "add_request", broken)
    cli.wrap_front_end(False)
    assert LLMEngine.add_request is broken
    assert len(said) == 1
    assert "LLMEngine.add_request cannot be wrapped" in said[0]
