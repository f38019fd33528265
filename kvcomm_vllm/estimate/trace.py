# SPDX-License-Identifier: Apache-2.0
"""Reading a server's trace (``trace.file``), and the picture of one request in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvcomm_vllm.estimate.flaws import EstimateError
from kvcomm_vllm.estimate.live import Explained
from kvcomm_vllm.estimate.picture import KINDS, Picture, of_report
from kvcomm_vllm.wording import one_line

LAST = "last"
COUNTS = ("prompt_tokens", "local", "reused", "computed")


def explain(path: Path, name: str) -> Explained:
    """The request of this name, or whose name begins so, or the ``last``; of several the last one.

    Raises:
        EstimateError: there is none, or it ended before it was served.
    """
    found = None
    for record in records(path):
        if name == LAST or str(record["id"]).startswith(name):
            found = record
    if found is None:
        raise EstimateError(f"{path}: no request {one_line(name)} in it")
    title = f"{one_line(str(found['id']))}, {found.get('outcome')}"
    try:
        if any(type(found[key]) is not int for key in COUNTS):
            raise TypeError
        spans = [span for span in found["spans"] if span[2] in KINDS]
        return Explained(found, Picture(title, of_report(spans, found.get("near") or ())), True)
    except (KeyError, TypeError, IndexError, ValueError):
        raise EstimateError(f"{title}: nothing is known of how it was served") from None


def records(path: Path) -> Iterator[Mapping[str, Any]]:
    """What is in a trace, the oldest first; lines that were cut off, or are none of ours, are left
    out.

    Raises:
        EstimateError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and "id" in record:
                    yield record
    except OSError as error:
        raise EstimateError(f"{path}: {error.strerror}") from None
