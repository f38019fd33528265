# SPDX-License-Identifier: Apache-2.0
"""Promises of manifests in the shared server, and of how it is opened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import words
from valkey_server import ValkeyServer, started

from kvcomm_vllm.config.address import Place
from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex
from kvcomm_vllm.scheduler.tiers import opening
from kvcomm_vllm.scheduler.tiers import server as server_module
from kvcomm_vllm.scheduler.tiers.manifests import Record
from kvcomm_vllm.scheduler.tiers.server import AwayError, SharedServer
from kvcomm_vllm.scheduler.tiers.stream import StreamManifests

PREFIX = "kvcomm:model:"
STREAM = f"{PREFIX}manifests"


def sequence(seed: int) -> Sequence:
    tokens = np.random.default_rng(seed).integers(0, 500, 40).astype(np.int32)
    names = [f"{seed} {number}".encode() for number in range(3)]
    return SequenceIndex(16).add(b"tenant", tokens, names, 30, 20, True, f"owner {seed}")


@pytest.fixture
def manifests(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], StreamManifests]]:
    """Those of one engine more."""
    monkeypatch.setattr("kvcomm_vllm.scheduler.tiers.stream.LOOK_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "FIRST_PAUSE_SECONDS", 0.3)
    made: list[StreamManifests] = []

    def make() -> StreamManifests:
        made.append(StreamManifests(SharedServer(valkey_server.place), PREFIX, 600, os.urandom(32)))
        made[-1].wait(5)
        return made[-1]

    yield make
    for one in made:
        one.close()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def soon(manifests: StreamManifests, count: int) -> list[Record]:
    """The next news, which are so many."""
    found: list[Record] = []
    end = time.monotonic() + 10
    while len(found) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
        found += manifests.news()
    return found


def test_engines_read_what_others_have_written_once(
    manifests: Callable[[], StreamManifests],
) -> None:
    one, other = manifests(), manifests()
    one.append(sequence(1))
    one.append(sequence(2))
    assert soon(other, 2) == [Record.of(sequence(1)), Record.of(sequence(2))]
    other.append(sequence(3))
    assert soon(one, 1) == [Record.of(sequence(3))]
    time.sleep(0.3)
    assert [*one.news(), *other.news()] == []


@pytest.mark.slow
def test_an_engine_that_starts_has_read_what_was_there_before_it(
    manifests: Callable[[], StreamManifests],
) -> None:
    one = manifests()
    for number in range(250):
        one.append(sequence(number))
    one.close()
    assert list(manifests().news()) == [Record.of(sequence(number)) for number in range(250)]


def test_what_is_torn_or_of_others_is_skipped(
    manifests: Callable[[], StreamManifests], valkey_server: ValkeyServer
) -> None:
    one = manifests()
    one.append(sequence(1))
    one.close()
    client = valkey_server.client
    [(_, fields)] = client.xrange(STREAM)
    record = fields[b"record"]
    for torn in (record[:-1], record[:3], b"", record[:20] + b"x" + record[21:], b"\0" * 8):
        client.xadd(STREAM, {"from": b"another", "record": torn})
    client.xadd(STREAM, {"something": "else"})
    client.xadd(STREAM, {"from": b"another", "record": record})
    assert list(manifests().news()) == [Record.of(sequence(1))] * 2


def test_something_else_by_the_streams_name_is_no_news(
    manifests: Callable[[], StreamManifests], valkey_server: ValkeyServer
) -> None:
    valkey_server.client.set(STREAM, "x")
    one = manifests()
    one.append(sequence(1))
    assert list(one.news()) == []


def test_the_stream_goes_when_nobody_writes_to_it(
    manifests: Callable[[], StreamManifests], valkey_server: ValkeyServer
) -> None:
    one = manifests()
    one.append(sequence(1))
    one.close()
    assert 590 < valkey_server.client.ttl(STREAM) <= 600


@pytest.mark.slow
def test_a_server_that_is_away_keeps_no_writer_waiting_and_is_used_when_it_is_back(
    manifests: Callable[[], StreamManifests], valkey_server: ValkeyServer
) -> None:
    one, other = manifests(), manifests()
    valkey_server.stop()
    for number in range(20):
        began = time.monotonic()
        one.append(sequence(number))
        list(other.news())
        assert time.monotonic() - began < 1.5
        time.sleep(0.1)
    valkey_server.kill()
    valkey_server.start()
    found: list[Record] = []
    end = time.monotonic() + 30
    while len(found) < 20:  # none was lost
        assert time.monotonic() < end
        found += other.news()
        time.sleep(0.1)


def test_all_engines_of_a_server_have_one_tenant_key(valkey_server: ValkeyServer) -> None:
    keys = {SharedServer(valkey_server.place).tenant_key(os.urandom(32)) for _ in range(3)}
    assert [len(key) for key in keys] == [32]


def test_a_server_that_has_forgotten_the_key_is_told_it_again(
    valkey_server: ValkeyServer, manifests: Callable[[], StreamManifests]
) -> None:
    one = manifests()
    valkey_server.client.flushall()
    until(lambda: valkey_server.client.get(server_module.KEY) == one.secret)
    assert manifests().secret == one.secret


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged of the shared tier."""
    lines: list[str] = []

    def hear(text: str, *values: object) -> None:
        if "shared" in (line := text % values):
            lines.append(line)

    for level in ("warning", "error"):
        for module in (opening, server_module):
            monkeypatch.setattr(module.logger, level, hear)
    return lines


