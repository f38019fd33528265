# SPDX-License-Identifier: Apache-2.0
"""Flaws: what in a log cannot be taken into account. Counted by kind, and never the end of it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.wording import Explained


class EstimateError(ValueError):
    """Nothing can be estimated; the message is one line for the user."""


class Flaw(Explained):
    """Why a line was skipped."""

    LONG_LINE = ("long_line", "longer than a request may be")
    NOT_TEXT = ("not_utf8", "not UTF-8")
    NOT_JSON = ("not_json", "not JSON")
    NO_REQUEST = ("no_request", "no messages and no prompt in it")
    WRONG_TYPE = ("wrong_type", "a field has another type than OpenAI's API allows")
    EMPTY = ("empty", "no text in it")
    MEDIA = ("media", "images, audio or files: such requests are served without reuse")
    OTHER_MODEL = ("other_model", "for another model than the first one (see --served)")
    TEMPLATE = ("template", "the chat template or the tokenizer does not take it")
    REFUSED = ("refused", "vLLM refuses it")
    LONG_PROMPT = ("long_prompt", "longer than the cache")


class SkippedError(ValueError):
    """One request that cannot be taken into account; ``detail`` is one line."""

    def __init__(self, flaw: Flaw, detail: str = "") -> None:
        super().__init__(detail)
        self.flaw = flaw
        self.detail = detail


@dataclass
class Count:
    """How often a flaw occurred, and where first."""

    number: int
    first_line: int
    detail: str


class Flaws:
    """Counts of flaws by kind; takes no more memory for more of them."""

    def __init__(self) -> None:
        self.counts: dict[Flaw, Count] = {}

    def add(self, skipped: SkippedError, line: int) -> None:
        count = self.counts.setdefault(skipped.flaw, Count(0, line, skipped.detail))
        count.number += 1

    @property
    def total(self) -> int:
        return sum(count.number for count in self.counts.values())
