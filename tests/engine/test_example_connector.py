# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``ExampleConnector`` keeps KV by the tokens of prompts: what was reused would be
anybody's. Listed beside ours it goes on as ever, ours is left out, and nothing in its folder is
approximate.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import Answer, ask, core, make_engine, text
from stored_kv import start_log
from vllm import LLM

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
]

SHARED = text(701, 192)
PROMPTS = [text(seed, 64) + SHARED + text(seed + 1, 6) for seed in (702, 704)]
TOLERANCE = 1e-3  # of log-probabilities, for batches of other shapes


@dataclass
class Served:
    """Answers of a fresh engine, what the plugin said at its start, and how many tokens the other
    connector loaded.
    """

    answers: list[Answer]
    log: list[str]
    loaded: int = 0


def served(model: str, ours: bool, last: bool, folder: Path) -> Served:
    example = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    with start_log() as log:
        llm = make_engine(model, {} if ours else None, beside=[example], last=last)
    try:
        (part,) = core(llm).scheduler.connector._connectors
        found = Served([], log)
        note = part.update_state_after_alloc

        def update_state_after_alloc(request: Any, blocks: Any, tokens: int) -> None:
            found.loaded += tokens
            note(request, blocks, tokens)

        part.update_state_after_alloc = update_state_after_alloc
        found.answers = [ask(llm, prompt, logprobs=3)[0] for prompt in PROMPTS]
    finally:
        llm.llm_engine.engine_core.shutdown()
        gc.collect()
    return found


@pytest.fixture(scope="module")
def dense(plain: LLM) -> list[Answer]:
    return [ask(plain, prompt, logprobs=3)[0] for prompt in PROMPTS]


def same(found: list[Answer], true: list[Answer]) -> None:
    assert [answer.tokens for answer in found] == [answer.tokens for answer in true]
    for one, other in zip(found, true, strict=True):
        for step, right in zip(one.logprobs, other.logprobs, strict=True):
            shared = step.keys() & right.keys()
            assert len(shared) >= 2
            difference = [step[token] - right[token] for token in shared]
            assert np.abs(difference).max() < TOLERANCE


@pytest.mark.parametrize("last", [False, True], ids=["ours first", "ours last"])
def test_answers_and_what_is_kept_of_them_are_plain_vllms(
    tiny_llama: str, dense: list[Answer], tmp_path: Path, last: bool
) -> None:
    first = served(tiny_llama, True, last, tmp_path)
    same(first.answers, dense)
    (warning,) = [line for line in first.log if "other_connector" in line]
    assert warning.endswith("Its other connectors stay: ExampleConnector.")
    fresh = served(tiny_llama, False, last, tmp_path)
    assert fresh.loaded > 400, "its answers come from the folder"
    same(fresh.answers, dense)
