# SPDX-License-Identifier: Apache-2.0
"""Real engines, one after the other, that share a server: what one has served the next one reuses.

Apart from other tests of tiers, whose engine lives on: vLLM keeps one connector per process.
"""

from __future__ import annotations

import pytest
from engines import ask, text
from test_tiers import SHARED, ended, quoted, rest, started
from valkey_server import ValkeyServer
from vllm import LLM

pytestmark = pytest.mark.engine


def test_an_engine_elsewhere_reuses_what_another_one_has_put_into_the_shared_server(
    tiny_llama: str, plain: LLM, valkey_server: ValkeyServer
) -> None:
    llm = started(tiny_llama, host_gb=0.05, shared=valkey_server.url)
    there = quoted(llm, "tenant")
    prompt = text(350, 400)
    ask(llm, prompt)
    rest(llm)
    ended(llm)

    llm = started(tiny_llama, host_gb=0.05, shared=valkey_server.url)
    try:
        answer = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="tenant")[0]
        assert answer.report["reused"] == there.report["reused"]
        other = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="another")[0]
        assert (other.report["local"], other.report["reused"]) == (0, 0)
        exact = ask(llm, prompt + text(351, 20), hints={"mode": "seam"})[0]
        assert exact.report["local"] == 384
        assert exact.tokens == ask(plain, prompt + text(351, 20))[0].tokens
        valkey_server.kill()
        alone = ask(llm, text(352, 300), hints={"mode": "seam"})[0]
        assert alone.tokens == ask(plain, text(352, 300))[0].tokens
        rest(llm)
    finally:
        ended(llm)
