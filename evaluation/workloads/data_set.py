# SPDX-License-Identifier: Apache-2.0
"""The rows of a workload: from a data folder, or from the packaged sample that stands in for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kvcomm_vllm
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row, read_file, read_sample

# Evaluation data that lies beside a checkout; a wheel has none there.
BESIDE = Path(kvcomm_vllm.__file__).resolve().parents[2] / "shared" / "data"


def data_file(name: str, folder: Path | None) -> Path | None:
    """The file in ``folder``, or without one beside the checkout; None = use the sample."""
    if folder is not None:
        return folder / name
    return BESIDE / name if (BESIDE / name).exists() else None


def _as_it_is(row: Row) -> list[Row]:
    return [row]


@dataclass(frozen=True)
class DataSet:
    """A data file, and the packaged sample that stands in for it.

    Args:
        file: name in the data folder; ``fields``: what its rows must have.
        sample: packaged file; ``expand`` makes rows as in ``file`` of each of its lines, which
            have ``sample_fields`` (None = ``fields``).
    """

    file: str
    fields: dict[str, type]
    sample: str
    sample_fields: dict[str, type] | None = None
    expand: Callable[[Row], list[Row]] = _as_it_is

    def rows(self, folder: Path | None) -> tuple[list[Row], str]:
        """All rows in the order of the data, and where those are from.

        Raises:
            DataError: unreadable or malformed data.
        """
        if (path := data_file(self.file, folder)) is not None:
            return read_file(path, self.fields), path.name
        return self.sample_rows(), "packaged sample"

    def sample_rows(self) -> list[Row]:
        """The rows of the packaged sample."""
        lines = read_sample(self.sample, self.sample_fields or self.fields)
        return [row for line in lines for row in self.expand(line)]

    def shuffled(self, folder: Path | None, seed: int) -> tuple[list[Row], str]:
        """All rows, so that the first few of them are a fair sample, and where they are from.

        A folder need not have the files of all workloads: the packaged sample stands in for those
        that are missing, and the second return value says so.

        Raises:
            DataError: no such folder, unreadable or malformed data.
        """
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        if folder is not None and not (folder / self.file).exists():
            rows = self.sample_rows()
            source = f"packaged sample (the data folder has no {self.file})"
        else:
            rows, source = self.rows(folder)
        random.Random(seed).shuffle(rows)
        return rows, source


def chance(row: Row, seed: int) -> random.Random:
    """A generator for one row: its prompts stay the same whatever other rows there are."""
    return random.Random(f"{seed} {row['id']}")
