# SPDX-License-Identifier: Apache-2.0
"""Whatever requests with and without adapters come in whatever order, and whichever adapters are
replaced between them, none reads another one's KV: simulated pages know whose they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import words
from vllm.lora.request import LoRARequest

Make = Callable[..., EngineWithoutWorker]

ADAPTERS = [None, *(LoRARequest(f"a{n}", n, f"/adapters/{n}") for n in (1, 2, 3))]
TEXTS = [words(("text", number), 30) for number in range(3)]

asked = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.lists(asked, min_size=1, max_size=4)),
        st.tuples(st.just("replace"), st.integers(1, 3)),
        st.tuples(st.just("unload"), st.integers(1, 3)),
        st.tuples(st.just("idle"), st.just(0)),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    script=actions,
    mode=st.sampled_from(["rotate", "seam", "anchor", "paper"]),
    pipeline=st.integers(1, 2),
    loras=st.integers(1, 3),
    num_blocks=st.sampled_from([48, 160]),
)
def test_nobody_reads_another_adapter_s_kv(
    make_engine: Make,
    script: list[Any],
    mode: str,
    pipeline: int,
    loras: int,
    num_blocks: int,
) -> None:
    engine = make_engine(
        mode=mode,
        paper={"memory_mb": 1},
        pipeline=pipeline,
        loras=loras,
        num_blocks=num_blocks,
    )
    names = itertools.count()
    for action, given_to in script:
        if action == "ask":
            for adapter, agent, text in given_to:
                # vLLM's own hits on beginnings go by name and path, replaced or not
                who = words(("agent", agent, engine.memory.versions[adapter]), 16)
                prompt = [*who, *TEXTS[text], *words(("tail", agent), 5)]
                engine.add(str(next(names)), prompt, adapter=ADAPTERS[adapter])
                engine.gone.discard(adapter)
            engine.run()
        elif action == "replace":
            engine.memory.versions[given_to] += 1
            engine.gone.discard(given_to)
        elif action == "unload":
            engine.gone.add(given_to)
        else:
            engine.idle()
    engine.gone = set()
    engine.idle()
    check_idle(engine)
