# SPDX-License-Identifier: Apache-2.0
"""The checks of a soak find what they look for, and the script is the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcomm_vllm.evaluation.soak.checks import faults_of
from kvcomm_vllm.evaluation.soak.dense import difference
from kvcomm_vllm.evaluation.soak.events import Event
from kvcomm_vllm.evaluation.soak.item import CHAT, TEXT, Item, Outcome
from kvcomm_vllm.evaluation.soak.meter import Log, Reading, wrong_lines
from kvcomm_vllm.evaluation.soak.promises import Promise
from kvcomm_vllm.evaluation.soak.result import grown
from kvcomm_vllm.evaluation.soak.script import DECK, KINDS, Script

REPORT = {"prompt_tokens": 9, "local": 2, "reused": 3, "computed": 4}


def outcome(
    report: dict[str, int] | None = REPORT, status: int = 200, finish: str = "stop", **item: Any
) -> Outcome:
    given = {"status": 200, "finish": ("stop",), **item}
    answer: dict[str, Any] = {"choices": [{"finish_reason": finish}], "usage": {"prompt_tokens": 9}}
    if report is not None:
        answer["kv_transfer_params"] = {"kvcomm": report}
    return Outcome(Item(1, "made up", CHAT, {}, **given), status, 10.0, 20.0, answer)


def promises(*outcomes: Outcome, events: tuple[Event, ...] = ()) -> set[Promise]:
    return {fault.promise for fault in faults_of(outcomes, events)}


def test_a_good_answer_breaks_no_promise() -> None:
    assert promises(outcome()) == set()


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (outcome(status=0), Promise.ANSWERED),
        (outcome(status=500), Promise.STATUS),
        (outcome(finish="length"), Promise.ENDED),
        (outcome(report=None), Promise.REPORTED),
        (outcome({**REPORT, "local": 1}), Promise.ADDED_UP),
        (outcome({**REPORT, "prompt_tokens": 10, "local": 3}), Promise.ADDED_UP),
        (outcome(foreign=True), Promise.APART),
        (outcome(exact=True), Promise.NOT_REUSED),
    ],
    ids=lambda value: value.name if isinstance(value, Promise) else "",
)
def test_what_does_not_hold_is_found(broken: Outcome, promise: Promise) -> None:
    assert promises(broken) == {promise}


def test_an_aborted_request_may_end_as_it_likes_but_must_be_answered() -> None:
    abort = Event("/pause?mode=abort", 200, True, 15.0, 16.0)
    assert promises(outcome(finish="abort"), events=(abort,)) == set()
    assert promises(outcome(status=0), events=(abort,)) == {Promise.ANSWERED}
    later = Event("/pause?mode=abort", 200, True, 25.0, 26.0)
    assert promises(outcome(finish="abort"), events=(later,)) == {Promise.ENDED}


def test_an_operators_request_that_fails_is_a_fault() -> None:
    assert promises(events=(Event("/resume", 500, True, 0.0, 1.0),)) == {Promise.OPERATED}


def answer(*steps: tuple[str, float, str, float]) -> dict[str, Any]:
    """Each step: the chosen token and the next best, with their log-probabilities."""
    content = []
    for token, logprob, other, less in steps:
        top = [{"token": token, "logprob": logprob}, {"token": other, "logprob": less}]
        content.append({"token": token, "logprob": logprob, "top_logprobs": top})
    ids = [ord(step[0]) for step in steps]
    return {"choices": [{"logprobs": {"content": content}, "token_ids": ids}]}


def test_answers_differ_where_tokens_do_unless_both_are_as_likely() -> None:
    dense = answer(("a", -0.1, "b", -2.5), ("c", -0.7, "d", -0.7001), ("e", -0.1, "f", -3.0))
    assert difference(dense, dense) == ""
    tie = answer(("a", -0.1, "b", -2.5), ("d", -0.7, "c", -0.7001), ("x", -0.1, "y", -3.0))
    assert difference(tie, dense) == ""
    other = answer(("b", -0.1, "a", -2.5))
    assert "token 0: 'b', dense 'a'" in difference(other, dense)
    moved = answer(("a", -0.11, "b", -2.4), ("c", -0.7, "d", -0.7001), ("e", -0.1, "f", -3.0))
    assert "log-probability" in difference(moved, dense)
    assert difference(answer(("a", -0.1, "b", -2.5)), dense)
    assert difference(dense, {})


def test_memory_may_grow_by_a_tenth_and_a_little() -> None:
    assert not grown({"worker": 1000.0, "ended": 5.0}, {"worker": 1160.0, "new": 9.0})
    assert [fault.kind for fault in grown({"worker": 1000.0}, {"worker": 1170.0})] == ["worker"]


def test_aborted_are_the_requests_with_no_end_of_their_own() -> None:
    reading = Reading()
    reading.requests.update(reused=4, declined=3)
    reading.finished.update(stop=2, length=3, abort=1)
    assert reading.aborted == 2


TRACEBACK = """ERROR:    Exception in ASGI application
Traceback (most recent call last):
  File "a.py", line 1, in run
  File "serving.py", line 678, in {name}
    step = top_logprobs[i]
IndexError: list index out of range
"""


def test_requests_in_the_log_are_counted_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text("INFO Added request cmpl-1.\nINFO Ad")
    log = Log(path)
    log.follow()
    assert log.added == 1
    with path.open("a") as more:
        more.write("ded request cmpl-2.\n")
    log.follow()
    assert log.added == 2


def test_errors_in_the_log_are_found_save_what_vllm_is_known_to_write(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    known = TRACEBACK.format(name="_create_completion_logprobs")
    path.write_text(f"INFO one\nERROR x The model `another` does not exist. y\n{known}INFO two\n")
    assert wrong_lines(path) == []
    path.write_text(f"{known}ERROR it broke\n{TRACEBACK.format(name='another')}")
    assert [line.split()[0] for line in wrong_lines(path)] == ["ERROR", "ERROR:", "Traceback"]


def test_a_deck_has_every_kind_and_depends_on_the_seed_alone() -> None:
    one, two, other = Script(1), Script(1), Script(2)
    items = [one.next() for _ in range(DECK)]
    assert items == [two.next() for _ in range(DECK)]
    assert items != [other.next() for _ in range(DECK)]
    assert {item.kind for item in items} == {make.__name__ for make in KINDS}
    assert {item.salt for item in items} == {None, "north", "south"}
    assert [item.number for item in items] == list(range(1, DECK + 1))


def test_a_foreign_text_is_never_sent_twice_by_one_tenant() -> None:
    script, sent = Script(3), set()
    for item in (script.next() for _ in range(10 * DECK)):
        if item.foreign:
            assert isinstance(item.body, dict)
            assert item.path == TEXT
            key = item.salt, item.body["prompt"]
            assert key not in sent
            sent.add(key)
    texts = [text for _, text in sent]
    assert len(set(texts)) < len(texts), "no text was sent by two tenants"
