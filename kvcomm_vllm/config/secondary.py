# SPDX-License-Identifier: Apache-2.0
"""vLLM's own secondary tiers: mappings that are passed on as they are."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

from kvcomm_vllm.wording import one_line, shown

FORM = "a list of mappings, each with a type, as {type: fs, root_dir: /kv}"


class SecondaryTiers(tuple[dict[str, Any], ...]):
    """Tiers as they were given. Whoever prints them, vLLM's log of its arguments included, gets
    their types alone: what else is told of them may be a password.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"[{' + '.join(map(name_of, self))}]"

    def __hash__(self) -> int:
        return hash(repr(self))

    def plain(self) -> list[dict[str, Any]]:
        """They themselves, for whoever may change them."""
        return [deepcopy(dict(one)) for one in self]


def name_of(tier: Mapping[str, Any]) -> str:
    """What a log says of a tier."""
    return one_line(str(tier["type"]), 40)


def read(value: object) -> object:
    """The tiers in a value, or the value if it is not a list of them."""
    if not isinstance(value, (list, tuple)) or problem(value):
        return value
    return SecondaryTiers(dict(one) for one in value)


def problem(value: list[Any] | tuple[Any, ...]) -> str | None:
    """Why a list is none of tiers."""
    for number, one in enumerate(value, 1):
        if not isinstance(one, Mapping):
            return f"has {shown(one)} as number {number}, which is no mapping"
        if not all(isinstance(name, str) for name in one):
            return f"has a key that is no text in number {number}"
        kind = one.get("type")
        if not isinstance(kind, str) or not kind:
            return f"has no type, or one that is no text, in number {number}"
    return None


def told(value: object) -> str:
    """A value for this key, for an error message."""
    if not isinstance(value, (list, tuple)):
        return "{...}" if isinstance(value, Mapping) else shown(value)
    return shown([_told(one) for one in islice(value, 5)])


def _told(one: object) -> object:
    if not isinstance(one, Mapping):
        return one
    kind = one.get("type", ...)
    return {"type": kind} if len(one) == 1 else {"type": kind, ...: ...}
