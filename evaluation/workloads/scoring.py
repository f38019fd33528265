# SPDX-License-Identifier: Apache-2.0
"""Scores of a task's answer, each in 0..1."""

from __future__ import annotations

import ast
import re
import string
from collections import Counter
from collections.abc import Sequence

from kvcomm_vllm.evaluation.workloads.answers import last_number
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.sandbox import run_tests

LETTERS = "ABCD"
_BLOCK = re.compile(r"```(?:python3?|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Most telling first. A letter alone may be the article: only capitals, and never in a sentence.
_CHOICES = (
    r"(?i:answer|choice|option|choose|chose)(?:\s+(?i:is|letter|choice|option))*\W*([A-D])\b(?!')",
    r"\\boxed\{([A-D])\}",
    r"\(([A-D])\)",
    r"^\W*([A-D])(?:[.):*\s]*$|[.):])",
)


def stated_number(solution: str, name: str) -> float:
    """The number a written solution ends in; ``name`` of the row for the message.

    Raises:
        DataError: it has none.
    """
    if (number := last_number(solution)) is None:
        raise DataError(f"{name}: no number in the answer")
    return number


def exact_number(answer: str, right: float) -> float:
    """1 if the last number of the answer is the right one."""
    return float(last_number(answer) == right)


def letter(answer: str, right: str) -> float:
    """1 if the answer names the right choice; see :func:`named_letter`."""
    return float(named_letter(answer) == right)


def named_letter(answer: str) -> str | None:
    """The choice that an answer comes down to, A to D: named as the answer, in a box, in brackets,
    or in front of a line or alone on it; the last one where several are. None without any.
    """
    for pattern in _CHOICES:
        if found := re.findall(pattern, answer, re.MULTILINE):
            return str(found[-1])
    return None


def word_f1(answer: str, accepted: Sequence[str]) -> float:
    """F1 between the words of the answer and those of the accepted answer that is nearest.

    Words are lower-cased and have neither punctuation nor articles, as in SQuAD (Rajpurkar et al.
    2016, §6.1).
    """
    return max((_f1(_words(answer), _words(other)) for other in accepted), default=0.0)


def _words(text: str) -> Counter[str]:
    return Counter(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(words: Counter[str], right: Counter[str]) -> float:
    common = (words & right).total()
    return 2 * common / (words.total() + right.total()) if common else 0.0


def code_of(answer: str) -> str:
    """The code of an answer: its last block marked as Python, closed or not, else the whole answer
    if it is Python; empty without any.
    """
    if blocks := _BLOCK.findall(answer):
        return str(blocks[-1])
    try:
        ast.parse(answer)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return answer


def share_passed(answer: str, tests: Sequence[str]) -> float:
    """Share of the tests that the code of the answer passes, run in the sandbox."""
    code = code_of(answer)
    if not code.strip():
        return 0.0
    return sum(run_tests(code, tests)) / len(tests)
