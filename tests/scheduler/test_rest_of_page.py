# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's own hit ends with a whole page and the text goes on, its rest is loaded, too."""

from __future__ import annotations

from collections.abc import Callable

from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

PAGE, SEAM = 16, 2
HEAD = words("head", PAGE + 7)
NOTES = words("notes", 40)
BEFORE = [*HEAD, *words("old", 6), *NOTES, 3]
AFTER = [*HEAD, *words("new", 8), *NOTES, 4, 5]
BEHIND = len(HEAD) + 8 + SEAM, len(HEAD) + 8 + len(NOTES)


def test_what_a_hit_leaves_of_its_last_page_is_loaded_and_exact(make_engine: Make) -> None:
    engine = make_engine(block_size=PAGE, num_blocks=60)
    engine.serve("before", BEFORE)
    after = engine.serve("after", AFTER)
    assert after.spans("local") == [(0, PAGE)]
    assert after.spans("reused") == [(PAGE, len(HEAD)), BEHIND]
    assert after.report["from_approximate"] == 0
    (ops,) = after.loaded
    assert [(hole.start, len(hole.tokens)) for hole in ops.holes] == [(len(HEAD), 8 + SEAM)]
    assert len(after.report["placeholders"]) == 1, "it is no text of somebody else's"
    check_report(engine, "after")
    check_idle(engine)


def test_it_ends_where_kv_of_an_exact_request_would_not_be_exact(make_engine: Make) -> None:
    engine = make_engine(block_size=PAGE, num_blocks=60)
    engine.serve("source", [*words("another", 30), *NOTES, 3])
    lead = words("lead", PAGE + 4)
    engine.serve("copy", [*lead, *NOTES, 3])  # exact up to the end of its seam
    third = engine.serve("third", [*lead, *NOTES[:3], *words("new", 8), *NOTES, 4, 5])
    assert third.spans("local") == [(0, PAGE)]
    assert third.spans("reused")[0] == (PAGE, len(lead) + SEAM)
    check_idle(engine)


def test_a_conversation_goes_on_from_its_own_approximate_page(make_engine: Make) -> None:
    engine = make_engine(block_size=PAGE, num_blocks=60)
    engine.serve("source", [*words("another", 30), *NOTES, 3])
    first = engine.serve("first", [*words("one", 4), *NOTES, *HEAD, 3])
    assert first.spans("reused") == [(4 + SEAM, 4 + len(NOTES))]
    more = words("more", 40)
    engine.serve("another source", [*words("another", 20), *more, 3])
    again = [*words("one", 4), *NOTES, *HEAD[:10], *words("new", 9), *more, 4]
    second = engine.serve("second", again)
    assert second.spans("local") == [(0, 48)]
    assert second.spans("reused")[0] == (48, 54)
    check_idle(engine)


def test_without_a_salt_it_ends_at_a_border(make_engine: Make) -> None:
    """Else a stranger could guess the text behind a known beginning token by token."""
    engine = make_engine(block_size=PAGE, num_blocks=60, window_tokens=4, report="auto")
    for salt, end in ((None, PAGE + 4), ("tenant", len(HEAD))):
        engine.serve(f"before {salt}", BEFORE, salt=salt)
        after = engine.serve(f"after {salt}", AFTER, salt=salt)
        rest = after.loaded[0].loads[0]
        assert (rest.prompt_start, rest.prompt_start + rest.length) == (PAGE, end)


def test_it_is_no_reason_to_reuse(make_engine: Make) -> None:
    engine = make_engine(block_size=PAGE, num_blocks=60)
    engine.serve("before", BEFORE)
    other = engine.serve("other", [*HEAD, *words("something else", 40)])
    assert other.report["declined"] == {"no_match": 1}
    assert not other.loaded


def test_a_client_that_names_spans_gets_no_other(make_engine: Make) -> None:
    engine = make_engine(block_size=PAGE, num_blocks=60)
    engine.serve("before", BEFORE)
    start = len(HEAD) + 8
    named = engine.serve("after", AFTER, hints={"spans": [[start, start + len(NOTES)]]})
    assert named.spans("reused") == [BEHIND]
