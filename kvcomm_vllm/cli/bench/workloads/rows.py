# SPDX-License-Identifier: Apache-2.0
"""The rows of a workload's data, in an order that the seed decides."""

from __future__ import annotations

import random
from pathlib import Path

from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.rows import DataError, Row


def shuffled(data: DataSet, folder: Path | None, seed: int) -> tuple[list[Row], str]:
    """All rows, so that the first few of them are a fair sample, and where they are from.

    A folder need not have the files of all workloads: the packaged sample stands in for those that
    are missing, and the second return value says so.

    Raises:
        DataError: no such folder, unreadable or malformed data.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if folder is not None and not (folder / data.file).exists():
        rows, source = data.sample_rows(), f"packaged sample (the data folder has no {data.file})"
    else:
        rows, source = data.rows(folder)
    random.Random(seed).shuffle(rows)
    return rows, source


def chance(row: Row, seed: int) -> random.Random:
    """A generator for one row: its prompts stay the same whatever other rows there are."""
    return random.Random(f"{seed} {row['id']}")
