# SPDX-License-Identifier: Apache-2.0
"""What an answer says, apart from how it says it: a number, or a choice between candidates."""

import re
from collections.abc import Hashable, Iterable, Sequence

from kvcomm_vllm.evaluation.workloads.case import Answer, Case

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, without thousands separators."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def chosen_letter(text: str, letters: str) -> str | None:
    """The letter a judge names: after "candidate" or "answer", else at the very start."""
    named = re.search(rf"\b(?i:candidate|answer)\s+([{letters}])\b", text)
    found = named or re.match(rf"\W*([{letters}])\b", text)
    return found[1] if found else None


def meaning(case: Case, text: str) -> float | None:
    """The number, or the agent chosen (from 1), that an answer to ``case`` comes down to; None if
    it has none or is free text.
    """
    if case.answer is Answer.NUMBER:
        return last_number(text)
    if case.answer is Answer.CHOICE:
        letters = "ABCDEFGHIJ"[: len(case.candidates)]
        letter = chosen_letter(text, letters)
        return None if letter is None else float(case.candidates[letters.index(letter)])
    return None


def consistency(choices: Iterable[tuple[str, Hashable]]) -> float | None:
    """Share of questions whose judges chose the same agent in every order.

    Args:
        choices: (question, chosen agent) of each judge; None, no choice, agrees with nothing.

    Returns None without a question that was judged twice.
    """
    groups: dict[str, list[Hashable]] = {}
    for group, choice in choices:
        groups.setdefault(group, []).append(choice)
    pairs = [found for found in groups.values() if len(found) > 1]
    if not pairs:
        return None
    return sum(None not in found and len(set(found)) == 1 for found in pairs) / len(pairs)


def equal_leading_share(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of leading tokens on which two greedy answers agree, in 0..1.

    The length of the common prefix over the length of the longer answer; 1 if both are empty.
    """
    longest = max(len(first), len(second))
    if not longest:
        return 1.0
    pairs = zip(first, second, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return equal / longest
