# SPDX-License-Identifier: Apache-2.0
"""What a client may say about one request: ``kv_transfer_params: {"kvcomm": {...}}``.

No client has to say anything; hints only restrict or override what the configuration says.
"""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvcomm_vllm.config import MODES, keys
from kvcomm_vllm.wording import shown

if TYPE_CHECKING:
    from kvcomm_vllm.scheduler.index import Match

FIELD = "kvcomm"
MAX_SPANS = 1024
MAX_POSITION = 2**31 - 1
MAX_AGENT_CHARACTERS = 256
NO_NAME = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, surrogates, ends of lines


class HintError(ValueError):
    """Hints that cannot be used; the text, one short line, names the hint, the value and what is
    allowed.
    """


@dataclass(frozen=True, slots=True)
class Hints:
    """Wishes of one request; None means that the request leaves it to the configuration.

    Args:
        mode: ``off``, ``rotate``, ``seam``, ``anchor`` or ``paper`` for this request.
        agent: name of the agent that speaks, for the report.
        seam_tokens: tokens computed at the start of each reused span.
        spans: the only token ranges ``[start, end)`` of the prompt that may be reused, in order.
        learn: serve this request exactly and learn from it (modes ``anchor`` and ``paper``).
        explain: look for text that is stored in another rendering, and say so in the report.
    """

    mode: str | None = None
    agent: str | None = None
    seam_tokens: int | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    learn: bool = False
    explain: bool = False

    def clip(self, matches: list[Match]) -> list[Match]:
        """The parts of ``matches`` inside ``spans``, in order; without spans all of them."""
        if self.spans is None:
            return matches
        clipped = []
        for match in matches:
            stop = match.prompt_start + match.length
            first = bisect.bisect_right(self.spans, match.prompt_start, key=lambda span: span[1])
            for start, end in itertools.islice(self.spans, first, None):
                if start >= stop:
                    break
                start, end = max(start, match.prompt_start), min(end, stop)
                shift = start - match.prompt_start
                clipped.append(
                    replace(
                        match,
                        prompt_start=start,
                        sequence_start=match.sequence_start + shift,
                        length=end - start,
                        lead=match.lead + shift,
                    )
                )
        return clipped


def parse_hints(kv_transfer_params: object) -> Hints:
    """The hints in a request's ``kv_transfer_params``; no hints when it has none.

    None is as good as not given, wherever it stands: routers write out fields that nobody has set.

    Raises:
        HintError: unknown hint, wrong type, or spans that are negative, empty, unordered,
            overlapping or too many.
    """
    if not isinstance(kv_transfer_params, Mapping):
        return Hints()
    given = kv_transfer_params.get(FIELD)
    if given is None:
        return Hints()
    if not isinstance(given, Mapping):
        raise HintError(f"{FIELD}: must be an object of hints, but is {shown(given)}")
    for name in given:
        if name not in Hints.__dataclass_fields__:
            known = ", ".join(Hints.__dataclass_fields__)
            raise HintError(f"{FIELD}: unknown hint {shown(name)}; known hints: {known}")
    return Hints(
        mode=_mode(given.get("mode")),
        agent=_agent(given.get("agent")),
        seam_tokens=_seam_tokens(given.get("seam_tokens")),
        spans=_spans(given.get("spans")),
        learn=_flag("learn", given.get("learn")),
        explain=_flag("explain", given.get("explain")),
    )


def _mode(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value in MODES):
        return value
    raise _refused("mode", value, "one of " + ", ".join(MODES))


def _agent(value: object) -> str | None:
    if value is None or (isinstance(value, str) and _is_name(value)):
        return value
    allowed = f"a name of 1 to {MAX_AGENT_CHARACTERS} characters, none of them a control character"
    raise _refused("agent", value, allowed)


def _is_name(text: str) -> bool:
    """It goes into the report: what ends a line has no place there, and half a surrogate pair
    could not be sent.
    """
    return 0 < len(text) <= MAX_AGENT_CHARACTERS and not any(
        unicodedata.category(character) in NO_NAME for character in text
    )


def _seam_tokens(value: object) -> int | None:
    key = keys()["seam_tokens"]
    if value is None or (isinstance(value, int) and key.problem(value) is None):
        return value
    raise _refused("seam_tokens", value, key.allowed)


def _flag(name: str, value: object) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _refused(name, value, "true or false")


def _spans(value: object) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) > MAX_SPANS:
        raise _refused("spans", value, f"a list of at most {MAX_SPANS} [start, end] pairs")
    spans: list[tuple[int, int]] = []
    for number, pair in enumerate(value):
        where = f"spans[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_int, pair)):
            raise _refused(where, pair, "a pair [start, end] of whole numbers")
        start, end = pair
        if not 0 <= start < end <= MAX_POSITION:
            raise _refused(where, pair, f"0 <= start < end <= {MAX_POSITION}")
        if spans and start < spans[-1][1]:
            raise _refused(where, pair, f"a start at or after {spans[-1][1]}, where the last ended")
        spans.append((start, end))
    return tuple(spans)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(name: str, value: object, allowed: str) -> HintError:
    return HintError(f"{FIELD}.{name}: {shown(value)} is not allowed; allowed: {allowed}")
