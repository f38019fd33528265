# SPDX-License-Identifier: Apache-2.0
"""Lines of a log, one after another: only one of them is in memory, and a limited part of it."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from kvcomm_vllm.estimate.flaws import EstimateError, Flaw, SkippedError
from kvcomm_vllm.wording import one_line

MOST_BYTES = 16 << 20  # of a line: some four million tokens
PIECE = 1 << 20


def entries(path: Path) -> Iterator[tuple[int, object | SkippedError]]:
    """(line number, JSON value or why there is none) of each line that is not blank.

    ``-`` is the standard input, and a name that ends in ``.gz`` is unpacked.

    Raises:
        EstimateError: the file cannot be read.
    """
    try:
        with _opened(path) as file:
            number = 0
            while line := file.readline(MOST_BYTES + 1):
                number += 1
                too_long = len(line) > MOST_BYTES
                while too_long and line and not line.endswith(b"\n"):
                    line = file.readline(PIECE)
                if too_long:
                    yield number, SkippedError(Flaw.LONG_LINE, f"more than {MOST_BYTES >> 20} MB")
                elif line.strip():
                    yield number, _value(line)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: a NUL in the name
        told = getattr(error, "strerror", None) or str(error)
        raise EstimateError(f"{one_line(str(path))}: cannot be read: {one_line(told)}") from None


def _opened(path: Path) -> IO[bytes]:
    if str(path) == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return open(path, "rb")


def _value(line: bytes) -> object | SkippedError:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return SkippedError(Flaw.NOT_TEXT)
    except RecursionError:
        return SkippedError(Flaw.NOT_JSON, "nested too deeply")
    except ValueError as error:
        return SkippedError(Flaw.NOT_JSON, one_line(str(error), 80))
    return value