def serves(make_engine: Callable[..., Any], url: str) -> None:
    engine = make_engine(tiers={"host_gb": 0.002, "shared": url}, audits=False, heal="off")
    assert not engine.half.tiers._manager.secondary_tiers
    assert engine.serve("a", words("a", 50)).report["computed"] == 50
    engine.idle()


def test_a_server_that_is_not_there_at_start_is_told_of_in_a_line_and_used_when_it_comes(
    make_engine: Callable[..., Any],
    errors: list[str],
    valkey_server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcomm_vllm.scheduler.tiers.stream.LOOK_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "FIRST_PAUSE_SECONDS", 0.3)
    valkey_server.kill()
    tiers = {"host_gb": 0.002, "shared": valkey_server.url}
    engine = make_engine(tiers=tiers, audits=False, heal="off")
    [line] = errors
    assert valkey_server.place.name in line
    assert engine.serve("a", words("a", 50)).report["computed"] == 50
    engine.idle()
    valkey_server.start()
    until(lambda: valkey_server.client.exists(server_module.KEY))
    engine.serve("b", words("b", 50))
    engine.idle()
    engine.half.tiers.close()
    other = make_engine(tiers=tiers, audits=False, heal="off")
    assert len(other.half.store.index) == 2
    other.half.tiers.close()


def test_the_servers_key_counts_from_when_it_is_told(
    valkey_server: ValkeyServer, manifests: Callable[[], StreamManifests]
) -> None:
    one, key = manifests(), os.urandom(32)
    assert one.secret == valkey_server.client.get(server_module.KEY)
    valkey_server.client.set(server_module.KEY, key)
    until(lambda: one.secret == key)


def test_a_key_that_is_none_is_told_of_in_a_line(
    make_engine: Callable[..., Any], errors: list[str], valkey_server: ValkeyServer
) -> None:
    valkey_server.client.set(server_module.KEY, "x")
    serves(make_engine, valkey_server.url)
    [line] = errors
    assert "no key of 32 bytes" in line


def test_a_wrong_password_is_told_of_in_a_line(
    make_engine: Callable[..., Any], errors: list[str]
) -> None:
    server = started("right")
    try:
        serves(make_engine, server.url.replace("right", "s3cret"))
        serves(make_engine, server.url.replace(":right@", ""))
        assert len(errors) == 2
        assert all("127.0.0.1" in line and "s3cret" not in line for line in errors)
        assert len(SharedServer(server.place).tenant_key(bytes(32))) == 32
    finally:
        server.kill()


def test_without_the_package_it_is_told_what_to_install(
    make_engine: Callable[..., Any], errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "valkey", None)
    monkeypatch.delitem(sys.modules, "kvcomm_vllm.scheduler.tiers.server")
    monkeypatch.delitem(sys.modules, "kvcomm_vllm.scheduler.tiers.stream")
    serves(make_engine, "valkey://127.0.0.1:1")
    [line] = errors
    assert "pip install 'kvcomm-vllm[shared]'" in line


def test_an_address_where_nobody_answers_keeps_the_start_waiting_for_seconds_at_most() -> None:
    began = time.monotonic()
    server = SharedServer(Place("192.0.2.1", 6379, "", 0))
    assert server.refusal() is None, "it may come"
    with pytest.raises(AwayError):
        server.tenant_key(bytes(32))
    assert time.monotonic() - began < 5


def test_beside_a_disk_all_use_the_servers_key_and_find_each_sequence_once(
    make_engine: Callable[..., Any], valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    tiers = {"host_gb": 0.002, "disk_path": str(tmp_path), "shared": valkey_server.url}
    one = make_engine(tiers=tiers, audits=False, heal="off")
    one.serve("a", words("a", 50))
    one.idle()
    key = one.half.tiers.secret
    one.half.tiers.close()
    other = make_engine(tiers=tiers, audits=False, heal="off")
    assert key == other.half.tiers.secret == valkey_server.client.get(server_module.KEY)
    assert key == (tmp_path / "key").read_bytes(), "the folder had one, and the server none"
    assert len(other.half.store.index) == 1
    other.half.tiers.close()
