# SPDX-License-Identifier: Apache-2.0
"""Real engines with vLLM's own file tier behind the pool."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import ask, connector, core, text
from since import TIERS
from small_cache import SHARED, ended, quoted, rest, started
from vllm import LLM, SamplingParams
from vllm.v1.request import Request

pytestmark = [pytest.mark.engine, pytest.mark.slow, TIERS]

PROMPT = text(350, 400)


def with_files(model: str, folder: Path) -> LLM:
    tier = {"type": "fs", "root_dir": str(folder), "n_read_threads": 2, "n_write_threads": 1}
    return started(model, host_gb=0.05, secondary_tiers=[tier])


def exact_names(llm: LLM, tokens: list[int], salt: str) -> list[str]:
    """By which names a plain vLLM looks for the pages of this text."""
    request = Request(
        request_id="plain",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=core(llm).request_block_hasher,
    )
    return [block_hash.hex() for block_hash in request.block_hashes]


def test_pages_in_vllms_file_tier_come_back_and_private_ones_have_names_nobody_can_compute(
    tiny_llama: str, plain: LLM, tmp_path: Path
) -> None:
    llm = with_files(tiny_llama, tmp_path)
    assert quoted(llm, "tenant").report["reused"] > 0
    ask(llm, PROMPT)
    rest(llm)
    files = {path.stem for path in tmp_path.rglob("*.bin")}
    half = connector(llm)._scheduler
    (private,) = (s for s in half.store.index._row_of if s.first_approximate is not None)
    first = private.first_approximate // half.block_size
    names = [name.hex() for name in private.block_hashes]
    exact = exact_names(llm, private.tokens.tolist(), "tenant")
    assert files.issuperset(names)
    assert names[:first] == exact[:first]
    assert exact[first:]
    assert files.isdisjoint(exact[first:]), "a plain lookup would find approximate KV"
    ended(llm)

    llm = with_files(tiny_llama, tmp_path)
    try:
        answer = ask(llm, PROMPT + text(351, 20), hints={"mode": "seam"})[0]
        assert answer.report["local"] == 384
        assert answer.tokens == ask(plain, PROMPT + text(351, 20))[0].tokens
        quote = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="tenant")[0]
        assert quote.report["reused"] == 0, "nobody has written down which text lies there"
        rest(llm)
    finally:
        ended(llm)
