# SPDX-License-Identifier: Apache-2.0
"""Strangers on one server learn nothing of each other's text token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.scheduler.origin import LEAD_TOKENS
from kvcomm_vllm.scheduler.refresh import BEHIND_EDIT, WORDS_BEHIND_EDIT

Make = Callable[..., EngineWithoutWorker]

DIGITS = range(1000, 1010)  # one token each, as with most tokenizers
KNOWN = words("what everybody knows", 52)
HINTS = {"mode": "rotate"}  # no seam: the earliest sight of a match


def observed(engine: EngineWithoutWorker, prompt: list[int], **options: Any) -> str:
    """All that a client sees of a request: its report, and how much of the prompt was computed
    when, which is what time tells.
    """
    served = engine.serve("guess", prompt, hints=HINTS, **options)
    steps = [step["guess"][0] for step in engine.trace if "guess" in step]
    holes = [[len(hole.tokens) for hole in ops.holes] for ops in served.loaded]
    return repr((served.report, steps, holes))


def attack(server: Callable[[], EngineWithoutWorker], digits: int, **options: Any) -> list[int]:
    """Guess a number behind the known text digit by digit: the one of ten guesses that looks unlike
    the others is taken for right; where none does, one is taken at random.

    Each guess finds the server as its victim left it, which no real attacker can ask for.
    """
    found: list[int] = []
    for place in range(digits):
        seen = {}
        for digit in DIGITS:
            prompt = [*words("attacker", 7), *KNOWN, *found, digit, *words("end", 5)]
            seen[digit] = observed(server(), prompt, **options)
        odd = [d for d in DIGITS if list(seen.values()).count(seen[d]) == 1]
        found.append(odd[0] if len(odd) == 1 else random.Random(place).choice(DIGITS))
    return found


@pytest.fixture
def server_of(make_engine: Make) -> Callable[..., Callable[[], EngineWithoutWorker]]:
    """What makes a server on which a victim has told a secret."""

    def of(secret: list[int], salt: str | None = None, **settings: Any) -> Any:
        def serve() -> EngineWithoutWorker:
            options = {"window_tokens": 16, "min_span_tokens": 32, "min_reuse_tokens": 32}
            engine = make_engine(num_blocks=200, block_size=16, **options, **settings)
            engine.half.secret = b"s" * 32  # anchors are named alike on each of them
            victim = [*words("victim", 16), *KNOWN, *secret, *words("and so on", 60)]
            engine.serve("victim", victim, salt=salt)
            return engine

        return serve

    return of


SECRET = [1007, 1003, 1009, 1001]


@pytest.mark.slow
def test_the_attack_works_where_the_report_tells_all(server_of: Any) -> None:
    """Guards the other tests: the attacker knows his trade."""
    assert attack(server_of(SECRET, report="full"), 4) == SECRET


@pytest.mark.parametrize("settings", [{"report": "auto"}, {"report": "coarse"}, {"report": "off"}])
@pytest.mark.slow
def test_a_number_behind_known_text_is_not_found_digit_by_digit(
    server_of: Any, settings: dict[str, Any]
) -> None:
    """The attacker is left with what he would have taken at random."""
    chance = [random.Random(place).choice(DIGITS) for place in range(4)]
    for trial in range(3):
        rng = random.Random(f"secret {trial}")
        secret = [rng.choice(DIGITS) for _ in range(4)]
        assert attack(server_of(secret, **settings), 4) == chance


def test_a_number_in_front_of_known_text_is_not_found_either(server_of: Any) -> None:
    """Matches begin at borders, too."""
    behind = words("and so on", 60)
    server = server_of(SECRET, report="auto")
    seen = {observed(server(), [*words("attacker", 7), digit, *behind, 5]) for digit in DIGITS}
    assert len(seen) == 1


def test_a_prompt_cut_off_behind_a_guess_tells_nothing(server_of: Any) -> None:
    server = server_of(SECRET, report="auto")
    seen = {observed(server(), [*words("attacker", 7), *KNOWN, digit, 5]) for digit in DIGITS}
    assert len(seen) == 1


@pytest.mark.slow
def test_with_a_salt_of_ones_own_the_report_is_full_and_matches_end_anywhere(
    server_of: Any,
) -> None:
    server = server_of(SECRET, "tenant", report="auto")
    assert attack(server, 4, salt="tenant") == SECRET, "those who share a salt trust each other"
    stranger = server().serve("stranger", [*words("x", 7), *KNOWN, *SECRET, 5], hints=HINTS)
    assert stranger.report["reused"] == 0


def test_a_coarse_report_speaks_of_whole_pages_and_not_of_places(make_engine: Make) -> None:
    engine = make_engine(num_blocks=200, block_size=16, window_tokens=4, report="auto")
    engine.serve("source", [*words("one", 20), *words("question", 90)])
    report = engine.serve("second", [*words("two", 9), *words("question", 90), 3]).report
    assert set(report) == {"mode", "prompt_tokens", "local", "reused", "computed", "declined"}
    assert report["reused"] % 16 == 0
    assert report["reused"] > 0
    assert report["local"] + report["reused"] + report["computed"] == 100


def test_nothing_about_a_salt_can_be_computed_outside_the_process(make_engine: Make) -> None:
    """Two engines give one salt different keys."""
    keys = []
    for _ in range(2):
        engine = make_engine()
        engine.serve("source", words("text", 40), salt="secret")
        (sequence,) = engine.half.store.index._row_of
        keys.append(sequence.namespace)
    assert len(set(keys)) == 2
    assert all(len(key) == 16 for key in keys)


def words_found(make_server: Callable[[], EngineWithoutWorker], **options: Any) -> set[int]:
    """Guess which words stand before a known text in an agent's prompt, by prompts of that agent
    that have one of them there: where it is right, less is computed again.
    """
    lead = words("agent", LEAD_TOKENS)
    known = [token for d in DIGITS for token in (*range(20 * d, 20 * d + 9), d)]
    known = [*range(3000, 3000 + BEHIND_EDIT), *known]
    assert len(known) <= WORDS_BEHIND_EDIT
    seen = {}
    for digit in DIGITS:
        engine = make_server()
        engine.serve("victim", [*lead, *words("head", 30), *SECRET, *known, 1], **options)
        prompt = [*lead, *words("mine", 30), digit, *known, 2]
        served = engine.serve("guess", prompt, hints={"mode": "seam"}, **options)
        assert served.loaded, "nothing is reused"
        seen[digit] = sum(len(hole.tokens) for ops in served.loaded for hole in ops.holes)
    return {digit for digit in DIGITS if seen[digit] < max(seen.values())}


@pytest.mark.slow
def test_words_before_a_known_text_are_told_to_those_with_its_salt_alone(make_engine: Make) -> None:
    assert words_found(lambda: make_engine(num_blocks=200)) == set(SECRET)  # report: full
    assert words_found(lambda: make_engine(report="auto", num_blocks=200), salt="same") == set(
        SECRET
    )
    assert words_found(lambda: make_engine(report="auto", num_blocks=200)) == set()
