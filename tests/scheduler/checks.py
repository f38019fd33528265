# SPDX-License-Identifier: Apache-2.0
"""What must hold after every step, whatever the requests were."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import inf

import numpy as np
from engine_without_worker import EngineWithoutWorker
from simulated_memory import PageClaim
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_block_hash, get_group_id

from kvcomm_vllm.messages import RequestOps
from kvcomm_vllm.scheduler.idle.lesson import HOLDER
from kvcomm_vllm.scheduler.tiers.pool import HostPool


def check_all(engine: EngineWithoutWorker) -> None:
    check_exact_hashes(engine)
    check_references(engine)
    check_index(engine)
    check_states(engine)


def cached_pages(engine: EngineWithoutWorker, group: int = 0) -> list[tuple[bytes, KVCacheBlock]]:
    """Every (hash, page) of a KV cache group in vLLM's prefix cache."""
    found = []
    for key, blocks in engine.pool.cached_block_hash_to_block._cache.items():
        if get_group_id(key) != group:
            continue
        for block in [blocks] if isinstance(blocks, KVCacheBlock) else blocks.values():
            found.append((bytes(get_block_hash(key)), block))
    return found


def exactly_hashed(engine: EngineWithoutWorker) -> set[bytes]:
    """Hashes in the cache that a request without our connector could look up."""
    return {block_hash for block_hash, _ in cached_pages(engine)} & engine.exact_pages.keys()


def check_exact_hashes(engine: EngineWithoutWorker) -> None:
    """What anybody can look up holds what a dense prefill would have written."""
    filling, full = pages_in_use(engine), engine.memory.full_pages()
    claims, partial = [], engine.partial_names
    assert partial.isdisjoint(engine.exact_pages)
    for block_hash, block in cached_pages(engine):
        page = block.block_id
        if page not in full and block_hash not in partial:
            # vLLM hashes pages when it allocates them; somebody must be about to fill them
            assert page in filling, f"page {page} is cached, was never written and has no owner"
        elif block_hash in engine.exact_pages:
            text, index = engine.exact_pages[block_hash]
            claims.append(PageClaim(page, text, index, inf, "under an exact hash"))
    engine.memory.check_pages(claims)


def pages_in_use(engine: EngineWithoutWorker) -> Counter[int]:
    """How often each page stands in a request's block table."""
    count: Counter[int] = Counter()
    for name in engine.scheduler.requests:
        for table in engine.scheduler.kv_cache_manager.get_block_ids(name):
            count.update(table)
    for _, blocks in engine.scheduler.deferred_frees:
        count.update(block.block_id for block in blocks)
    return count


def check_references(engine: EngineWithoutWorker) -> None:
    """Every reference to a page is one of a block table or of a plan in flight."""
    expected = pages_in_use(engine)
    held = engine.half.pages._held
    for blocks in held.values():
        expected.update(block.block_id for block in blocks)
    for block in engine.pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == expected[block.block_id], f"page {block.block_id}"
    on_their_way: set[str] = set()
    for job in engine.jobs:
        message = job.output.kv_connector_metadata
        on_their_way.update(ops.request_id for ops in message.requests)
        on_their_way.update(f"{probe.request_id} probe" for probe in message.probes)
        if message.lesson is not None:
            on_their_way.add(HOLDER)
    on_their_way.update(transfers(engine))
    assert held.keys() <= on_their_way, "pages held for a plan that is in no step"


def transfers(engine: EngineWithoutWorker) -> set[str]:
    """Who holds pages that are being copied to or from the host pool, or have just come back."""
    tiers = engine.half.tiers
    if not isinstance(tiers, HostPool):
        return set()
    found = {f"{what} {number}" for number in tiers._ranks_done for what in ("store", "return")}
    return found.union(*(waiting.holders for waiting in tiers._returns._waiting.values()))


def check_index(engine: EngineWithoutWorker) -> None:
    """What the index offers is there: the very tokens at their positions, exact where it says."""
    filling, full = pages_in_use(engine), engine.memory.full_pages()
    claims = []
    for sequence in engine.half.store.index._row_of:
        if not sequence.ready:
            continue
        text = engine.served[sequence.owner].text
        assert np.array_equal(sequence.tokens, text.tokens[: len(sequence.tokens)])
        first = inf if sequence.first_approximate is None else sequence.first_approximate
        for index, block_hash in enumerate(sequence.block_hashes):
            block = engine.half.pages.lookup(block_hash)
            if block is not None and (block.block_id in full or not filling[block.block_id]):
                name = f"of sequence {sequence.owner}"
                end = len(sequence.tokens)
                claims.append(PageClaim(block.block_id, text, index, first, name, end))
    engine.memory.check_pages(claims)


def check_states(engine: EngineWithoutWorker) -> None:
    """The scheduler half remembers the requests that vLLM has, and no others."""
    alive = {name for name, r in engine.scheduler.requests.items() if not r.is_finished()}
    assert engine.half.states.keys() == alive
    assert engine.half.store._filling.keys() <= engine.half.states.keys()
    limit = engine.half.config.max_sequences
    assert len(engine.half.store.index) <= limit


def check_idle(engine: EngineWithoutWorker) -> None:
    """With no request left, every page is free."""
    check_all(engine)
    assert not engine.scheduler.requests
    assert engine.half.pages.held == 0
    assert engine.pool.get_num_free_blocks() == len(engine.pool.blocks) - 1


def check_report(engine: EngineWithoutWorker, name: str) -> None:
    """The report of a finished request adds up, and is what happened."""
    served = engine.served[name]
    report = served.report
    assert report["prompt_tokens"] == served.prompt_tokens
    assert report["local"] + report["reused"] + report["computed"] == served.prompt_tokens
    spans = report["spans"]
    assert spans[0][0] == 0
    assert spans[-1][1] == served.prompt_tokens
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    for treatment in ("local", "reused", "computed"):
        total = sum(end - start for start, end, kind in spans if kind == treatment)
        assert total == report[treatment]
    assert report["seam"] + report["gap"] <= report["computed"]
    if report["reused"]:
        told = [span for span in spans if span[2] == "reused"]
        # one that an operator's reset sent back has more than one plan, and tells of the last
        (first,) = [ops for ops in served.loaded if loaded_spans(ops) == told][:1]
        # text that is computed again cuts what is loaded in parts
        assert 0 < len(report["placeholders"]) <= len(first.loads) + len(first.estimates)


def loaded_spans(ops: RequestOps) -> list[list[object]]:
    """What operations bring, in the form of the report."""
    loads = [(op.prompt_start, op.prompt_start + op.length) for op in ops.loads]
    for op in ops.estimates:
        loads.append((op.base.prompt_start, op.base.prompt_start + op.base.length))
        loads.append((op.start, op.stop))
    return [[start, end, "reused"] for start, end in sorted(loads) if start < end]
