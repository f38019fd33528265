# SPDX-License-Identifier: Apache-2.0
"""Packages that only some commands need."""

import importlib.util
from collections.abc import Iterable


def lacking(packages: Iterable[str], extra: str) -> str | None:
    """The packages that cannot be imported, and what installs them; None if all are there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)}: pip install '.[{extra}]' in the checkout" if missing else None
