# SPDX-License-Identifier: Apache-2.0
"""Who does not reuse is told why, and is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvcomm_vllm.messages import WorkerFacts

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]


def with_source(engine: EngineWithoutWorker, **options: Any) -> EngineWithoutWorker:
    engine.serve("source", [*words("one", 20), *QUESTION], **options)
    return engine


def test_mode_off_in_the_hints(make_engine: Make) -> None:
    engine = with_source(make_engine())
    second = engine.serve("second", READER, hints={"mode": "off", "agent": "judge"})
    assert second.declined == ["mode_off"]
    assert (second.report["mode"], second.report["agent"]) == ("off", "judge")
    check_report(engine, "second")


def test_mode_off_in_the_configuration_can_be_overridden(make_engine: Make) -> None:
    engine = with_source(make_engine(mode="off"))
    assert engine.serve("second", READER).declined == ["mode_off"]
    third = engine.serve("third", [*words("3", 9), *QUESTION, 3], hints={"mode": "seam"})
    assert third.report["reused"] == 38


def test_without_default_on_only_those_who_ask(make_engine: Make) -> None:
    engine = with_source(make_engine(default_on=False))
    assert engine.serve("second", READER).declined == ["not_asked"]
    third = engine.serve("third", [*words("3", 9), *QUESTION, 3], hints={"mode": "rotate"})
    assert third.report["reused"] == 40


def test_who_does_not_reuse_is_reused_all_the_same(make_engine: Make) -> None:
    engine = with_source(make_engine(), hints={"mode": "off"})
    assert engine.serve("second", READER).report["reused"] == 38


@pytest.mark.parametrize(
    "hints",
    [
        {"mode": "fast"},
        {"unknown": 1},
        {"spans": [[5, 2]]},
        {"spans": "all"},
        {"seam_tokens": -1},
        "seam",
        7,
        [],
    ],
    ids=repr,
)
def test_who_gives_bad_hints_is_served_exactly_and_told_why(
    make_engine: Make, hints: object
) -> None:
    """Who misspells "off" must not get reuse."""
    engine = with_source(make_engine())
    second = engine.serve("second", READER, hints=hints)
    assert second.loaded == []
    assert second.declined == ["bad_hints"]
    assert second.report["message"].startswith("kvcomm")


def test_a_prompt_that_shares_nothing(make_engine: Make) -> None:
    engine = with_source(make_engine())
    assert engine.serve("second", words("new", 30)).declined == ["no_match"]


def test_no_report_when_it_is_not_wanted(make_engine: Make) -> None:
    engine = with_source(make_engine(report="off"))
    assert engine.serve("second", READER).report == {}
    assert engine.served["second"].loaded


def special_request(engine: EngineWithoutWorker, **fields: Any) -> Request:
    given = {"request_id": "special", "prompt_token_ids": list(READER)} | fields
    return Request(
        sampling_params=SamplingParams(max_tokens=2),
        pooling_params=None,
        block_hasher=engine.hasher,
        **given,
    )


def embeds() -> dict[str, Any]:
    return {"prompt_token_ids": None, "prompt_embeds": torch.zeros(len(READER), 4)}


def mixed_embeds() -> dict[str, Any]:
    of_token = [True] * (len(READER) - 1) + [False]
    return {"prompt_embeds": torch.zeros(len(READER), 4), "prompt_is_token_ids": of_token}


def image() -> dict[str, Any]:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    where = PlaceholderRange(offset=2, length=4)
    return {"mm_features": [MultiModalFeatureSpec(None, "image", "hash", where)]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (embeds, "prompt_embeds"),
        (mixed_embeds, "prompt_embeds"),
        (image, "multimodal"),
    ],
)
def test_what_does_not_follow_from_token_ids_is_neither_served_nor_stored(
    make_engine: Make, fields: Callable[[], dict[str, Any]], reason: str
) -> None:
    engine = with_source(make_engine())
    half, blocks = engine.half, list(range(1, 15))
    request = special_request(engine, **fields())
    half.on_new_request(request)
    assert half.match(request, 0) == (0, False)
    half.admit(request, blocks, 0)
    report = half.finish(request, blocks)
    assert report is not None
    assert report["kvcomm"]["declined"] == {reason: 1}
    assert report["kvcomm"]["computed"] == len(READER)
    assert [sequence.owner for sequence in half.store.index._row_of] == ["source"]


def test_one_rank_that_cannot_reuse_turns_it_off_for_all(make_engine: Make) -> None:
    engine = make_engine()
    ranks = {0: WorkerFacts(None, "", "fine"), 1: WorkerFacts("unknown_backend", "odd", "")}
    engine.connector.set_xfer_handshake_metadata(ranks)
    with_source(engine)
    second = engine.serve("second", READER)
    assert second.loaded == []
    assert second.declined == ["unknown_backend"]
    assert second.spans("computed") == [(0, 56)]
    assert len(engine.half.store.index) == 0, "what is never read need not be remembered"
    check_idle(engine)


def test_reuse_stays_off_when_no_worker_answers(make_engine: Make) -> None:
    engine = make_engine()
    engine.connector.set_xfer_handshake_metadata({})
    assert with_source(engine).serve("second", READER).loaded == []
