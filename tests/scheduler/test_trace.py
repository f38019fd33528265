# SPDX-License-Identifier: Apache-2.0
"""Promises of the trace: a record for each request that has ended, of how it was served and not of
what was said; and whatever happens to the disk, the engine neither waits nor fails.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.config.trace import TraceConfig
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler import trace
from kvcomm_vllm.scheduler.trace import MOST_WAITING, NoTrace, Trace, open_trace

Make = Callable[..., EngineWithoutWorker]
SHARED = words("shared", 48)
FIRST = words("a", 20) + SHARED + words("b", 3)
SECOND = words("c", 24) + SHARED + words("d", 3)
COUNTS = ("local", "reused", "computed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


@pytest.fixture
def written(path: Path) -> Callable[[EngineWithoutWorker], dict[str, dict[str, Any]]]:
    """What an engine that ends has written, by request."""

    def of(engine: EngineWithoutWorker) -> dict[str, dict[str, Any]]:
        engine.connector.shutdown()
        records = [json.loads(text) for text in path.read_text().splitlines()]
        assert len({one["id"] for one in records}) == len(records)
        return {one["id"]: one for one in records}

    return of


def keys_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_in(inner)


def test_each_request_that_ends_has_a_record_with_its_full_report(
    make_engine: Make, path: Path, written: Any
) -> None:
    engine = make_engine(trace={"file": str(path)}, report="coarse")
    engine.serve("first", FIRST, salt="tenant")
    told = engine.serve("second", SECOND, words("answer", 5), salt="tenant", hints={"agent": "ed"})
    engine.serve("off", SECOND, salt="tenant", hints={"mode": "off"})
    check_idle(engine)
    assert "spans" not in told.report
    records = written(engine)
    assert [*records] == ["first", "second", "off"]
    first, second, off = records.values()
    assert (first["outcome"], first["reused"]) == ("declined", 0)
    assert first["declined"] == {"no_match": 1}
    assert (second["outcome"], second["mode"], second["agent"]) == ("reused", "seam", "ed")
    assert (second["reused"], second["seam"], second["output_tokens"]) == (46, 2, 5)
    assert second["spans"] == [[0, 26, "computed"], [26, 72, "reused"], [72, 75, "computed"]]
    assert (off["outcome"], off["declined"]) == ("off", {"mode_off": 1})
    for one in records.values():
        assert sum(one[name] for name in COUNTS) == one["prompt_tokens"]
        assert 0 <= one["waited_seconds"] <= one["seconds"] < 3600
        assert one["time"] > 1.7e9


def test_nothing_that_was_said_is_written(make_engine: Make, path: Path, written: Any) -> None:
    """Neither tokens, nor what a message of ours repeats of a client's words."""
    engine = make_engine(trace={"file": str(path)})
    engine.serve("first", FIRST)
    engine.serve("second", SECOND, hints={"mode": "my secret"})
    records = written(engine)
    assert records["second"]["declined"] == {"bad_hints": 1}
    assert "secret" not in path.read_text()
    found = {key for one in records.values() for key in keys_in(one)}
    assert not {key for key in found if "token_ids" in key or "message" in key or "text" in key}


def test_tokens_are_written_where_they_are_asked_for(
    make_engine: Make, path: Path, written: Any
) -> None:
    engine = make_engine(trace={"file": str(path), "tokens": True})
    engine.serve("first", FIRST, words("answer", 4))
    assert written(engine)["first"]["token_ids"] == [*FIRST, *words("answer", 4)]


def test_a_request_whose_client_hung_up_is_no_word_of_how_it_was_served(
    make_engine: Make, path: Path, written: Any
) -> None:
    engine = make_engine(trace={"file": str(path)})
    engine.add("first", FIRST)
    engine.abort("first")
    engine.run()
    (one,) = written(engine).values()
    assert (one["outcome"], one["prompt_tokens"]) == ("aborted", len(FIRST))
    assert not {*COUNTS, "spans"} & one.keys()
    assert one["waited_seconds"] == one["seconds"]


def test_a_request_that_waited_for_a_tier_says_so(
    make_engine: Make, path: Path, written: Any
) -> None:
    tiers = {"host_gb": 0.002}
    engine = make_engine(
        trace={"file": str(path)}, tiers=tiers, audits=False, heal="off", num_blocks=48
    )
    engine.serve("first", FIRST)
    for number in range(3):  # other work takes all pages
        engine.serve(f"other {number}", words(number, 150))
    engine.idle()
    engine.serve("second", SECOND)
    engine.idle()
    records = written(engine)
    assert records["second"]["reused"] == 46
    promoted = records["second"]["promoted"]
    assert (promoted["pages"], promoted["slower"]) == (12, False)
    assert 0 < promoted["seconds"] <= records["second"]["waited_seconds"]
    assert "promoted" not in records["first"]


