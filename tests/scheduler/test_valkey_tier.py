# SPDX-License-Identifier: Apache-2.0
"""Promises of the tier that engines on several machines share, on a real server: what is read is
what was stored, and a server that is gone, slow or full costs no more than that pages are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from valkey_server import ValkeyServer
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

from kvcomm_vllm.compat.offload import Found, TierRequest, end_of_step, key_of, look_up
from kvcomm_vllm.scheduler.tiers import server as server_module
from kvcomm_vllm.scheduler.tiers.server import SharedServer
from kvcomm_vllm.scheduler.tiers.valkey import ValkeyTier

PAGE = 4096  # bytes
AT_ONCE = 1.5  # seconds: nobody has waited for an answer, which takes two if none comes
PREFIX = "kvcomm:model:"
NAMES = [bytes([number]) * 32 for number in range(1, 9)]


def content(name: bytes) -> np.ndarray:
    return np.random.default_rng(list(name)).integers(-128, 128, PAGE, np.int8)


def at(name: bytes, prefix: str = PREFIX) -> str:
    return f"{prefix}{name.hex()}"


class Engine:
    """A pool of 16 pages with the server behind it, on a machine of its own.

    Attributes:
        longest: seconds that anything has kept the scheduler's thread.
    """

    def __init__(self, server: ValkeyServer, prefix: str = PREFIX, ttl_seconds: int = 600) -> None:
        self.memory = np.zeros((16, PAGE), np.int8)
        view = memoryview(self.memory)
        region: Any = SimpleNamespace(create_kv_memoryview=lambda: view, cleanup=lambda: None)
        shared = SharedServer(server.place)
        given = {"server": shared, "prefix": prefix, "ttl_seconds": ttl_seconds}
        tier = ValkeyTier(None, view, "kvcomm_valkey", **given)
        primary = CPUPrimaryTierOffloadingManager(16, region)
        self.manager = TieringOffloadingManager(primary, [tier])
        self.longest = 0.0

    def at_once(self, work: Callable[..., Any], *args: Any) -> Any:
        began = time.monotonic()
        found = work(*args)
        self.longest = max(self.longest, time.monotonic() - began)
        return found

    def rest(self) -> None:
        end = time.monotonic() + 10
        self.at_once(end_of_step, self.manager)
        while self.manager.has_pending_work():
            assert time.monotonic() < end, "a job does not come to an end"
            time.sleep(0.01)
            self.at_once(end_of_step, self.manager)

    def keep(self, *names: bytes) -> None:
        keys = [key_of(name) for name in names]
        request = TierRequest(self.manager, "store")
        room = self.manager.prepare_store(keys, request.context)
        for key, chunk in zip(room.keys_to_store, room.store_spec.block_ids, strict=True):
            self.memory[chunk] = content(key[:-4])
        self.at_once(self.manager.complete_store, room.keys_to_store, request.context)
        request.end()
        self.rest()

    def find(self, *names: bytes) -> list[bytes]:
        """Those that come to the pool; they are what was stored."""
        request = TierRequest(self.manager, "load")
        end = time.monotonic() + 10
        while True:
            found = {
                name: self.at_once(look_up, self.manager, name, request.context) for name in names
            }
            if Found.COMING not in found.values():
                break
            assert time.monotonic() < end, "a page neither comes nor is missed"
            self.at_once(end_of_step, self.manager)
            time.sleep(0.01)
        here = [name for name, where in found.items() if where is Found.HERE]
        keys = [key_of(name) for name in here]
        if keys:
            chunks = self.manager.prepare_load(keys, request.context).block_ids
            for name, chunk in zip(here, chunks, strict=True):
                assert (self.memory[chunk] == content(name)).all()
            self.manager.complete_load(keys, request.context)
        request.end()
        return here


@pytest.fixture
def engine(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    """Makes engines. They try sooner again than others."""
    monkeypatch.setattr(server_module, "FIRST_PAUSE_SECONDS", 0.3)
    made: list[Engine] = []

    def make(*args: Any, **kwargs: Any) -> Engine:
        made.append(Engine(valkey_server, *args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.manager.shutdown()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged of the server."""
    lines: list[str] = []
    monkeypatch.setattr(
        server_module.logger, "warning", lambda text, *values: lines.append(text % values)
    )
    return lines


def works_again(engine: Callable[..., Engine], one: Engine) -> None:
    """Once the pause is over."""
    for number in range(100, 200):
        name = bytes([number]) * 32
        one.keep(name)
        if engine().find(name):
            return
        time.sleep(0.1)
    raise AssertionError("the server is not used any more")


def test_what_one_engine_has_stored_another_one_reads(engine: Callable[..., Engine]) -> None:
    engine().keep(*NAMES[:6])
    assert engine().find(*NAMES) == NAMES[:6]


