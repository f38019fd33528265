# SPDX-License-Identifier: Apache-2.0
"""What lies on disk, and what is remembered of it, stays within limits however much is stored."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.kv_offload.tiering.base import TransferJob

from kvcomm_vllm.compat.offload import key_of
from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex
from kvcomm_vllm.scheduler.tiers.checked import TAIL
from kvcomm_vllm.scheduler.tiers.disk import DiskTier
from kvcomm_vllm.scheduler.tiers.folder import FILES, FolderManifests
from kvcomm_vllm.scheduler.tiers.manifests import packed

KEY = bytes(32)
SEQUENCES = 10_000
PAGE = 256  # bytes
LIMIT = 100 * (PAGE + TAIL)
TOKENS = 24
AT_ONCE = 20  # pages on their way together


class Engine:
    """Its disk tier alone, under a pool of few pages."""

    def __init__(self, root: Path) -> None:
        self.memory = np.zeros((AT_ONCE, PAGE), np.int8)
        cache = SimpleNamespace(tokens_per_hash=32)
        model = SimpleNamespace(name="model", dtype="float32")
        parallel = SimpleNamespace(
            **dict.fromkeys(("tp_size", "pp_size", "pcp_size", "dcp_size"), 1),
            rank=0,
            is_parallelism_agnostic=True,
        )
        config = SimpleNamespace(
            groups=[], canonical_layout=False, cache=cache, model=model, parallel=parallel
        )
        config.replicated_layout = False
        spec: Any = SimpleNamespace(blocks_per_chunk=1, config=config, kv_events_config=None)
        view = memoryview(self.memory)
        self.tier = DiskTier(spec, view, "kvcomm_disk", root_dir=str(root), max_bytes=LIMIT)
        self._jobs = 0

    def store(self, numbers: Iterable[int]) -> None:
        """Begin to store pages with names of these numbers."""
        keys = [key_of(number.to_bytes(32, "big")) for number in numbers]
        self._jobs += 1
        chunks = np.arange(len(keys))
        self.tier.submit_store(job(self._jobs, keys, chunks))

    def rest(self) -> None:
        self.tier.drain_jobs()
        assert all(result.success for result in self.tier.get_finished_jobs())


def job(number: int, keys: list[Any], chunks: np.ndarray) -> TransferJob:
    given = {"job_id": number, "keys": keys, "chunk_ids": chunks, "is_promotion": False}
    names = TransferJob.__dataclass_fields__
    return TransferJob(**{name: given.get(name) for name in names})


def size(folder: Path, ending: str) -> int:
    return sum(os.stat(path).st_size for path in folder.rglob(f"*{ending}"))


@pytest.mark.slow
def test_pages_of_two_engines_keep_one_limit_over_ten_thousand_sequences(tmp_path: Path) -> None:
    engines = [Engine(tmp_path), Engine(tmp_path)]
    most = 0
    for start in range(0, SEQUENCES, 2 * AT_ONCE):
        for at, engine in enumerate(engines):
            first = start + at * AT_ONCE
            engine.store(range(first, first + AT_ONCE))
        for engine in engines:
            engine.rest()
        most = max(most, size(tmp_path, ".bin"))
    assert 0.8 * LIMIT < most <= LIMIT + len(engines) * (PAGE + TAIL)
    newest = key_of((SEQUENCES - 1).to_bytes(32, "big"))
    assert os.path.exists(engines[0].tier.file_mapper.get_file_name(newest))
    for engine in engines:
        engine.tier.shutdown()


def test_a_new_engine_counts_what_it_finds(tmp_path: Path) -> None:
    for start in range(0, 5 * AT_ONCE, AT_ONCE):
        engine = Engine(tmp_path)
        engine.store(range(start, start + AT_ONCE))
        engine.rest()
        engine.tier.shutdown()
        (tmp_path / "used").unlink()
    engine = Engine(tmp_path)
    engine.store(range(1000, 1010))
    engine.rest()
    engine.tier.shutdown()
    assert size(tmp_path, ".bin") <= LIMIT


def sequence(number: int) -> Sequence:
    tokens = np.arange(number * TOKENS, (number + 1) * TOKENS, dtype=np.int32)
    names = [number.to_bytes(32, "big")]
    return Sequence(number, b"n" * 16, tokens, names, TOKENS, None, True, f"owner {number}", 0)


@pytest.mark.slow
def test_manifests_keep_their_limit_and_the_newest_are_found(tmp_path: Path) -> None:
    record = len(packed(sequence(SEQUENCES))) + 4
    limit = 500 * record
    one, other = (FolderManifests(tmp_path, KEY, max_bytes=limit) for _ in range(2))
    most = 0
    for number in range(SEQUENCES):
        (one if number % 2 else other).append(sequence(number))
        if number % 50 == 0:
            most = max(most, size(tmp_path, ".log"))
    assert 0.8 * limit < most <= limit + limit // FILES + 2 * record
    found = {record.names[0] for record in FolderManifests(tmp_path, KEY, max_bytes=limit).news()}
    lately = {number.to_bytes(32, "big") for number in range(SEQUENCES - 400, SEQUENCES)}
    assert lately <= found


def test_a_reader_remembers_no_file_that_is_gone(tmp_path: Path) -> None:
    limit = 50 * len(packed(sequence(0)))
    writer, reader = (
        FolderManifests(tmp_path, KEY, max_bytes=limit),
        FolderManifests(tmp_path, KEY, max_bytes=limit),
    )
    for number in range(500):
        writer.append(sequence(number))
        list(reader.news())
    files = len(list(tmp_path.iterdir()))
    assert len(reader._read_to) <= files
    assert len(writer._own) <= files + 1


def test_the_index_remembers_no_more_than_it_may_of_what_is_read(tmp_path: Path) -> None:
    writer = FolderManifests(tmp_path, KEY)
    for number in range(400):
        writer.append(sequence(number))
    index = SequenceIndex(block_size=32, window_tokens=4, max_sequences=100)
    for number, record in enumerate(FolderManifests(tmp_path, KEY).news()):
        index.add(record.namespace, record.token_ids(), record.names, 1, None, True, f"{number}")
    assert len(index) == 100
    assert index.num_tokens == 100 * TOKENS
