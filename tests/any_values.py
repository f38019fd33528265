# SPDX-License-Identifier: Apache-2.0
"""Values as clients and files may send them: of every type, and far too large."""

from __future__ import annotations

import json
import math

from hypothesis import strategies as st

HUGE = 10**5000  # Python refuses to write it down
LONG = "long" * 250_000


class Huge(int):
    """For hypothesis, which writes down what it has drawn."""

    def __repr__(self) -> str:
        return f"Huge of {self.bit_length()} bits"


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


extremes: list[object] = [Huge(HUGE), Huge(-HUGE), Huge(10**400), 2**63, 10**12]
extremes += [1e400, 1e12, -0.0, math.nan, "x" * 5000, "\ud800", "a\nb", "\0", "\u2028", ""]
words = st.sampled_from(["off", "seam", "anchor", "true", "16", "x" * 300])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | words
    | st.sampled_from(extremes)
)

json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text() | words, inner, max_size=4)
    ),
    max_leaves=12,
)
python_values = (
    json_values
    | st.binary()
    | st.dates()
    | st.datetimes()
    | st.complex_numbers()
    | st.builds(object)
    | st.tuples(scalars, scalars)
    | st.sets(st.integers())
    | st.dictionaries(scalars, scalars, max_size=3)
)


def is_short_line(text: str, most: int = 300) -> bool:
    """Whether it can be printed, logged and sent."""
    return text.isprintable() and len(text) <= most and json.loads(json.dumps(text)) == text
