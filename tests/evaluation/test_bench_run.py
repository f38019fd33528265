# SPDX-License-Identifier: Apache-2.0
"""A whole run against servers that are there already: records, interruption, repetition."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("openai", reason="the bench extra is not installed")

from bench_endpoint import FakeServer, serving

from kvcomm_vllm.evaluation.bench import run as run_module
from kvcomm_vllm.evaluation.bench.options import Options, read_options
from kvcomm_vllm.evaluation.bench.records import VARYING
from kvcomm_vllm.evaluation.bench.run import run_bench
from kvcomm_vllm.evaluation.serving.client import RequestError
from kvcomm_vllm.evaluation.workloads.rows import DataError

AGENTS, TASKS = 3, 3
REHEARSAL = 2  # requests per column before anything is measured


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """These servers keep no core busy."""
    monkeypatch.setattr(run_module, "SPIN_SECONDS", 0.0)


def options(fake: FakeServer, out: Path, **given: Any) -> Options:
    sizes = {"agents": AGENTS, "prefix_tokens": 40, "input_tokens": 50, "output_tokens": 8}
    fields: dict[str, Any] = {
        "workloads": ["synthetic"],
        "columns": "a,b",
        "endpoints": [f"a={fake.url},m", f"b={fake.url},m"],
        "tasks": TASKS,
        **sizes,
    }
    return read_options("m", out, **{**fields, **given})


def go(asked: Options) -> None:
    run_bench(asked, Console(quiet=True))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def settings(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def same(row: dict[str, Any]) -> dict[str, Any]:
    """What two runs agree in."""
    return {name: value for name, value in row.items() if name not in VARYING}


def test_every_call_of_every_task_is_recorded_on_every_column(
    fake: FakeServer, tmp_path: Path
) -> None:
    go(options(fake, tmp_path))
    found = rows(tmp_path)
    count = Counter((row["kind"], row["column"], row["warmup"]) for row in found)
    for name in "ab":
        assert count["call", name, False] == AGENTS * TASKS
        assert count["task", name, False] == TASKS
        assert count["call", name, True] == AGENTS
    by_place = {(r["column"], r["task"], r["index"]): r for r in found if r["kind"] == "call"}
    for (_, task, index), row in by_place.items():
        assert row["prompt_digest"] == by_place["a", task, index]["prompt_digest"]
    assert settings(tmp_path)["complete"]


def test_run_json_says_what_was_run_on_what(fake: FakeServer, tmp_path: Path) -> None:
    go(options(fake, tmp_path, seed=5))
    found = settings(tmp_path)
    assert found["seed"] == 5
    assert list(found["columns"]) == ["a", "b"]
    assert found["workloads"]["synthetic"]["tasks"] == TASKS
    assert found["machine"]["cores"] > 0
    assert found["versions"]["python"]
    assert [session["late"] for session in found["sessions"]] == [0]


def test_two_runs_with_one_seed_agree_in_everything_but_times(
    fake: FakeServer, tmp_path: Path
) -> None:
    go(options(fake, tmp_path / "1"))
    go(options(fake, tmp_path / "2"))
    go(options(fake, tmp_path / "3", seed=1))
    first, second, other = ([same(row) for row in rows(tmp_path / n)] for n in "123")
    assert first == second
    assert first != other


class InterruptError(BaseException):
    """As Ctrl-C: no Exception."""


def test_an_interrupted_run_goes_on_behind_the_last_complete_task(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    go(options(fake, whole))
    asked = options(fake, tmp_path / "cut")
    plain_ask = run_module.Driver.ask
    left = [2 * AGENTS * 2 + 1]  # the warm-up and one task on two columns, and a call

    def ask(self: Any, *given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptError
        return plain_ask(self, *given)

    monkeypatch.setattr(run_module.Driver, "ask", ask)
    with pytest.raises(InterruptError):
        go(asked)
    kept = rows(asked.out)
    assert {row["task"] for row in kept if not row["warmup"]} == {"synthetic-0"}
    assert not settings(asked.out)["complete"]

    left[0] = 1000
    go(asked)
    found = rows(asked.out)
    assert found[: len(kept)] == kept
    assert settings(asked.out)["complete"]
    timed = [row for row in found if not row["warmup"]]
    expected = [same(row) for row in rows(whole) if not row["warmup"]]
    # the second session begins with servers that know nothing, so repeated text counts from there
    ignored = {"session", "repeated_tokens"}
    assert [{k: v for k, v in same(r).items() if k not in ignored} for r in timed] == [
        {k: v for k, v in r.items() if k not in ignored} for r in expected
    ]
    assert {row["session"] for row in found if row["warmup"]} == {0, 1}
    assert len(settings(asked.out)["sessions"]) == 2


def test_a_run_in_full_is_not_run_again(fake: FakeServer, tmp_path: Path) -> None:
    go(options(fake, tmp_path))
    asked, before = len(fake.bodies), rows(tmp_path)
    go(options(fake, tmp_path))
    assert len(fake.bodies) == asked
    assert rows(tmp_path) == before


def test_another_run_is_not_mixed_in(fake: FakeServer, tmp_path: Path) -> None:
    go(options(fake, tmp_path))
    with pytest.raises(DataError, match="tasks: 3 there, 2 here"):
        go(options(fake, tmp_path, tasks=2))


def test_under_load_all_columns_have_the_same_arrivals(fake: FakeServer, tmp_path: Path) -> None:
    go(options(fake, tmp_path, tasks=1, rate=20.0, load_seconds=0.4))
    ends = [r for r in rows(tmp_path) if r["kind"] == "task" and r["phase"] == "load"]
    tasks = {name: [r["task"] for r in ends if r["column"] == name] for name in "ab"}
    assert tasks["a"] == tasks["b"] != []
    calls = [r for r in rows(tmp_path) if r["kind"] == "call" and r["phase"] == "load"]
    assert len(calls) == AGENTS * len(ends)


def test_a_server_that_is_gone_ends_the_run_and_keeps_what_there_is(
    fake: FakeServer, tmp_path: Path
) -> None:
    asked = options(fake, tmp_path)
    with serving() as other:
        mixed = options(fake, tmp_path, endpoints=[f"a={fake.url},m", f"b={other.url},m"])

        def stop(number: int) -> None:
            if number == 1 + REHEARSAL + 2 * AGENTS + 1:  # first greeting, warm-up, one task
                raise ConnectionError("gone")

        other.on_request = stop
        with pytest.raises(RequestError):
            go(mixed)
    assert {row["task"] for row in rows(tmp_path) if not row["warmup"]} == {"synthetic-0"}
    assert not settings(asked.out)["complete"]
