# SPDX-License-Identifier: Apache-2.0
"""What one configuration key allows, and how a wrong value for it is put into words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from kvcomm_vllm.config import secondary
from kvcomm_vllm.config.address import Address
from kvcomm_vllm.config.secondary import SecondaryTiers
from kvcomm_vllm.wording import shown

# Of counts, tokens and megabytes: more than any engine has, and yet no more than can be provided
# for (an index of so many sequences takes 50 MB before it holds the first).
MOST = 1_000_000


@dataclass(frozen=True)
class Key:
    """One configuration key: its meaning and the values it allows.

    Args:
        default: the value when the key is not given; its type is the key's type.
        doc: one sentence for users.
        low, high: inclusive bounds; every number has both, so that none can ask for the impossible.
        choices: the only values allowed; empty when the bounds decide, or any text is.
        when_zero: what 0, or no text, means, where it is not simply the number nought.
    """

    default: bool | int | float | str | SecondaryTiers
    doc: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    when_zero: str = ""

    @property
    def allowed(self) -> str:
        """The allowed values in words, as used in error messages, YAML comments and the docs."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if isinstance(self.default, SecondaryTiers):
            return secondary.FORM
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return f"text ('' = {self.when_zero})" if self.when_zero else "text"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        text = f"{kind} from {self.low} to {self.high}"
        return f"{text} (0 = {self.when_zero})" if self.when_zero else text

    def problem(self, value: object) -> str | None:
        """Why ``value`` is not allowed for this key; None when it is."""
        if self.choices:
            return None if isinstance(value, str) and value in self.choices else "is not known"
        if isinstance(self.default, SecondaryTiers):
            if not isinstance(value, (list, tuple)):
                return _wrong_type(value)
            return secondary.problem(value)
        if isinstance(self.default, bool):
            return None if isinstance(value, bool) else _wrong_type(value)
        if isinstance(self.default, str):
            if not isinstance(value, str):
                return _wrong_type(value)
            return None if value.isprintable() else "has characters that cannot be printed"
        # bool is an int in Python: `seam_tokens: yes` must not become one token.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _wrong_type(value)
        # asked of floats alone: a whole number may be too large to be made one
        if isinstance(value, float) and not math.isfinite(value):
            return "is not a finite number"
        if isinstance(self.default, int) and isinstance(value, float):
            return "is not written as a whole number"
        return None if self.low <= value <= self.high else "is out of range"

    def normalise(self, value: Any) -> Any:
        """``value`` as it was meant: 5 for 5.0, and false where YAML 1.1 has misread `off`; a
        choice that was yes or no once still is. A password in it is not printed from now on.
        """
        if isinstance(self.default, Address) and isinstance(value, str):
            return Address(value)
        if isinstance(self.default, SecondaryTiers):
            return secondary.read(value)
        if value is False and "off" in self.choices:
            return "off"
        if value is True and "auto" in self.choices:
            return "auto"
        if isinstance(self.default, float) and type(value) is int and abs(value) < 2**53:
            return float(value)
        return value

    def told(self, value: object) -> str:
        """``value`` for an error message, without a password in it."""
        if isinstance(self.default, SecondaryTiers):
            return secondary.told(value)
        return shown(str(self.normalise(value)) if isinstance(value, str) else value)


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A dataclass field that carries its :class:`Key` in ``metadata["key"]``."""
    return field(default=default, metadata={"key": Key(default, doc, **limits)})


def _wrong_type(value: object) -> str:
    names = {"str": "text", "int": "a whole number", "float": "a number with a point"}
    names |= {"bool": "true/false", "NoneType": "empty", "list": "a list", "dict": "a mapping"}
    return f"is {names.get(type(value).__name__, 'of another type')}"
