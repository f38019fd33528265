# SPDX-License-Identifier: Apache-2.0
"""An estimate says of each request of a log what a real engine's report says of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_without_worker import EngineWithoutWorker
from plugin_settings import SETTINGS
from scripts import words

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.estimate.server import Prompt, ServerInThought

Make = Callable[..., EngineWithoutWorker]
SLOW = pytest.mark.slow

# what a product's user has, in the tokens of a test
PLANNED = {"min_reuse_share": 0.3, "private_price": 0.25, "max_unseen_share": 0.7}


def script(seed: int, requests: int) -> list[tuple[list[int], list[int], str | None]]:
    """Agents with prefixes of their own pass few texts round, and conversations grow."""
    chance = random.Random(seed)
    texts = [words((seed, "text", n), chance.randint(10, 60)) for n in range(8)]
    talks: list[list[int]] = []
    made = []
    for number in range(requests):
        answer = words((seed, "answer", number), chance.randint(1, 14))
        if talks and chance.random() < 0.4:
            prompt = chance.choice(talks) + words((seed, "turn", number), chance.randint(2, 12))
        else:
            prompt = words((seed, "agent", chance.randrange(4)), 18)
            for text in chance.sample(texts, chance.randint(1, 3)):
                prompt = prompt + words((seed, number), chance.randint(0, 9)) + text
        if len(prompt) > 220:
            continue
        talks.append(prompt + answer)
        if chance.random() < 0.5:
            texts[chance.randrange(len(texts))] = answer * 2
        made.append((prompt, answer, chance.choice([None, None, "red"])))
    return made


@pytest.mark.parametrize("blocks", [64, *(pytest.param(n, marks=SLOW) for n in (90, 512))])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        PLANNED,
        *(
            pytest.param(changes, marks=SLOW)
            for changes in (
                {"mode": "rotate"},
                {"report": "auto"},
                {"reuse_approximate": False},
                {"keep_last_page": False},
                {**PLANNED, "report": "auto"},
            )
        ),
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "plain",
)
def test_every_request_is_served_as_the_engine_serves_it(
    make_engine: Make, blocks: int, changes: dict[str, Any]
) -> None:
    engine = make_engine(num_blocks=blocks, **changes)
    config = KVCommConfig.from_mapping(SETTINGS | changes, "test")
    server = ServerInThought(config, (blocks - 1) * 4, 4)
    seen = 0
    for number, (prompt, answer, salt) in enumerate(script(blocks, 40)):
        real = engine.serve(str(number), prompt, answer, salt=salt).report
        ours = server.serve(as_prompt(prompt, answer, salt))
        if "spans" in real:  # coarse reports have whole pages alone
            assert [list(span) for span in ours.spans] == real["spans"]
        assert ours.local == real["local"]
        assert real["reused"] == ours.reused - (0 if "spans" in real else ours.reused % 4)
        assert ([ours.declined] if ours.declined else []) == list(real["declined"])
        seen += ours.reused
    assert seen > 0


@pytest.mark.parametrize("blocks", [64, 512])
def test_the_prefix_cache_alone_is_that_of_plain_vllm(plain_engine: Make, blocks: int) -> None:
    engine = plain_engine(num_blocks=blocks)
    server = ServerInThought(KVCommConfig.from_mapping(SETTINGS, "test"), (blocks - 1) * 4, 4)
    hits = 0
    for number, (prompt, answer, salt) in enumerate(script(blocks, 40)):
        engine.add(str(number), prompt, answer, salt=salt)
        first = engine.step()
        engine.run(str(number))
        ours = server.serve(as_prompt(prompt, answer, salt))
        assert ours.prefix_alone == len(prompt) - first.num_scheduled_tokens[str(number)]
        hits += ours.prefix_alone
    assert hits > 0


def test_a_log_is_the_sum_of_its_losses(make_engine: Make) -> None:
    server = ServerInThought(KVCommConfig.from_mapping(SETTINGS, "test"), 64 * 4, 4)
    for prompt, answer, salt in script(1, 60):
        ours = server.serve(as_prompt(prompt, answer, salt))
        assert ours.local + ours.reused + ours.computed == ours.prompt_tokens == len(prompt)
        assert sum(loss.tokens for loss in ours.losses) == ours.computed
        assert 0 <= ours.prefix_alone < ours.prompt_tokens
        places = [(loss.start, loss.end) for loss in ours.losses]
        places += [(start, end) for start, end, kind in ours.spans if kind != "computed"]
        assert [end for _, end in sorted(places)][:-1] == [start for start, _ in sorted(places)][1:]


def as_prompt(prompt: list[int], answer: list[int], salt: str | None) -> Prompt:
    return Prompt(np.array(prompt, np.int32), np.array(answer, np.int32), salt)
