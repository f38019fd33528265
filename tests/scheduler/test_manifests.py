# SPDX-License-Identifier: Apache-2.0
"""Manifests: what one engine writes down another one reads, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scripts import words

from kvcomm_vllm.scheduler.index import SequenceIndex
from kvcomm_vllm.scheduler.index.sequence import Sequence
from kvcomm_vllm.scheduler.origin import origin
from kvcomm_vllm.scheduler.tiers.folder import FolderManifests, tenant_key

KEY = bytes(32)


def sequence(seed: object, first_approximate: int | None = None) -> Sequence:
    index = SequenceIndex(block_size=4, window_tokens=4)
    tokens = np.array(words(seed, 22), np.int32)
    names = [os.urandom(32) for _ in range(6)]
    found = index.add(b"n" * 16, tokens, names, 20, first_approximate, True, "owner", generation=2)
    origin(found)
    return found


def test_a_sequence_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = sequence("a", first_approximate=9)
    FolderManifests(tmp_path, KEY).append(written)
    (read,) = FolderManifests(tmp_path, KEY).news()
    assert read.token_ids().tolist() == written.tokens.tolist()
    assert (read.names, read.namespace) == (written.block_hashes, written.namespace)
    assert (read.prompt, read.first_approximate, read.generation) == (20, 9, 2)
    kept = read.origin(7)
    assert kept is not None
    assert written.origin is not None
    assert kept.repeats.tolist() == written.origin.repeats.tolist()


def test_news_are_told_once_and_ones_own_never(tmp_path: Path) -> None:
    one, other = FolderManifests(tmp_path, KEY), FolderManifests(tmp_path, KEY)
    one.append(sequence("a"))
    assert len(list(other.news())) == 1
    one.append(sequence("b"))
    assert len(list(other.news())) == 1
    assert not list(other.news())
    assert not list(one.news())


@pytest.mark.parametrize("cut", [1, 11, 12, 100])
def test_a_record_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path, cut: int) -> None:
    writer, reader = FolderManifests(tmp_path, KEY), FolderManifests(tmp_path, KEY)
    writer.append(sequence("a"))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    assert not list(reader.news())
    path.write_bytes(whole)
    assert len(list(reader.news())) == 1


def test_nothing_behind_a_damaged_record_is_read(tmp_path: Path) -> None:
    writer = FolderManifests(tmp_path, KEY)
    for seed in "abc":
        writer.append(sequence(seed))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = FolderManifests(tmp_path, KEY)
    assert len(list(reader.news())) == 1
    assert not list(reader.news())


def test_a_folder_that_cannot_be_written_costs_no_request(tmp_path: Path) -> None:
    manifests = FolderManifests(tmp_path / "there", KEY)
    (tmp_path / "there").rmdir()
    manifests.append(sequence("a"))
    assert not list(manifests.news())


def test_all_engines_of_a_folder_have_one_key_which_only_its_owner_reads(tmp_path: Path) -> None:
    key = tenant_key(tmp_path / "kv")
    assert len(key) == 32
    assert tenant_key(tmp_path / "kv") == key
    assert os.stat(tmp_path / "kv" / "key").st_mode & 0o777 == 0o600
