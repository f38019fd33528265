# SPDX-License-Identifier: Apache-2.0
"""What is reused: shared text wherever it stands, behind a seam, up to the last token but one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
MESSAGE = words("message", 32)


def test_a_question_behind_another_agents_prefix_is_reused_behind_a_seam(make_engine: Make) -> None:
    engine = make_engine(seam_tokens=3)
    engine.serve("first", [*words("one", 20), *QUESTION, *words("end", 4)])
    second = engine.serve("second", [*words("two", 29), *QUESTION, *words("tail", 7)])
    assert second.spans("reused") == [(29 + 3, 29 + 40)]
    assert second.report["seam"] == 3
    assert second.report["gap"] == 29
    (ops,) = second.loaded
    assert [(hole.start, len(hole.tokens)) for hole in ops.holes] == [(0, 32)]
    check_report(engine, "second")
    check_idle(engine)


def test_text_between_two_spans_is_a_gap(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION])
    engine.serve("second", [*words("two", 8), *MESSAGE, *words("end", 4)])
    third = engine.serve("third", [*words("3", 12), *MESSAGE, *words("gap", 6), *QUESTION, 3, 4])
    assert third.spans("reused") == [(14, 12 + 32), (12 + 32 + 6 + 2, 12 + 32 + 6 + 40)]
    assert [(hole.start, len(hole.tokens)) for hole in third.loaded[0].holes] == [(0, 14), (44, 8)]
    assert third.report["gap"] == 12 + 6
    assert len(set(third.report["placeholders"])) == 2


def test_tokens_whose_source_is_approximate_itself_are_told_apart(make_engine: Make) -> None:
    """The second agent's own words stand behind text it reused, the question was computed."""
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 12), *QUESTION, *MESSAGE, 3])
    assert second.report["reused"] == 38
    assert second.report["from_approximate"] == 0
    third = engine.serve("third", [*words("3", 20), *MESSAGE, *words("gap", 6), *QUESTION, 3])
    assert third.spans("reused") == [(22, 52), (60, 98)]
    assert third.report["from_approximate"] == 30


def test_the_own_prefix_in_vllms_cache_comes_first(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("warm", [*words("two", 24), *words("other", 12)])
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 24), *QUESTION, 3])
    assert second.spans("local") == [(0, 24)]
    assert second.spans("reused") == [(26, 64)]


def test_rotate_has_no_seam(make_engine: Make) -> None:
    engine = make_engine(mode="rotate")
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 12), *QUESTION, 3])
    assert second.spans("reused") == [(12, 52)]


def test_hints_choose_seam_and_mode_for_one_request(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION])
    seam = engine.serve("seam", [*words("2", 8), *QUESTION, 3], hints={"seam_tokens": 7})
    rotate = engine.serve("rotate", [*words("3", 8), *QUESTION, 3], hints={"mode": "rotate"})
    assert seam.spans("reused") == [(15, 48)]
    assert rotate.spans("reused") == [(8, 48)]
    assert (seam.report["mode"], rotate.report["mode"]) == ("seam", "rotate")


def test_the_last_token_is_always_computed(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION, *words("more", 8)])
    second = engine.serve("second", [*words("two", 8), *QUESTION])
    assert second.spans("reused") == [(10, 47)]
    assert second.spans("computed")[-1] == (47, 48)


def test_a_prompt_that_is_one_span_is_still_computed_at_its_end(make_engine: Make) -> None:
    engine = make_engine(mode="rotate")
    engine.serve("first", [*words("one", 20), *QUESTION])
    assert engine.serve("second", QUESTION).spans("reused") == [(0, 39)]


def test_an_answer_is_reused_up_to_its_last_sampled_token(make_engine: Make) -> None:
    """The last token was never forwarded: it has no KV, even where it would fill its page."""
    engine = make_engine(block_size=4, mode="rotate")
    answer = words("answer", 20)
    engine.serve("speaker", words("one", 20), answer)
    (speaker,) = engine.half.store.index._row_of
    assert len(speaker.tokens) == 39  # the last page holds three of its four tokens
    listener = engine.serve("listener", [*words("two", 8), *answer, *words("end", 5)])
    assert listener.spans("reused") == [(8, 8 + 19)]