def test_many_pages_go_in_parts(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcomm_vllm.scheduler.tiers.valkey.SENT_BYTES", 2 * PAGE + 1)
    engine().keep(*NAMES[:5])
    assert engine().find(*NAMES[:5]) == NAMES[:5]


def test_models_share_nothing(engine: Callable[..., Engine]) -> None:
    engine().keep(NAMES[0])
    assert engine("kvcomm:another:").find(NAMES[0]) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped", "longer", "empty", "a list"])
def test_what_is_not_the_page_that_was_stored_is_a_miss_and_removed(
    engine: Callable[..., Engine], valkey_server: ValkeyServer, damage: str
) -> None:
    engine().keep(*NAMES[:3])
    client, place = valkey_server.client, at(NAMES[1])
    value = client.get(place)
    assert isinstance(value, bytes)
    client.delete(place)
    if damage == "a list":
        client.lpush(place, b"x")
    else:
        damaged = {
            "flipped": value[:100] + bytes([value[100] ^ 1]) + value[101:],
            "truncated": value[:-1],
            "swapped": client.get(at(NAMES[0])),
            "longer": value + b"x",
            "empty": b"",
        }
        client.set(place, damaged[damage])
    assert engine().find(*NAMES[:3]) == [NAMES[0], NAMES[2]]
    assert not client.exists(place)


def test_pages_stay_for_a_limited_time_after_they_were_last_asked_for(
    engine: Callable[..., Engine], valkey_server: ValkeyServer
) -> None:
    client = valkey_server.client
    engine(ttl_seconds=600).keep(*NAMES[:2])
    assert 590 < client.ttl(at(NAMES[0])) <= 600
    client.expire(at(NAMES[0]), 60)
    client.expire(at(NAMES[1]), 60)
    assert engine(ttl_seconds=600).find(NAMES[0]) == [NAMES[0]]
    assert 590 < client.ttl(at(NAMES[0])) <= 600
    engine(ttl_seconds=600).keep(NAMES[1])
    assert 590 < client.ttl(at(NAMES[1])) <= 600


def test_a_page_that_is_there_is_not_sent_again(
    engine: Callable[..., Engine], valkey_server: ValkeyServer
) -> None:
    engine().keep(NAMES[0])
    valkey_server.client.config_resetstat()
    engine().keep(NAMES[0])
    assert "cmdstat_set" not in valkey_server.client.info("commandstats")


def test_a_killed_server_keeps_nobody_waiting_and_is_used_when_it_is_back(
    engine: Callable[..., Engine], valkey_server: ValkeyServer, said: list[str]
) -> None:
    one = engine()
    one.keep(NAMES[0])
    valkey_server.kill()
    for name in NAMES[1:5]:
        one.keep(name)
        assert engine().find(name) == []
    assert one.longest < AT_ONCE
    valkey_server.start()
    del said[:]
    works_again(engine, one)
    assert [line for line in said if "works again" in line]
    assert one.longest < AT_ONCE


@pytest.mark.slow
def test_a_slow_server_keeps_nobody_waiting_and_is_used_when_it_is_back(
    engine: Callable[..., Engine], valkey_server: ValkeyServer
) -> None:
    one, other = engine(), engine()
    one.keep(NAMES[0])
    valkey_server.stop()
    began = time.monotonic()
    for name in NAMES[1:5]:
        one.keep(name)
    assert other.find(*NAMES[:4]) == []
    assert max(one.longest, other.longest) < AT_ONCE
    assert time.monotonic() - began < 10
    valkey_server.go_on()
    works_again(engine, one)


def test_a_server_that_went_while_pages_were_being_read_costs_these_alone(
    engine: Callable[..., Engine], valkey_server: ValkeyServer
) -> None:
    engine().keep(*NAMES[:4])
    one = engine()
    request = TierRequest(one.manager, "load")
    end = time.monotonic() + 5
    while look_up(one.manager, NAMES[0], request.context) is not Found.COMING or not (
        one.manager._pending_load_submissions
    ):
        assert time.monotonic() < end
        one.rest()
    valkey_server.kill()
    one.rest()
    assert look_up(one.manager, NAMES[0], request.context) is Found.NOWHERE
    request.end()


def test_a_full_server_takes_no_page_but_gives_those_it_has(
    engine: Callable[..., Engine], valkey_server: ValkeyServer, said: list[str]
) -> None:
    one = engine()
    one.keep(NAMES[0])
    valkey_server.client.config_set("maxmemory", 1)
    for name in NAMES[1:4]:
        one.keep(name)
    assert len(said) == 1
    assert "OOM" in said[0] or "maxmemory" in said[0]
    assert engine().find(*NAMES[:4]) == NAMES[:1]
    valkey_server.client.config_set("maxmemory", 0)
    works_again(engine, one)
    assert len(said) == 2


@pytest.mark.slow
def test_a_server_that_stays_away_is_asked_less_and_less_and_told_of_once(
    engine: Callable[..., Engine], valkey_server: ValkeyServer, said: list[str]
) -> None:
    one = engine()
    valkey_server.kill()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        one.find(NAMES[0])
    pause = one.manager.secondary_tiers[0]._server._away
    assert 0.6 <= pause._seconds <= 2.4
    assert len(said) == 1
    assert valkey_server.place.host in said[0]


def test_an_engine_ends_beside_a_server_that_does_not_answer(
    engine: Callable[..., Engine], valkey_server: ValkeyServer
) -> None:
    one = engine()
    valkey_server.stop()
    request = TierRequest(one.manager, "load")
    look_up(one.manager, NAMES[0], request.context)
    end_of_step(one.manager)
    began = time.monotonic()
    one.manager.secondary_tiers[0].shutdown()
    assert time.monotonic() - began < 6
