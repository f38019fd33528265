# SPDX-License-Identifier: Apache-2.0
"""Files with a JSON object per line, packaged ones and others."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from kvcomm_vllm.cli.failure import UserError

DATA = resources.files("kvcomm_vllm.evaluation") / "data"
Row = dict[str, Any]


class DataError(UserError, ValueError):
    """Data or options that cannot be used; the message says why and where."""


def parse_rows(text: str, source: str, fields: dict[str, type]) -> list[Row]:
    """One object per line, with these fields of these types.

    Raises:
        DataError: a line that is not so; the message says which.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: needs an object")
        for field, kind in fields.items():
            if not isinstance(row.get(field), kind):
                raise DataError(f'{source}, line {number}: needs "{field}" ({kind.__name__})')
        rows.append({"id": f"row-{number}", **row})
    return rows


def read_file(path: Path, fields: dict[str, type]) -> list[Row]:
    """Rows of a file.

    Raises:
        DataError: unreadable or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return parse_rows(text, str(path), fields)


def read_sample(name: str, fields: dict[str, type]) -> list[Row]:
    """Rows of a packaged file."""
    return parse_rows((DATA / name).read_text(encoding="utf-8"), name, fields)