def test_a_last_page_is_kept_for_its_readers_and_evicted_like_any_other(make_engine: Make) -> None:
    kept, dropped = make_engine(mode="rotate"), make_engine(mode="rotate", keep_last_page=False)
    found = []
    for engine in (kept, dropped):
        engine.serve("speaker", words("one", 20), words("answer", 18))  # 37 rows, pages of 4
        listener = [*words("two", 8), *words("answer", 18), 3]
        found.append(engine.serve("listener", listener).spans("reused"))
    assert found == [[(8, 8 + 17)], [(8, 8 + 16)]]
    for number in range(30):  # other requests need the pages
        kept.serve(f"other {number}", words(number, 40))
    again = [*words("three", 8), *words("answer", 18), 3]
    assert kept.serve("too late", again).report["reused"] == 0


def test_a_request_too_short_to_be_reused_leaves_no_page_behind(make_engine: Make) -> None:
    engine = make_engine(min_span_tokens=30)
    engine.serve("short", words("one", 20))
    assert not engine.partial_names


@pytest.mark.parametrize(
    ("share", "reused"), [(0.5, [(6, 44)]), (0.0, [(6, 44), (51, 89)])], ids=["default", "off"]
)
def test_of_a_text_twice_in_one_prompt_the_second_copy_which_saw_no_first_is_computed(
    make_engine: Make, share: float, reused: list[tuple[int, int]]
) -> None:
    engine = make_engine(max_refresh_share=share)
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("2", 4), *QUESTION, *words("gap", 5), *QUESTION, 3])
    assert second.spans("reused") == reused


def test_a_source_may_itself_be_reused_text(make_engine: Make) -> None:
    engine = make_engine(max_sequences=1)
    engine.serve("first", [*words("one", 20), *QUESTION])
    engine.serve("second", [*words("two", 8), *QUESTION, *words("b", 5)])
    third = engine.serve("third", [*words("three", 16), *QUESTION, *words("c", 5)])
    assert third.spans("reused") == [(18, 56)]


def test_approximate_sources_are_left_alone_when_told_so(make_engine: Make) -> None:
    engine = make_engine(max_sequences=1, reuse_approximate=False)
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 8), *QUESTION, *words("b", 5)])
    third = engine.serve("third", [*words("three", 16), *QUESTION, *words("c", 5)])
    assert second.report["reused"] > 0
    assert third.report["reused"] == 0


def test_spans_in_the_hints_are_the_only_ones_reused(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION, *MESSAGE])
    prompt = [*words("two", 8), *QUESTION, *words("gap", 5), *MESSAGE, 3]
    hints = {"spans": [[0, 4], [12, 40], [200, 300]]}
    second = engine.serve("second", prompt, hints=hints)
    assert second.spans("reused") == [(12, 40)], "no seam: the text before is common, too"


def test_other_tenants_text_is_never_found(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION], salt="red")
    for name, salt in (("blue", "blue"), ("none", None), ("empty", "None")):
        assert engine.serve(name, [*words(name, 8), *QUESTION, 3], salt=salt).loaded == []
    engine.serve("red", [*words("two", 8), *QUESTION, 3], salt="red")
    assert engine.served["red"].report["reused"] > 0


def test_a_reused_request_of_one_token_reports_its_reuse(make_engine: Make) -> None:
    """It ends before vLLM passes the workers' word on."""
    engine = make_engine()
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 8), *QUESTION, 3], [5])
    assert second.report["reused"] == 38
    check_idle(engine)


def test_the_same_template_gets_the_same_placeholders_whatever_is_quoted(make_engine: Make) -> None:
    engine = make_engine()
    placeholders = []
    for round_ in range(2):
        text = words(("text", round_), 30)
        engine.serve(f"source{round_}", [*words(("source", round_), 10), *text])
        prompt = [*words("template", 15), *text, *words("tail", 3)]
        placeholders.append(engine.serve(f"agent{round_}", prompt).report["placeholders"])
    assert placeholders[0] == placeholders[1]
    assert len(placeholders[0]) == 1
