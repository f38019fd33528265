# SPDX-License-Identifier: Apache-2.0
"""What is sent for a call, and what is written down of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from bench_endpoint import FakeServer, serving, token

from kvcomm_vllm.evaluation.bench.columns import OWN, Column, Endpoint
from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.records import Stand
from kvcomm_vllm.evaluation.bench.servers import foreign_client
from kvcomm_vllm.evaluation.serving.client import ChatClient, RefusedError
from kvcomm_vllm.evaluation.workloads.task import Call

STAND = Stand("work", "lockstep", "task 1")
SHARED = " ".join(f"word{n}" for n in range(40))


def call(text: str = SHARED, fixed: bool = True, tokens: int = 6) -> Call:
    return Call("writer", [{"role": "user", "content": text}], tokens, fixed)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def driver(fake: FakeServer, name: str, **options: Any) -> Driver:
    return Driver(OWN[name], ChatClient(fake.url, "m"), lambda: 7.0, **options)


def test_a_record_says_what_was_asked_and_answered(fake: FakeServer) -> None:
    text, record = driver(fake, "plain").ask(call(), 3, STAND)
    assert text.split()
    assert (record.workload, record.phase, record.task) == ("work", "lockstep", "task 1")
    assert (record.column, record.index, record.agent) == ("plain", 3, "writer")
    assert (record.prompt_tokens, record.output_tokens, record.at_s) == (40, 6, 7.0)
    assert record.answer_ids == [token(word) for word in text.split()]
    assert 0 < record.ttft_ms <= record.total_ms
    assert (record.local, record.reused, record.full_hit_ms) == (None, None, None)


def test_only_columns_of_the_plugin_send_hints(fake: FakeServer) -> None:
    for name in ("plain", "plain_nocache", "seam", "paper"):
        driver(fake, name).ask(call(), 0, STAND)
    hints = [body.get("kv_transfer_params") for body in fake.bodies]
    assert hints == [None, None, {"kvcomm": {"mode": "seam"}}, {"kvcomm": {"mode": "paper"}}]


def test_no_two_columns_share_a_salt_and_without_a_cache_no_two_requests(fake: FakeServer) -> None:
    for name in OWN:
        asking = driver(fake, name)
        for index in range(3):
            asking.ask(call(), index, STAND)
    salts = [body["cache_salt"] for body in fake.bodies]
    by_column = dict(zip(OWN, (salts[n : n + 3] for n in range(0, len(salts), 3)), strict=True))
    assert len(set(by_column.pop("plain_nocache"))) == 3
    assert all(len(set(found)) == 1 for found in by_column.values())
    assert len(set(salts)) == 3 + len(by_column)


def test_an_answer_ends_where_the_model_ends_it_unless_its_length_is_fixed(
    fake: FakeServer,
) -> None:
    asking = driver(fake, "plain")
    _, fixed = asking.ask(call(fixed=True), 0, STAND)
    _, free = asking.ask(call(fixed=False), 1, STAND)
    assert (fixed.output_tokens, free.output_tokens) == (6, 4)
    assert "min_tokens" not in fake.bodies[1]


def test_tokens_of_earlier_prompts_and_answers_are_counted_per_column(fake: FakeServer) -> None:
    plain = driver(fake, "plain")
    said, first = plain.ask(call(tokens=20), 0, STAND)
    _, second = plain.ask(call(f"another beginning {said} and {SHARED}"), 1, STAND)
    _, other = driver(fake, "seam").ask(call(f"another beginning {said} and {SHARED}"), 1, STAND)
    assert first.repeated_tokens == 0
    assert second.repeated_tokens == 20 + 40
    assert other.repeated_tokens == 0


def test_the_floor_is_the_same_prompt_under_the_same_salt(fake: FakeServer) -> None:
    _, record = driver(fake, "plain", floor=True).ask(call(), 0, STAND)
    assert record.full_hit_ms is not None
    first, again = fake.bodies
    assert again["max_tokens"] == 1
    assert (again["messages"], again["cache_salt"]) == (first["messages"], first["cache_salt"])
    assert record.output_tokens == 6


class Meter:
    """Counts what it is asked; settles or not."""

    def __init__(self, settles: bool) -> None:
        self.settles = settles
        self.log: list[str] = []

    def settle(self) -> bool:
        self.log.append("settle")
        return self.settles

    def take(self, prompt_tokens: int) -> dict[str, Any]:
        self.log.append(f"take {prompt_tokens}")
        return {"local": 1, "reused": 30, "computed": 9, "declined": {"too_little": 1}}


@pytest.mark.parametrize("settles", [True, False])
def test_a_meter_adds_its_fields_and_is_waited_for_after_the_answer(
    fake: FakeServer, settles: bool
) -> None:
    meter = Meter(settles)
    asking = driver(fake, "anchor", meter=meter)
    _, record = asking.ask(call(), 0, STAND)
    assert (record.local, record.reused, record.computed) == (1, 30, 9)
    assert record.declined == {"too_little": 1}
    assert meter.log == ["take 40", "settle"]
    assert asking.late == (not settles)
    asking.unobserved().ask(call(), 0, STAND)
    assert len(meter.log) == 2


def test_equal_prompts_have_equal_digests_whoever_is_asked(fake: FakeServer) -> None:
    _, plain = driver(fake, "plain").ask(call(), 0, STAND)
    _, seam = driver(fake, "seam").ask(call(), 0, STAND)
    _, other = driver(fake, "seam").ask(call("something else"), 0, STAND)
    assert plain.prompt_digest == seam.prompt_digest != other.prompt_digest


def test_a_prompt_that_is_too_long_is_a_refusal(fake: FakeServer) -> None:
    with pytest.raises(RefusedError, match="too long"):
        driver(fake, "plain").ask(call("word " * 5000), 0, STAND)


@pytest.mark.parametrize("strict", [True, False])
def test_a_foreign_server_is_sent_what_it_understands(strict: bool) -> None:
    with serving(strict) as fake:
        client = foreign_client("other", Endpoint(fake.url))
        fake.bodies.clear()
        _, record = Driver(Column("other", "other"), client, lambda: 0.0).ask(call(), 0, STAND)
        (body,) = fake.bodies
    assert body["model"] == "first"
    assert ("cache_salt" in body) is not strict
    assert (record.repeated_tokens is None) is strict
    assert bool(record.answer_ids) is not strict
    assert record.prompt_digest
    assert record.output_tokens > 0


def test_primers_come_before_a_call_and_only_where_something_is_cached(fake: FakeServer) -> None:
    primer = [{"role": "user", "content": SHARED}]
    primed = Call("writer", [{"role": "user", "content": f"so: {SHARED}"}], 6, True, (primer,))
    meter = Meter(True)
    asking = driver(fake, "seam", meter=meter)
    assert asking.prime(primed) == 1
    _, record = asking.ask(primed, 0, STAND)
    first, second = fake.bodies
    assert first["messages"] == primer
    assert first["max_tokens"] == 1
    assert (first["cache_salt"], first["kv_transfer_params"]) == (
        second["cache_salt"],
        second["kv_transfer_params"],
    )
    assert meter.log == ["take 40", "settle", "take 41", "settle"], "charged to nobody"
    assert record.repeated_tokens == 40
    assert driver(fake, "plain_nocache").prime(primed) == 0
    assert len(fake.bodies) == 2