def test_without_a_file_nothing_is_written(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", FIRST)
    assert isinstance(engine.half.reports.trace, NoTrace)


def test_records_are_counted(make_engine: Make, path: Path, written: Any) -> None:
    engine = make_engine(trace={"file": str(path)})
    counted: list[tuple[int, int]] = []
    engine.half.stats.count_trace = lambda *given: counted.append(given)  # type: ignore[method-assign]
    for number in range(5):
        engine.serve(f"r{number}", words(number, 20))
    records, dropped = (sum(numbers) for numbers in zip(*counted, strict=True))
    assert dropped == 0
    assert 0 <= records <= len(written(engine)) == 5


# ---- when the disk is slow, full, or somebody else's ---------------------------------------------


class StuckFile:
    """A disk that takes nothing until it is let go."""

    def __init__(self) -> None:
        self.go, self.lines = threading.Event(), 0

    def append(self, line: bytes) -> None:
        self.go.wait(60)
        self.lines += 1

    def close(self) -> None:
        pass


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def warn(text: str, *given: object) -> None:
        if "trace" in text:
            found.append(text % given)

    monkeypatch.setattr(trace.logger, "warning", warn)
    return found


@pytest.fixture
def state(make_engine: Make) -> Any:
    """Of a request that has ended."""
    engine = make_engine()
    states: list[Any] = []
    engine.half.reports.trace.ended = states.append  # type: ignore[method-assign]
    engine.serve("first", FIRST)
    return states[0]


def test_a_slow_disk_costs_records_and_nobody_waits(state: Any, said: list[str]) -> None:
    file, stats = StuckFile(), KVCommStats()
    stuck = Trace(file, False, stats)  # type: ignore[arg-type]
    for _ in range(MOST_WAITING + 50):
        stuck.ended(state)  # would not return
    assert said == ["kvcomm: trace.file: records are dropped (the disk is too slow)"]
    dropped = stats.data["trace/dropped"]
    assert dropped in (49, 50), "one record may be in the thread's hands"
    file.go.set()
    stuck.close()
    stuck.ended(state)
    assert file.lines == MOST_WAITING + 50 - dropped == stats.data["trace/written"]


def test_a_disk_that_fails_costs_records_and_is_told_of_once(
    state: Any, said: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, line: bytes) -> None:
        raise OSError(28, "No space left on device")

    stats = KVCommStats()
    full = open_trace(TraceConfig(str(path)), 0, stats)
    with monkeypatch.context() as patched:
        patched.setattr("kvcomm_vllm.scheduler.trace_file.TraceFile.append", fail)
        for _ in range(3):
            full.ended(state)
        assert wait_for(lambda: full._lost == 3)  # type: ignore[union-attr]
    full.ended(state)
    full.close()
    assert len(said) == 1
    assert "No space left" in said[0]
    assert len(path.read_text().splitlines()) == 1
    assert stats.data["trace/dropped"] == 3


def wait_for(true: Callable[[], bool]) -> bool:
    for _ in range(6000):
        if true():
            return True
        threading.Event().wait(0.01)
    return False


def test_a_record_that_cannot_be_made_costs_no_answer(state: Any, said: list[str]) -> None:
    stuck = Trace(StuckFile(), False, KVCommStats())  # type: ignore[arg-type]
    stuck.ended(None)  # type: ignore[arg-type]
    assert len(said) == 1


def test_what_waits_is_written_when_the_engine_ends(state: Any, path: Path) -> None:
    last = open_trace(TraceConfig(str(path)), 0, KVCommStats())
    for _ in range(MOST_WAITING // 2):
        last.ended(state)
    last.close()
    assert len(path.read_text().splitlines()) == MOST_WAITING // 2


def test_a_file_that_cannot_be_opened_costs_the_trace_alone(
    make_engine: Make, said: list[str], tmp_path: Path
) -> None:
    engine = make_engine(trace={"file": str(tmp_path / "nowhere" / "trace.jsonl")})
    assert engine.serve("first", FIRST).report["computed"] == len(FIRST)
    assert [line.partition("(")[0] for line in said] == ["kvcomm: trace.file: nothing is written "]


def test_data_parallel_ranks_have_files_of_their_own(path: Path) -> None:
    config = TraceConfig(str(path))
    opened = [open_trace(config, rank, KVCommStats()) for rank in range(3)]
    for one in opened:
        one.close()
    names = sorted(found.name for found in path.parent.iterdir())
    assert names == ["trace.dp1.jsonl", "trace.dp2.jsonl", "trace.jsonl"]
